//! `tojson` as transformers defines it: Python's `json.dumps` without escaping what isn't ASCII.

use std::io::{self, Write};

use minijinja::value::{Kwargs, Serde};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// The filter, with Python's keyword arguments.
pub(super) fn tojson(value: Serde<serde_json::Value>, indent: Option<Value>, args: Kwargs) -> Result<String, Error> {
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
    let mut value = value.0;
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
