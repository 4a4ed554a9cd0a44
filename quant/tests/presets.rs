//! Presets and recipes: names, costs, and who decides.

use nibble_quant::presets::{self, DEFAULT, PRESETS};
use nibble_quant::recipe::Action;
use nibble_quant::{Keep, Recipe, Role};

#[test]
fn every_preset_is_valid_and_has_its_own_name_and_a_known_algorithm() {
    for (i, preset) in PRESETS.iter().enumerate() {
        preset.scheme.weight.validate().unwrap();
        nibble_quant::algo::algorithm(preset.algorithm).unwrap();
        assert!(PRESETS[..i].iter().all(|p| p.name != preset.name), "{} twice", preset.name);
        assert!(!preset.summary.is_empty());
        assert_eq!(presets::by_name(preset.name).unwrap(), preset);
        let bits = preset.scheme.weight.bits();
        assert!(preset.name.starts_with(&format!("int{bits}")) || preset.name.starts_with("nf4") && bits == 4);
    }
}

#[test]
fn the_default_costs_at_most_4_3_bits() {
    for shape in [[576, 576], [1536, 576], [576, 1536], [2048, 2048]] {
        let bits = presets::by_name(DEFAULT).unwrap().scheme.weight.bits_per_weight(shape);
        assert!((4.0..=4.3).contains(&bits), "{bits} for {shape:?}");
    }
    assert_eq!(presets::by_name("default").unwrap().name, DEFAULT);
}

#[test]
fn an_unknown_scheme_is_told_what_it_may_have_meant() {
    let near = presets::by_name("int4-g23-dq").unwrap_err().to_string();
    assert!(near.contains("`int4-g23-dq`") && near.contains("did you mean `int4-g32-dq`?"), "{near}");
    let far = presets::by_name("completely different").unwrap_err().to_string();
    assert!(PRESETS.iter().all(|p| far.contains(p.name)), "{far}");
}

#[test]
fn roles_follow_names_and_rank() {
    let cases: [(&str, &[usize], Role); 16] = [
        ("model.layers.0.self_attn.q_proj.weight", &[576, 576], Role::Linear),
        ("model.layers.0.mlp.gate_proj.weight", &[1536, 576], Role::Linear),
        ("model.layers.0.mlp.gate.weight", &[128, 2048], Role::Router),
        ("model.layers.0.block_sparse_moe.gate.weight", &[8, 4096], Role::Router),
        ("model.layers.0.mlp.shared_expert_gate.weight", &[1, 2048], Role::Vector),
        ("blk.0.ffn_gate_inp.weight", &[8, 4096], Role::Router),
        ("model.embed_tokens.weight", &[49152, 576], Role::Embedding),
        ("token_embd.weight", &[49152, 576], Role::Embedding),
        ("transformer.wte.weight", &[50257, 768], Role::Embedding),
        ("lm_head.weight", &[49152, 576], Role::LmHead),
        ("output.weight", &[49152, 576], Role::LmHead),
        ("encoder.layer.0.attention.output.dense.weight", &[384, 384], Role::Linear),
        ("model.norm.weight", &[576], Role::Norm),
        ("model.layers.0.self_attn.q_proj.bias", &[896], Role::Vector),
        ("blk.0.attn_norm.weight", &[576], Role::Norm),
        ("patch_embed.proj.weight", &[384, 3, 14, 14], Role::Linear),
    ];
    for (name, shape, role) in cases {
        assert_eq!(Role::of(name, shape), role, "{name}");
    }
}

fn scheme_of(recipe: &Recipe, name: &str, shape: &[usize]) -> String {
    match recipe.decide(name, shape).unwrap().action {
        Action::Quantize { name, algorithm, .. } => format!("{name}:{algorithm}"),
        Action::Keep(keep) => format!("keep {keep:?}"),
    }
}

#[test]
fn the_standard_recipe_quantizes_matrices_and_keeps_the_rest() {
    let recipe = Recipe::new("int4-g64").unwrap();
    let of = |name: &str, shape: &[usize]| scheme_of(&recipe, name, shape);
    assert_eq!(of("model.layers.0.mlp.up_proj.weight", &[1536, 576]), "int4-g64:search");
    assert_eq!(of("model.embed_tokens.weight", &[49152, 576]), "int8-g32:search");
    assert_eq!(of("lm_head.weight", &[49152, 576]), "int8-g32:search");
    assert_eq!(of("model.layers.0.mlp.gate.weight", &[8, 576]), "keep Original");
    assert_eq!(of("model.norm.weight", &[576]), "keep Original");
    let why = recipe.decide("lm_head.weight", &[49152, 576]).unwrap().why;
    assert!(why.contains("rule 5 (role lm-head)") && why.contains("logits"), "{why}");
}

#[test]
fn the_first_rule_that_matches_decides() {
    let flags = ["*.0.mlp.?p_proj.weight=int8-channel:rtn".into(), "*mlp*=keep:bf16".into()];
    let recipe = Recipe::from_flags("default", &flags).unwrap();
    let of = |name: &str| scheme_of(&recipe, name, &[64, 64]);
    assert_eq!(of("model.layers.0.mlp.up_proj.weight"), "int8-channel:rtn");
    assert_eq!(of("model.layers.1.mlp.up_proj.weight"), format!("keep {:?}", Keep::Bf16));
    assert_eq!(of("model.layers.1.self_attn.q_proj.weight"), format!("{DEFAULT}:search"));
}

#[test]
fn recipes_survive_toml() {
    let mut recipe = Recipe::from_flags("nf4-dq", &["*.down_proj.weight=mine".into()])
        .err()
        .map_or_else(|| panic!("an unknown scheme must be refused"), |_| Recipe::new("nf4-dq").unwrap());
    let scheme = presets::by_name("int4-g32-dq256").unwrap().scheme.clone();
    recipe.schemes.insert("mine".into(), scheme);
    recipe.rules[5].scheme = Some("mine".into());
    let text = recipe.to_toml().unwrap();
    assert_eq!(Recipe::from_toml("recipe.toml", &text).unwrap(), recipe, "{text}");
}

#[test]
fn contradictory_recipes_are_refused() {
    let cases = [
        ("[[rule]]\nscheme = \"int4-g23\"", "did you mean"),
        ("[[rule]]\nscheme = \"int4-g32\"\nkeep = \"f16\"", "both `scheme` and `keep`"),
        ("[[rule]]\nrole = \"linear\"", "neither `scheme` nor `keep`"),
        ("[[rule]]\nkeep = \"f16\"\nalgorithm = \"rtn\"", "for a tensor that is kept"),
        ("[[rule]]\nscheme = \"int4-g32\"\nalgorithm = \"rnt\"", "did you mean `rtn`?"),
        ("[[rule]]\nshceme = \"int4-g32\"", "unknown field"),
    ];
    for (text, why) in cases {
        let error = Recipe::from_toml("recipe.toml", text).unwrap_err().to_string();
        assert!(error.contains(why), "{error} should say: {why}");
    }
    let recipe = Recipe::from_flags("default", &["*.dwon_proj.weight=int8-g32".into()]).unwrap();
    let tensors: [(&str, &[usize]); 1] = [("model.layers.0.mlp.down_proj.weight", &[64, 64])];
    let error = recipe.plan(tensors.iter().copied()).unwrap_err().to_string();
    assert!(error.contains("`*.dwon_proj.weight`") && error.contains("no tensor has such a name"), "{error}");
}

#[test]
fn every_preset_packs_for_kernels() {
    let x: Vec<f32> = (0..5 * 96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 1e-3).collect();
    for preset in PRESETS {
        let spec = &preset.scheme.weight;
        let input = nibble_quant::AlgoInput {
            name: "w",
            weight: &x,
            shape: [5, 96],
            spec,
            importance: None,
            calibrated: None,
            seed: 0,
        };
        let q = (nibble_quant::algo::algorithm(preset.algorithm).unwrap().run)(&input).unwrap();
        q.pack().unwrap_or_else(|e| panic!("{}: {e}", preset.name));
    }
}
