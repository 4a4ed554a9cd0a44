//! Vision Transformers: patches, tokens before them, blocks of attention and feed-forward layers, a norm.
//!
//! ```text
//! image -> Conv (a patch a step) -> + positions -> [first tokens | patches] -> blocks -> norm -> last_hidden_state
//!                                                                                           first token -> embedding
//!                                                                                           classifier  -> logits
//! block: x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x))
//! ```
//! One architecture under three sets of names: ViT and DeiT in Hugging Face's transformers, DINOv2 there, and timm's,
//! which DINOv2's own repository uses too.

use super::builder::{Activation, Builder, Dim, Heads, value};
use super::{Checkpoint, positions};
use crate::Result;
use nibble_quant::onnx::Model;
use nibble_quant::onnx::proto::*;

/// What a checkpoint calls the parts of the model.
struct Names {
    patch: &'static str,
    class: &'static str,
    positions: &'static str,
    registers: &'static [&'static str],
    distillation: &'static str,
    norm: &'static str,
    head: &'static [&'static str],
    epsilon: f64,
    block: Block,
}

/// What it calls those of a block, `{}` being its number.
struct Block {
    prefix: &'static str,
    norms: [&'static str; 2],
    /// Query, key and value; or one name, if they are stored as one.
    qkv: &'static [&'static str],
    out: &'static str,
    scales: [&'static str; 2],
    mlp: [&'static str; 2],
    /// A feed-forward layer with a gate (SwiGLU), where there is one.
    gated: [&'static str; 2],
}

const HF_ATTENTION: &[&str] = &["attention.attention.query", "attention.attention.key", "attention.attention.value"];

/// Every set of names; the first whose block tensors are there is the checkpoint's.
static NAMES: [Names; 3] = [
    Names {
        patch: "embeddings.patch_embeddings.projection",
        class: "embeddings.cls_token",
        positions: "embeddings.position_embeddings",
        registers: &["embeddings.register_tokens"],
        distillation: "embeddings.distillation_token",
        norm: "layernorm",
        head: &["classifier"],
        epsilon: 1e-12,
        block: Block {
            prefix: "encoder.layer.",
            norms: ["layernorm_before", "layernorm_after"],
            qkv: HF_ATTENTION,
            out: "attention.output.dense",
            scales: ["", ""],
            mlp: ["intermediate.dense", "output.dense"],
            gated: ["", ""],
        },
    },
    Names {
        patch: "embeddings.patch_embeddings.projection",
        class: "embeddings.cls_token",
        positions: "embeddings.position_embeddings",
        registers: &["embeddings.register_tokens"],
        distillation: "",
        norm: "layernorm",
        head: &["classifier"],
        epsilon: 1e-6,
        block: Block {
            prefix: "encoder.layer.",
            norms: ["norm1", "norm2"],
            qkv: HF_ATTENTION,
            out: "attention.output.dense",
            scales: ["layer_scale1.lambda1", "layer_scale2.lambda1"],
            mlp: ["mlp.fc1", "mlp.fc2"],
            gated: ["mlp.weights_in", "mlp.weights_out"],
        },
    },
    Names {
        patch: "patch_embed.proj",
        class: "cls_token",
        positions: "pos_embed",
        registers: &["register_tokens", "reg_token"],
        distillation: "dist_token",
        norm: "norm",
        head: &["head"],
        epsilon: 1e-6,
        block: Block {
            prefix: "blocks.",
            norms: ["norm1", "norm2"],
            qkv: &["attn.qkv"],
            out: "attn.proj",
            scales: ["ls1.gamma", "ls2.gamma"],
            mlp: ["mlp.fc1", "mlp.fc2"],
            gated: ["mlp.w12", "mlp.w3"],
        },
    },
];

pub(super) fn build(checkpoint: &Checkpoint, size: Option<usize>) -> Result<Model> {
    let found = NAMES.iter().find_map(|names| {
        let first = format!("{}0.{}.weight", names.block.prefix, names.block.norms[0]);
        checkpoint.prefix_of(&first).map(|prefix| (names, prefix))
    });
    let Some((names, prefix)) = found else {
        return Err(checkpoint.damaged("has patch embeddings, but no block of a Vision Transformer that is known here"));
    };
    let of = |name: &str| format!("{prefix}{name}");
    let patches = checkpoint.shape(&of(&format!("{}.weight", names.patch))).unwrap_or_default();
    let &[hidden, colours, patch, across] = patches.as_slice() else {
        return Err(checkpoint.damaged(format!("patch embeddings of shape {patches:?}, 4 dimensions were wanted")));
    };
    if patch != across || patch == 0 || hidden == 0 {
        return Err(checkpoint.damaged(format!("patches of {patch} x {across} pixels, squares were wanted")));
    }
    let config = checkpoint.config()?;
    let config = config.as_ref();
    let heads = match config {
        Some(fields) => fields.size_or("num_attention_heads", (hidden / 64).max(1), 1 << 12)?,
        // Every published size of the architecture has heads of 64 channels.
        None => (hidden / 64).max(1),
    };
    let epsilon = match config {
        Some(fields) => fields.positive("layer_norm_eps", Some(names.epsilon))? as f32,
        None => names.epsilon as f32,
    };
    let mut net = Vit {
        b: Builder::new(checkpoint),
        names,
        prefix: prefix.clone(),
        sizes: Heads::new(checkpoint, hidden, heads)?,
        epsilon,
        activation: Activation::of(config)?,
    };
    net.build([colours, patch], size)
}

struct Vit<'a> {
    b: Builder<'a>,
    names: &'static Names,
    prefix: String,
    sizes: Heads,
    epsilon: f32,
    activation: Activation,
}

impl Vit<'_> {
    fn of(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn has(&self, name: &str) -> bool {
        !name.is_empty() && self.b.checkpoint.shape(&self.of(name)).is_some()
    }

    fn build(&mut self, [colours, patch]: [usize; 2], size: Option<usize>) -> Result<Model> {
        let hidden = self.sizes.hidden;
        let (first, tokens, grid) = self.tokens(patch, size)?;
        let side = grid * patch;
        let batch = || Dim::Open("batch");
        // Patches, one a column of the picture's grid.
        let conv = self.of(self.names.patch);
        let weight = format!("{conv}.weight");
        self.b.weight(&weight)?;
        let bias = format!("{conv}.bias");
        self.b.vector(&bias, hidden)?;
        let attributes = vec![
            AttributeProto::new_ints("kernel_shape", &[patch as i64; 2]),
            AttributeProto::new_ints("strides", &[patch as i64; 2]),
        ];
        let x = self.b.node("Conv", &conv, &["image", &weight, &bias], attributes);
        let flat = self.b.ints("flat_patches", &[3], &[0, hidden as i64, (grid * grid) as i64]);
        let x = self.b.node("Reshape", "patches/Reshape", &[&x, &flat], Vec::new());
        let x =
            self.b.node("Transpose", "patches/Transpose", &[&x], vec![AttributeProto::new_ints("perm", &[0, 2, 1])]);
        let table = self.b.constant("positions", &[1, grid * grid, hidden], &tokens);
        let x = self.b.node("Add", "patches/Add", &[&x, &table], Vec::new());
        // The tokens before them, once for every picture.
        let count = first.len() / hidden;
        let first = self.b.constant("first_tokens", &[1, count, hidden], &first);
        let ends = vec![AttributeProto::new_int("start", 0), AttributeProto::new_int("end", 1)];
        let pictures = self.b.node("Shape", "batch/Shape", &["image"], ends);
        let rest = self.b.ints("token_shape", &[2], &[count as i64, hidden as i64]);
        let axis = |axis: i64| vec![AttributeProto::new_int("axis", axis)];
        let shape = self.b.node("Concat", "batch/Concat", &[&pictures, &rest], axis(0));
        let first = self.b.node("Expand", "tokens/Expand", &[&first, &shape], Vec::new());
        let mut x = self.b.node("Concat", "tokens/Concat", &[&first, &x], axis(1));
        let mut blocks = 0;
        while self.has(&format!("{}{blocks}.{}.weight", self.names.block.prefix, self.names.block.norms[0])) {
            x = self.block(blocks, &x)?;
            blocks += 1;
        }
        let image =
            value("image", DataType::Float, &[batch(), Dim::Fixed(colours), Dim::Fixed(side), Dim::Fixed(side)]);
        let norm = self.of(self.names.norm);
        let states = self.b.layer_norm_to(&norm, &x, hidden, self.epsilon, "last_hidden_state")?;
        let zero = self.b.ints("first_token", &[], &[0]);
        let embedding = self.b.node_to("Gather", "embedding", &[&states, &zero], "embedding", axis(1));
        let head = self.names.head.iter().find(|h| self.b.checkpoint.shape(&format!("{h}.weight")).is_some());
        let outputs = match head {
            Some(head) => vec![self.classify(head, &states, &embedding, count, grid * grid)?],
            None => vec![
                value(
                    "last_hidden_state",
                    DataType::Float,
                    &[batch(), Dim::Fixed(count + grid * grid), Dim::Fixed(hidden)],
                ),
                value("embedding", DataType::Float, &[batch(), Dim::Fixed(hidden)]),
            ],
        };
        self.b.finish("vit", vec![image], outputs)
    }

    /// The tokens before the patches with their positions added, the positions of the patches, and patches a side.
    fn tokens(&self, patch: usize, size: Option<usize>) -> Result<(Vec<f32>, Vec<f32>, usize)> {
        let (hidden, checkpoint) = (self.sizes.hidden, self.b.checkpoint);
        let (dims, table) = checkpoint.tensor(&self.of(self.names.positions))?;
        let &[1, places, width] = dims.as_slice() else {
            return Err(self.b.damaged(format!("positions of shape {dims:?}, (1, tokens, {hidden}) was wanted")));
        };
        let distilled = self.has(self.names.distillation);
        let extra = 1 + usize::from(distilled);
        let side = places.saturating_sub(extra).isqrt();
        if width != hidden || side == 0 || side * side + extra != places {
            return Err(self.b.damaged(format!("{places} positions of {width} channels aren't {extra} and a square")));
        }
        let mut first = checkpoint.exactly(&self.of(self.names.class), &[1, 1, hidden])?;
        if distilled {
            first.extend(checkpoint.exactly(&self.of(self.names.distillation), &[1, 1, hidden])?);
        }
        first.iter_mut().zip(&table).for_each(|(token, position)| *token += position);
        if let Some(name) = self.names.registers.iter().find(|name| self.has(name)) {
            // Registers have no position.
            let (dims, registers) = checkpoint.tensor(&self.of(name))?;
            if !matches!(dims.as_slice(), [1, _, width] if *width == hidden) {
                return Err(self.b.damaged(format!("tensor `{name}` has shape {dims:?}")));
            }
            first.extend(registers);
        }
        let size = size.unwrap_or(side * patch);
        if size == 0 || !size.is_multiple_of(patch) {
            return Err(self.b.damaged(format!("pictures of {size} pixels aren't whole patches of {patch}")));
        }
        let grid = size / patch;
        Ok((first, positions::resize(&table[extra * hidden..], hidden, side, grid), grid))
    }

    fn block(&mut self, index: usize, x: &str) -> Result<String> {
        let Block { prefix, norms, qkv, out, scales, mlp, gated } = &self.names.block;
        let hidden = self.sizes.hidden;
        let block = self.of(&format!("{prefix}{index}"));
        let of = |name: &str| format!("{block}.{name}");
        let normed = self.b.layer_norm(&of(norms[0]), x, hidden, self.epsilon)?;
        let mut parts = [String::new(), String::new(), String::new()];
        for (i, part) in parts.iter_mut().enumerate() {
            *part = match qkv {
                [all] => {
                    let name = of(&format!("{all}.{}", ["query", "key", "value"][i]));
                    self.b.part(&of(all), &name, &normed, [3 * hidden, i * hidden, hidden], hidden)?
                }
                each => self.b.linear(&of(each[i]), &normed, hidden, hidden)?,
            };
        }
        let [q, k, v] = &parts;
        let mixed = self.b.attention(&of("attention"), [q, k, v], None, self.sizes);
        let y = self.b.linear(&of(out), &mixed, hidden, hidden)?;
        let y = self.scaled(&of(scales[0]), y)?;
        let x = self.b.node("Add", &of("Add"), &[&y, x], Vec::new());
        let normed = self.b.layer_norm(&of(norms[1]), &x, hidden, self.epsilon)?;
        let y = match self.b.checkpoint.shape(&of(&format!("{}.weight", gated[0]))) {
            Some(dims) if !gated[0].is_empty() => {
                let wide = dims.first().copied().unwrap_or(0) / 2;
                let [gate, up] = ["gate", "up"].map(|part| of(&format!("{}.{part}", gated[0])));
                let gate = self.b.part(&of(gated[0]), &gate, &normed, [2 * wide, 0, wide], hidden)?;
                let up = self.b.part(&of(gated[0]), &up, &normed, [2 * wide, wide, wide], hidden)?;
                let gate = self.b.activation(&of("mlp/act"), &gate, Activation::Silu);
                let y = self.b.node("Mul", &of("mlp/Mul"), &[&gate, &up], Vec::new());
                self.b.linear(&of(gated[1]), &y, hidden, wide)?
            }
            _ => {
                let dims = self.b.checkpoint.shape(&of(&format!("{}.weight", mlp[0]))).unwrap_or_default();
                let wide = dims.first().copied().unwrap_or(0);
                let y = self.b.linear(&of(mlp[0]), &normed, wide, hidden)?;
                let y = self.b.activation(&of("mlp/act"), &y, self.activation);
                self.b.linear(&of(mlp[1]), &y, hidden, wide)?
            }
        };
        let y = self.scaled(&of(scales[1]), y)?;
        Ok(self.b.node("Add", &of("Add_1"), &[&y, &x], Vec::new()))
    }

    /// LayerScale, where there is one.
    fn scaled(&mut self, name: &str, x: String) -> Result<String> {
        if self.b.checkpoint.shape(name).is_none() {
            return Ok(x);
        }
        self.b.vector(name, self.sizes.hidden)?;
        Ok(self.b.node("Mul", &format!("{name}/Mul"), &[&x, name], Vec::new()))
    }

    /// The classifier over the first token, and over the mean of the patches too where it is twice as wide (DINOv2).
    fn classify(
        &mut self,
        head: &str,
        states: &str,
        embedding: &str,
        before: usize,
        patches: usize,
    ) -> Result<ValueInfoProto> {
        let hidden = self.sizes.hidden;
        let dims = self.b.checkpoint.shape(&format!("{head}.weight")).unwrap_or_default();
        let &[classes, width] = dims.as_slice() else {
            return Err(self.b.damaged(format!("classifier of shape {dims:?}, a matrix was wanted")));
        };
        let mut x = embedding.to_owned();
        if width == 2 * hidden {
            let start = self.b.ints("patches_start", &[1], &[before as i64]);
            let end = self.b.ints("patches_end", &[1], &[(before + patches) as i64]);
            let axis = self.b.ints("patches_axis", &[1], &[1]);
            let all = self.b.node("Slice", "head/Slice", &[states, &start, &end, &axis], Vec::new());
            let attributes = vec![AttributeProto::new_ints("axes", &[1]), AttributeProto::new_int("keepdims", 0)];
            let mean = self.b.node("ReduceMean", "head/ReduceMean", &[&all], attributes);
            let last = vec![AttributeProto::new_int("axis", 1)];
            x = self.b.node("Concat", "head/Concat", &[&x, &mean], last);
        } else if width != hidden {
            return Err(self.b.damaged(format!("classifier over {width} channels, the model has {hidden}")));
        }
        let y = self.b.linear(head, &x, classes, width)?;
        self.b.node_to("Identity", "logits", &[&y], "logits", Vec::new());
        Ok(value("logits", DataType::Float, &[Dim::Open("batch"), Dim::Fixed(classes)]))
    }
}
