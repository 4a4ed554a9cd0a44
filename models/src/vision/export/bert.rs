//! BERT: embeddings of words, positions and segments, blocks with their norms after the sums.
//!
//! ```text
//! input_ids, token_type_ids -> sum of embeddings -> norm -> blocks -> last_hidden_state
//! attention_mask (batch, tokens) of 1 and 0 -> 0 and -10000 on the scores
//! block: norm1(x + attention(x)), then norm2(x + mlp(x))
//! ```

use super::Checkpoint;
use super::builder::{Activation, Builder, Dim, Heads, value};
use crate::Result;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;

const WORDS: &str = "embeddings.word_embeddings.weight";

pub(super) fn build(checkpoint: &Checkpoint) -> Result<Model> {
    let prefix = checkpoint.prefix_of(WORDS).unwrap_or_default();
    let of = |name: &str| format!("{prefix}{name}");
    let words = checkpoint.shape(&of(WORDS)).unwrap_or_default();
    let &[_, hidden] = words.as_slice() else {
        return Err(checkpoint.damaged(format!("word embeddings of shape {words:?}, a matrix was wanted")));
    };
    let Some(config) = checkpoint.config()? else {
        return Err(checkpoint.damaged("no config.json beside it, which says how many attention heads there are"));
    };
    if let Some(kind) = config.optional::<String>("position_embedding_type")?.filter(|k| k != "absolute") {
        return Err(config.refuse("position_embedding_type", format!("`{kind}`; absolute positions are exported")));
    }
    let sizes = Heads::new(checkpoint, hidden, config.size("num_attention_heads", 1 << 12)?)?;
    let epsilon = config.positive("layer_norm_eps", Some(1e-12))? as f32;
    let activation = Activation::of(Some(&config))?;
    let mut b = Builder::new(checkpoint);
    let none = Vec::new;

    // Embeddings.
    let (words, types, places) =
        (of(WORDS), of("embeddings.token_type_embeddings.weight"), of("embeddings.position_embeddings.weight"));
    b.weight(&words)?;
    b.weight(&types)?;
    let positions = b.weight(&places)?;
    let &[longest, width] = positions.as_slice() else {
        return Err(b.damaged(format!("positions of shape {positions:?}, a matrix was wanted")));
    };
    if width != hidden {
        return Err(b.damaged(format!("positions of {width} channels, words have {hidden}")));
    }
    let x = b.node("Gather", "embeddings/words", &[&words, "input_ids"], none());
    let segments = b.node("Gather", "embeddings/segments", &[&types, "token_type_ids"], none());
    let axis = b.ints("first_axis", &[1], &[0]);
    let from = vec![AttributeProto::new_int("start", 1), AttributeProto::new_int("end", 2)];
    let tokens = b.node("Shape", "embeddings/Shape", &["input_ids"], from);
    let own = b.node("Slice", "embeddings/positions", &[&places, &axis, &tokens, &axis], none());
    let x = b.node("Add", "embeddings/Add", &[&x, &segments], none());
    let x = b.node("Add", "embeddings/Add_1", &[&x, &own], none());
    let mut x = b.layer_norm(&of("embeddings.LayerNorm"), &x, hidden, epsilon)?;

    // (batch, tokens) -> (batch, 1, 1, tokens)
    let axes = b.ints("mask_axes", &[2], &[1, 2]);
    let (one, far) = (b.constant("one", &[], &[1.0]), b.constant("masked", &[], &[-10_000.0]));
    let float = vec![AttributeProto::new_int("to", DataType::Float as i64)];
    let mask = b.node("Cast", "mask/Cast", &["attention_mask"], float);
    let mask = b.node("Unsqueeze", "mask/Unsqueeze", &[&mask, &axes], none());
    let mask = b.node("Sub", "mask/Sub", &[&one, &mask], none());
    let mask = b.node("Mul", "mask/Mul", &[&mask, &far], none());

    let mut blocks = 0;
    loop {
        let block = of(&format!("encoder.layer.{blocks}"));
        let Some(dims) = checkpoint.shape(&format!("{block}.intermediate.dense.weight")) else { break };
        let wide = dims.first().copied().unwrap_or(0);
        let of = |name: &str| format!("{block}.{name}");
        let mut parts = [String::new(), String::new(), String::new()];
        for (part, name) in parts.iter_mut().zip(["query", "key", "value"]) {
            *part = b.linear(&of(&format!("attention.self.{name}")), &x, hidden, hidden)?;
        }
        let [q, k, v] = &parts;
        let mixed = b.attention(&of("attention.self"), [q, k, v], Some(&mask), sizes);
        let y = b.linear(&of("attention.output.dense"), &mixed, hidden, hidden)?;
        let y = b.node("Add", &of("attention.output.Add"), &[&y, &x], none());
        x = b.layer_norm(&of("attention.output.LayerNorm"), &y, hidden, epsilon)?;
        let y = b.linear(&of("intermediate.dense"), &x, wide, hidden)?;
        let y = b.activation(&of("intermediate.act"), &y, activation);
        let y = b.linear(&of("output.dense"), &y, hidden, wide)?;
        let y = b.node("Add", &of("output.Add"), &[&y, &x], none());
        blocks += 1;
        let last = checkpoint.shape(&format!("{prefix}encoder.layer.{blocks}.intermediate.dense.weight")).is_none();
        let norm = of("output.LayerNorm");
        x = match last {
            true => b.layer_norm_to(&norm, &y, hidden, epsilon, "last_hidden_state")?,
            false => b.layer_norm(&norm, &y, hidden, epsilon)?,
        };
    }
    if blocks == 0 {
        return Err(b.damaged(format!("no tensor `{prefix}encoder.layer.0.intermediate.dense.weight`")));
    }
    let dims = || [Dim::Open("batch"), Dim::Open("tokens")];
    let inputs = ["input_ids", "attention_mask", "token_type_ids"].map(|name| value(name, DataType::Int64, &dims()));
    let [batch, tokens] = dims();
    let states = value("last_hidden_state", DataType::Float, &[batch, tokens, Dim::Fixed(hidden)]);
    let mut model = b.finish("bert", inputs.to_vec(), vec![states])?;
    // So that a reader knows how long a text may be.
    let longest = StringStringEntryProto { key: Some("max_tokens".into()), value: Some(longest.to_string()) };
    model.proto.metadata_props.push(longest);
    Ok(model)
}
