//! Tensors by what they are for: what reports and tables are ordered by.

/// A tensor's class: its name without the layer's number, the common front and the `weight` at its end.
///
/// `model.layers.7.self_attn.q_proj.weight` is of class `self_attn.q_proj`.
pub fn class(name: &str) -> String {
    let words: Vec<&str> = name.split('.').filter(|word| *word != "weight").collect();
    let after_layer = words.iter().rposition(|word| word.bytes().all(|b| b.is_ascii_digit()));
    match after_layer {
        Some(at) => words[at + 1..].join("."),
        None => words.strip_prefix(&["model"]).unwrap_or(&words).join("."),
    }
}

/// Items of one key together, keys in the order in which they first appear.
pub fn group<'a, T, K: PartialEq>(items: &'a [T], key: impl Fn(&'a T) -> K) -> Vec<(K, Vec<&'a T>)> {
    let mut groups: Vec<(K, Vec<&T>)> = Vec::new();
    for item in items {
        let key = key(item);
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, members)) => members.push(item),
            None => groups.push((key, vec![item])),
        }
    }
    groups
}

/// Whether a tensor is a linear layer of the decoder: a matrix of a numbered layer. The embedding and the output head
/// are counted apart, as in every comparison of bits per weight.
pub fn is_linear(name: &str, shape: &[usize]) -> bool {
    let in_layer = name.split('.').any(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()));
    in_layer && shape.len() >= 2 && name.ends_with(".weight")
}

/// Bits that a sum of bytes spends on each of so many weights; 0 where there are none.
pub fn bits_per_weight(bytes: u64, weights: u64) -> f64 {
    if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_no_layer_numbers() {
        for (name, wanted) in [
            ("model.layers.7.self_attn.q_proj.weight", "self_attn.q_proj"),
            ("model.embed_tokens.weight", "embed_tokens"),
            ("lm_head.weight", "lm_head"),
            ("blk.0.attn_q.weight", "attn_q"),
            ("model.layers.11.self_attn.q_proj.bias", "self_attn.q_proj.bias"),
            ("weird", "weird"),
        ] {
            assert_eq!(class(name), wanted);
        }
    }

    #[test]
    fn linears_are_matrices_of_layers() {
        assert!(is_linear("model.layers.0.mlp.up_proj.weight", &[8, 4]));
        assert!(is_linear("blk.3.ffn_down.weight", &[8, 4]));
        assert!(!is_linear("model.embed_tokens.weight", &[8, 4]));
        assert!(!is_linear("lm_head.weight", &[8, 4]));
        assert!(!is_linear("model.layers.0.input_layernorm.weight", &[8]));
    }
}
