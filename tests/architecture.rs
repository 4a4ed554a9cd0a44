//! The house checks itself: floors between crates, direction inside them, and what must not lie about.
//!
//! Each law is a function from the tree to its breaches; `every_law_can_fail` gives each one a small tree that breaks it.

mod laws;
mod tree;

use laws::LAWS;
use tree::Tree;

#[test]
fn the_repository_keeps_every_law() {
    let tree = Tree::of_repository(crate::assets::repository());
    assert!(tree.texts.contains_key("Cargo.toml"), "the tree was read");
    let breaches: Vec<String> =
        LAWS.iter().flat_map(|law| (law.breaches)(&tree).into_iter().map(|b| format!("{}: {b}", law.name))).collect();
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

#[test]
fn every_law_can_fail() {
    let long = "x".repeat(laws::LARGEST_FILE as usize + 1);
    let host = format!("see https://{}/simple", ["pypi", "org"].join("."));
    let home = format!("cd /{}/someone/nibble", "home");
    // Law, a tree that keeps it, a tree that breaks it, what the breach must name.
    type Sample<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [(&'a str, &'a str)], &'a str);
    let samples: &[Sample] = &[
        (
            "floors",
            &[("quant/Cargo.toml", "[dependencies]\nnibble-kernels.workspace = true\nserde = \"1\"\n")],
            &[("kernels/Cargo.toml", "[dev-dependencies]\nnibble-quant = { path = \"../quant\" }\n")],
            "nibble-quant",
        ),
        (
            "floors",
            &[("cli/Cargo.toml", "[dependencies]\nanyhow.workspace = true\n")],
            &[("models/Cargo.toml", "[dependencies.anyhow]\nversion = \"1\"\n")],
            "anyhow",
        ),
        (
            "floors",
            &[("models/Cargo.toml", "[target.'cfg(unix)'.dependencies]\ncandle-core.workspace = true\n")],
            &[("quant/Cargo.toml", "[target.'cfg(unix)'.dependencies]\ncandle-core.workspace = true\n")],
            "candle-core",
        ),
        (
            "unsafe",
            &[("quant/src/format/mmap.rs", "unsafe { map() }"), ("cli/src/main.rs", "// unsafe\nlet s = \"unsafe\";")],
            &[("quant/src/algo.rs", "fn f() {\n    unsafe { g() }\n}")],
            "quant/src/algo.rs:2",
        ),
        (
            "candle",
            &[("models/src/qat.rs", "use candle_core::Tensor;"), ("quant/src/a.rs", "// candle_core has it")],
            &[("quant/src/a.rs", "use candle_core::Tensor;")],
            "quant/src/a.rs:1",
        ),
        ("hosts", &[("README.md", "uses crates and wheels")], &[("docs/a.md", &host)], "docs/a.md:1"),
        ("hosts", &[("README.md", "the work/home folder")], &[("scripts/a.sh", &home)], "scripts/a.sh:1"),
        (
            "links",
            &[("README.md", "[a](docs/a.md#part) [b](https://b)"), ("docs/a.md", "[up](../README.md)")],
            &[("README.md", "[a](docs/gone.md)")],
            "docs/gone.md",
        ),
        (
            "links",
            &[("README.md", "[a](docs/a.md)"), ("docs/a.md", "[b](b.md)"), ("docs/b.md", "")],
            &[("README.md", "[a](docs/a.md)"), ("docs/a.md", ""), ("docs/b.md", "")],
            "docs/b.md",
        ),
        (
            "direction",
            &[("kernels/src/gemm/x86.rs", "use crate::simd::dot;"), ("kernels/src/simd.rs", "use crate::Isa;")],
            &[("kernels/src/simd/avx2.rs", "use crate::{isa, gemm::Tile};"), ("kernels/src/gemm.rs", "")],
            "kernels/src/simd/avx2.rs",
        ),
        (
            "cycles",
            &[
                ("quant/src/spec.rs", "use crate::QuantError;"),
                ("quant/src/error.rs", "#[cfg(test)]\nmod tests { use crate::spec; }"),
                ("quant/src/lib.rs", "pub mod error;\npub mod spec;\npub use error::QuantError;"),
            ],
            &[
                ("quant/src/spec.rs", "use crate::QuantError;"),
                ("quant/src/error.rs", "use crate::spec::QuantSpec;"),
                ("quant/src/lib.rs", "pub mod error;\npub mod spec;\npub use error::{QuantError, Other};"),
            ],
            "error -> spec -> error",
        ),
        ("unfinished", &[("cli/src/a.rs", "// todo!()")], &[("cli/src/a.rs", "fn f() { todo!() }")], "cli/src/a.rs:1"),
        ("sizes", &[("a.bin", "x")], &[("weights.bin", &long)], "weights.bin"),
    ];
    for (name, good, bad, named) in samples {
        let law = LAWS.iter().find(|law| law.name == *name).expect("a law of that name");
        assert_eq!((law.breaches)(&Tree::of(good)), Vec::<String>::new(), "{name} is kept");
        let breaches = (law.breaches)(&Tree::of(bad));
        assert!(breaches.iter().any(|b| b.contains(named)), "{name} names {named}: {breaches:?}");
    }
    for law in LAWS {
        assert!(samples.iter().any(|(name, ..)| *name == law.name), "law {} has a sample that breaks it", law.name);
    }
}
