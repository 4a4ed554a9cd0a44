//! Laws of text: tokenizers, chat templates, sampling, stop strings.

mod sample;
mod stop;
mod template;
mod tokenizer;
