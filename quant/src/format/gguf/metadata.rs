//! The typed key-value pairs of a GGUF file.

use crate::QuantError;
use crate::error::Result;
use crate::format::damaged;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An integer of any width.
    Int(i128),
    /// A 32- or 64-bit float.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type.
    Array(Array),
}

/// Values of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Integers of up to 32 bits signed, or less unsigned.
    I32(Vec<i32>),
    /// 32-bit unsigned integers.
    U32(Vec<u32>),
    /// Integers of 64 bits signed.
    I64(Vec<i64>),
    /// Integers of 64 bits unsigned.
    U64(Vec<u64>),
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit floats.
    F64(Vec<f64>),
    /// Bools.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays.
    Array(Vec<Array>),
}

/// All pairs of a file, in its order. Getters answer `None` for an absent key and an error that names the key for one
/// of another type; `need_*` also refuses absence.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    path: PathBuf,
    pairs: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
}

impl Metadata {
    pub(super) fn new(path: &Path, pairs: Vec<(String, Value)>) -> Self {
        let by_key = pairs.iter().enumerate().map(|(at, (key, _))| (key.clone(), at)).collect();
        Self { path: path.to_owned(), pairs, by_key }
    }

    /// All pairs in file order.
    pub fn pairs(&self) -> &[(String, Value)] {
        &self.pairs
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|&at| &self.pairs[at].1)
    }

    /// A text.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// A bool.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A non-negative integer, stored in any integer type.
    ///
    /// # Errors
    /// If the value is of another type, negative, or above what 32 bits hold.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer in 0..2^32", |v| match v {
            Value::Int(i) => u32::try_from(*i).ok(),
            _ => None,
        })
    }

    /// A float (or an integer).
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| match v {
            Value::Float(f) => Some(*f),
            Value::Int(i) => Some(*i as f64),
            _ => None,
        })
    }

    /// An array of texts.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |v| match v {
            Value::Array(Array::String(s)) => Some(s.as_slice()),
            _ => None,
        })
    }

    /// An array of 32-bit floats.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn f32s(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of 32-bit floats", |v| match v {
            Value::Array(Array::F32(s)) => Some(s.as_slice()),
            _ => None,
        })
    }

    /// An array of integers that fit into 32 bits signed (stored in a type that may hold others too).
    ///
    /// # Errors
    /// If the value is of another type or one doesn't fit.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.integers(key, "an array of integers in -2^31..2^31")
    }

    /// An array of integers that fit into 32 bits unsigned.
    ///
    /// # Errors
    /// If the value is of another type or one doesn't fit.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.integers(key, "an array of integers in 0..2^32")
    }

    /// A text that must be there.
    ///
    /// # Errors
    /// If it is absent or of another type.
    pub fn need_str(&self, key: &str) -> Result<&str> {
        self.need(key, self.str(key)?)
    }

    /// An integer that must be there.
    ///
    /// # Errors
    /// If it is absent or of another type.
    pub fn need_u32(&self, key: &str) -> Result<u32> {
        self.need(key, self.u32(key)?)
    }

    /// A number that must be there.
    ///
    /// # Errors
    /// If it is absent or of another type.
    pub fn need_f64(&self, key: &str) -> Result<f64> {
        self.need(key, self.f64(key)?)
    }

    /// An array of texts that must be there.
    ///
    /// # Errors
    /// If it is absent or of another type.
    pub fn need_strings(&self, key: &str) -> Result<&[String]> {
        self.need(key, self.strings(key)?)
    }

    fn need<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| damaged(&self.path, format!("key `{key}` is missing")))
    }

    fn typed<'a, T: 'a>(
        &'a self,
        key: &str,
        wanted: &str,
        pick: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, QuantError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match pick(value) {
                Some(picked) => Ok(Some(picked)),
                None => Err(damaged(&self.path, format!("key `{key}` is {}, wanted {wanted}", value.describe()))),
            },
        }
    }

    fn integers<T>(&self, key: &str, wanted: &str) -> Result<Option<Vec<T>>>
    where
        T: TryFrom<i32> + TryFrom<u32> + TryFrom<i64> + TryFrom<u64>,
    {
        fn all<S: Copy, T: TryFrom<S>>(values: &[S]) -> Option<Vec<T>> {
            values.iter().map(|v| T::try_from(*v).ok()).collect()
        }
        self.typed(key, wanted, |v| match v {
            Value::Array(Array::I32(s)) => all(s),
            Value::Array(Array::U32(s)) => all(s),
            Value::Array(Array::I64(s)) => all(s),
            Value::Array(Array::U64(s)) => all(s),
            _ => None,
        })
    }
}

impl Value {
    /// What it is, for an error message; texts and arrays are not printed whole.
    fn describe(&self) -> String {
        match self {
            Value::Int(i) => format!("the integer {i}"),
            Value::Float(f) => format!("the float {f}"),
            Value::Bool(b) => format!("the bool {b}"),
            Value::String(s) => format!("a string of {} bytes", s.len()),
            Value::Array(a) => format!("an array of {} {}", a.len(), a.type_name()),
        }
    }
}

impl Array {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Array::I32(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::F64(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::Array(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn type_name(&self) -> &'static str {
        match self {
            Array::I32(_) => "integers",
            Array::U32(_) | Array::U64(_) => "unsigned integers",
            Array::I64(_) => "64-bit integers",
            Array::F32(_) => "32-bit floats",
            Array::F64(_) => "64-bit floats",
            Array::Bool(_) => "bools",
            Array::String(_) => "strings",
            Array::Array(_) => "arrays",
        }
    }
}
