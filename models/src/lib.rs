//! Floor 2: model families, checkpoints, tokenizers, generation and evaluation.
