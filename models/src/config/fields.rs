//! Typed reads from a JSON object that name the file and the field whenever they refuse.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// A JSON object under the name of its file, and under a prefix where it is nested in another.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    file: &'a Path,
    prefix: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Wraps the object that `file` holds.
    ///
    /// # Errors
    /// `value` is not an object.
    pub fn new(file: &'a Path, value: &'a Value) -> Result<Self> {
        let object = value.as_object().ok_or_else(|| ModelError::Damaged {
            path: file.to_path_buf(),
            why: format!("holds {}, wanted a JSON object", kind(value)),
        })?;
        Ok(Self { file, prefix: String::new(), object })
    }

    /// The nested object `name`; `None` where it is absent or null.
    ///
    /// # Errors
    /// The field holds something other than an object.
    pub fn nested(&self, name: &str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => {
                Ok(Some(Fields { file: self.file, prefix: format!("{}{name}.", self.prefix), object }))
            }
            Some(other) => Err(self.refuse(name, format!("holds {}, wanted an object", kind(other)))),
        }
    }

    /// The names in the object, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.object.keys().map(String::as_str)
    }

    /// Whether the field is written, even as null.
    pub fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// The field's value; `None` where it is absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|v| !v.is_null())
    }

    /// The error about field `name` of this object.
    pub fn refuse(&self, name: &str, why: impl Into<String>) -> ModelError {
        ModelError::Field { path: self.file.to_path_buf(), field: format!("{}{name}", self.prefix), why: why.into() }
    }

    /// The field as a `T`; `None` where it is absent or null.
    ///
    /// # Errors
    /// The value isn't a `T`.
    pub fn optional<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        T::deserialize(value).map(Some).map_err(|e| self.refuse(name, e.to_string()))
    }

    /// The field as a `T`.
    ///
    /// # Errors
    /// The field is absent or null, or its value isn't a `T`.
    pub fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.optional(name)?.ok_or_else(|| self.refuse(name, "missing"))
    }

    /// A size from 1 to `max`.
    ///
    /// # Errors
    /// The field is missing, not a whole number, or out of range.
    pub fn size(&self, name: &str, max: usize) -> Result<usize> {
        let value = self.get(name).ok_or_else(|| self.refuse(name, "missing"))?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(n),
            _ => Err(self.refuse(name, format!("{}, wanted a whole number from 1 to {max}", brief(value)))),
        }
    }

    /// A size from 1 to `max`, or `default` where the field is absent or null.
    ///
    /// # Errors
    /// The field is not a whole number, or out of range.
    pub fn size_or(&self, name: &str, default: usize, max: usize) -> Result<usize> {
        if self.get(name).is_some() { self.size(name, max) } else { Ok(default) }
    }

    /// A finite number; `None` where the field is absent or null.
    ///
    /// # Errors
    /// The field holds something else.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.refuse(name, format!("{}, wanted a finite number", brief(value)))),
        }
    }

    /// A finite number above zero, or `default` where the field is absent or null.
    ///
    /// # Errors
    /// The field holds something else, or there is neither a field nor a default.
    pub fn positive(&self, name: &str, default: Option<f64>) -> Result<f64> {
        let x = self.number(name)?.or(default).ok_or_else(|| self.refuse(name, "missing"))?;
        if x > 0.0 { Ok(x) } else { Err(self.refuse(name, format!("{x}, wanted a number above 0"))) }
    }

    /// True or false, or `default` where the field is absent or null.
    ///
    /// # Errors
    /// The field holds something else.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    /// Token ids: one number or a list of them; empty where the field is absent, null or -1 (an old way to say none).
    ///
    /// # Errors
    /// An id is not a whole number below `vocab_size`.
    pub fn token_ids(&self, name: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::with_capacity(list.len());
        for item in list {
            match item.as_i64() {
                Some(-1) => {}
                Some(id) if (0..vocab_size as i64).contains(&id) => ids.push(id as u32),
                _ => {
                    let why = format!("{}, wanted a token id below {vocab_size}", brief(item));
                    return Err(self.refuse(name, why));
                }
            }
        }
        Ok(ids)
    }
}

/// What kind of JSON value this is, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The value itself where it is short, its kind where it is not.
fn brief(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(s) if s.len() <= 40 => format!("`{s}`"),
        other => kind(other).to_owned(),
    }
}
