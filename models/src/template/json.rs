//! `tojson` as transformers defines it: Python's `json.dumps` without escaping what isn't ASCII.

use std::io::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Most values and bytes of text that are written together.
const MAX_SIZE: usize = 32 << 20;
/// Deepest nesting that is written, about a hundred times that of any real tool's schema.
const MAX_DEPTH: usize = 500;

/// The filter, with Python's keyword arguments.
pub(super) fn tojson(value: Value, indent: Option<Value>, args: Kwargs) -> Result<String, Error> {
    // What shares its parts is small in memory and may be endless when written out: it is counted before it is copied.
    measure(&value, &mut { MAX_SIZE }, MAX_DEPTH)?;
    let mut value = serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => args.get::<Option<Value>>("indent")?,
    };
    let separators = args.get::<Option<Vec<String>>>("separators")?;
    let sort = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    args.assert_all_used()?;
    if ascii {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson with ensure_ascii isn't supported"));
    }
    if sort {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    let done = match indent.filter(|i| !i.is_none() && !i.is_undefined()) {
        Some(indent) => {
            let indent = match indent.as_str() {
                Some(text) => text.to_owned(),
                None => " ".repeat(indent.as_usize().unwrap_or(0).min(64)),
            };
            value.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => {
            let (item, key) = match separators.as_deref() {
                None => (", ".to_owned(), ": ".to_owned()),
                Some([item, key]) => (item.clone(), key.clone()),
                Some(other) => {
                    let why = format!("tojson with {} separators, wanted 2", other.len());
                    return Err(Error::new(ErrorKind::InvalidOperation, why));
                }
            };
            value.serialize(&mut Serializer::with_formatter(&mut out, Python { item, key }))
        }
    };
    done.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// Takes a value's size from what is `left`.
fn measure(value: &Value, left: &mut usize, depth: usize) -> Result<(), Error> {
    let refuse = || Error::new(ErrorKind::InvalidOperation, "tojson of something too large or nested too deep");
    let size = 1 + value.as_str().map_or(0, str::len);
    *left = left.checked_sub(size).ok_or_else(refuse)?;
    let depth = depth.checked_sub(1).ok_or_else(refuse)?;
    match value.kind() {
        ValueKind::Map => {
            for key in value.try_iter()? {
                measure(&value.get_item(&key)?, left, depth)?;
                measure(&key, left, depth)?;
            }
        }
        ValueKind::Seq | ValueKind::Iterable => {
            for item in value.try_iter()? {
                measure(&item, left, depth)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// JSON on one line with Python's separators.
struct Python {
    item: String,
    key: String,
}

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}
