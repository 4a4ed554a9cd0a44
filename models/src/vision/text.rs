//! Lines of texts as inputs of an encoder: token ids, the mask over them, and segments.

use super::data::Sample;
use crate::graph::{Input, Tensor, Values};
use crate::{ModelError, Result, tokenizer};
use std::path::Path;

/// What makes tokens of lines.
pub struct Texts {
    tokenizer: tokenizers::Tokenizer,
    /// Tokens of a line that are used, the first and last special ones among them.
    longest: usize,
}

/// What an encoder takes; by convention its inputs are called so.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Ids,
    Mask,
    Segments,
    Positions,
}

fn role(input: &Input, file: &Path) -> Result<Role> {
    let name = input.name.to_lowercase();
    let found = [
        ("mask", Role::Mask),
        ("type", Role::Segments),
        ("segment", Role::Segments),
        ("position", Role::Positions),
        ("ids", Role::Ids),
        ("tokens", Role::Ids),
    ];
    let role = found.iter().find(|(part, _)| name.contains(part)).map(|&(_, role)| role);
    role.filter(|_| !input.float && input.dims.len() == 2).ok_or_else(|| ModelError::Damaged {
        path: file.to_owned(),
        why: format!("a text for the input `{}`, which isn't (batch, tokens) of ids, mask or segments", input.name),
    })
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(ModelError::io(file))
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

impl Texts {
    /// Reads a `tokenizer.json`; `text` is the file that needs one.
    ///
    /// # Errors
    /// There is none, or it is damaged; fewer than 3 tokens, which no line has between its special ones.
    pub fn open(tokenizer: Option<&Path>, text: &Path, longest: usize) -> Result<Texts> {
        let Some(path) = tokenizer else {
            let why = "a text needs the model's tokenizer.json; name it with --tokenizer".to_owned();
            return Err(ModelError::Damaged { path: text.to_owned(), why });
        };
        if longest < 3 {
            return Err(ModelError::Setting { what: "tokens".into(), why: format!("{longest}; 3 at least") });
        }
        let bytes = std::fs::read(path).map_err(ModelError::io(path))?;
        Ok(Texts { tokenizer: tokenizer::plain(path, &bytes)?, longest })
    }

    /// How many lines there are that aren't blank.
    ///
    /// # Errors
    /// A file that can't be read or isn't UTF-8.
    pub fn count(&self, file: &Path) -> Result<usize> {
        Ok(lines(&read(file)?).count())
    }

    /// A sample for every line that isn't blank, until `each` returns false; what it returned last.
    ///
    /// # Errors
    /// A file that isn't UTF-8, a line that can't be tokenized, or inputs that take no tokens; what `each` returns.
    pub fn samples(&self, file: &Path, inputs: &[Input], each: &mut dyn FnMut(Sample) -> Result<bool>) -> Result<bool> {
        let roles = inputs.iter().map(|input| role(input, file)).collect::<Result<Vec<Role>>>()?;
        for line in lines(&read(file)?) {
            if !each(self.sample(line, file, inputs, &roles)?)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn sample(&self, line: &str, file: &Path, inputs: &[Input], roles: &[Role]) -> Result<Sample> {
        let damaged = |why: String| ModelError::Damaged { path: file.to_owned(), why };
        let encoded =
            self.tokenizer.encode_fast(line, true).map_err(|e| damaged(format!("can't be tokenized: {e}")))?;
        let mut ids: Vec<i32> = encoded.get_ids().iter().map(|&id| id as i32).collect();
        if ids.len() > self.longest {
            // The token that ends a text stays its end.
            let last = ids[ids.len() - 1];
            ids.truncate(self.longest - 1);
            ids.push(last);
        }
        let mut sample = Sample::new();
        for (input, role) in inputs.iter().zip(roles) {
            let length = input.dims.get(1).copied().flatten().unwrap_or(ids.len());
            let values: Vec<i32> = (0..length)
                .map(|at| match (role, ids.get(at)) {
                    (Role::Ids, id) => id.copied().unwrap_or(0),
                    (Role::Mask, id) => i32::from(id.is_some()),
                    (Role::Segments, _) => 0,
                    (Role::Positions, _) => at as i32,
                })
                .collect();
            sample.push((input.name.clone(), Tensor { dims: vec![1, length], values: Values::Int(values) }));
        }
        Ok(sample)
    }
}
