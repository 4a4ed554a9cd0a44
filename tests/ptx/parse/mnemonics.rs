//! What the words of a mnemonic mean.

use super::{Binary, Compare, Op, Refusal, Space, Type, Unary};

fn type_of(word: &str) -> Option<Type> {
    Some(match word {
        "u8" | "b8" => Type::U(1),
        "u16" | "b16" => Type::U(2),
        "u32" | "b32" => Type::U(4),
        "u64" | "b64" => Type::U(8),
        "s8" => Type::S(1),
        "s16" => Type::S(2),
        "s32" => Type::S(4),
        "s64" => Type::S(8),
        "f32" => Type::F32,
        "f16" => Type::F16,
        "f16x2" => Type::F16x2,
        "pred" => Type::Predicate,
        _ => return None,
    })
}

fn space_of(word: &str) -> Option<Space> {
    match word {
        "param" => Some(Space::Param),
        "global" => Some(Space::Global),
        "shared" => Some(Space::Shared),
        _ => None,
    }
}

/// A mnemonic's meaning, and how many of its operands are written.
pub(super) fn operation(words: &[&str]) -> Result<(Op, usize), Refusal> {
    use Binary as B;
    use Unary as U;
    let last = words.last().copied().unwrap_or("");
    let ty = || type_of(last).ok_or_else(|| format!("type {last}"));
    let unary = |u| Ok((Op::Unary(u, ty()?), 1));
    let binary = |b| Ok((Op::Binary(b, ty()?), 1));
    match words {
        ["mov", _] => unary(U::Mov),
        ["not", _] => unary(U::Not),
        ["neg", "f32" | "s32"] => unary(U::Neg),
        ["sqrt", "rn", "f32"] => unary(U::Sqrt),
        ["rcp", "rn", "f32"] => unary(U::Reciprocal),
        ["ex2", "approx", "f32"] => unary(U::Exp2),
        ["add", _] | ["add", "rn", "f32"] => binary(B::Add),
        ["sub", _] | ["sub", "rn", "f32" | "f16x2"] => binary(B::Sub),
        ["mul", "f32"] | ["mul", "rn", "f32"] | ["mul", "lo", _] => binary(B::Mul),
        ["mul", "wide", _] => binary(B::MulWide),
        ["mul", "hi", "u32"] => binary(B::MulHi),
        ["div", "rn", "f32"] | ["div", "u32" | "u64"] => binary(B::Div),
        ["rem", "u32" | "u64"] => binary(B::Rem),
        ["min", _] => binary(B::Min),
        ["max", _] => binary(B::Max),
        ["and", _] => binary(B::And),
        ["or", _] => binary(B::Or),
        ["xor", _] => binary(B::Xor),
        ["shl", _] => binary(B::Shl),
        ["shr", _] => binary(B::Shr),
        ["mad", "lo", _] => Ok((Op::Mad(ty()?), 1)),
        ["fma", "rn", "f32" | "f16x2"] => Ok((Op::Fma(ty()?), 1)),
        ["lop3", "b32"] => Ok((Op::Lop3, 1)),
        ["prmt", "b32"] => Ok((Op::Prmt, 1)),
        ["bfi", "b32"] => Ok((Op::Bfi, 1)),
        ["selp", _] => Ok((Op::Select(ty()?), 1)),
        ["setp", compare, _] => {
            let compare = match *compare {
                "eq" => Compare::Eq,
                "ne" => Compare::Ne,
                "lt" => Compare::Lt,
                "le" => Compare::Le,
                "gt" => Compare::Gt,
                "ge" => Compare::Ge,
                "ltu" => Compare::LtOrNan,
                "leu" => Compare::LeOrNan,
                "gtu" => Compare::GtOrNan,
                "geu" => Compare::GeOrNan,
                "num" if last == "f32" => Compare::Numbers,
                other => return Err(format!("comparison {other}")),
            };
            Ok((Op::Compare(compare, ty()?), 1))
        }
        ["cvt", "rn", "f16x2", "f32"] => Ok((Op::PackHalves, 1)),
        ["cvt", middle @ .., to, from] => {
            let (Some(to), Some(from)) = (type_of(to), type_of(from)) else { return Err("types".into()) };
            let floats = |t| matches!(t, Type::F32 | Type::F16);
            match middle {
                [] if floats(to) == floats(from) && to != Type::F16 => {}
                ["rn"] if to == Type::F32 && !floats(from) => {}
                ["rni"] if from == Type::F32 && !floats(to) => {}
                _ => return Err("conversion".into()),
            }
            Ok((Op::Convert { to, from, nearest_int: middle == ["rni"] }, 1))
        }
        ["cvta", "to", "shared", "u64"] => Ok((Op::GenericToShared, 1)),
        ["cvta", "shared", "u64"] => Ok((Op::SharedToGeneric, 1)),
        // Global addresses are generic addresses.
        ["cvta", "to", "global", "u64"] => Ok((Op::Unary(U::Mov, Type::U(8)), 1)),
        ["ld" | "st", rest @ ..] => {
            let rest = &rest[..rest.len() - 1];
            let (space, rest) = match rest.first().and_then(|word| space_of(word)) {
                Some(space) => (space, &rest[1..]),
                None => (Space::Generic, rest),
            };
            // What is said about caches changes no value.
            let rest = match rest {
                ["nc", "L1::no_allocate", rest @ ..] if space == Space::Global && words[0] == "ld" => rest,
                rest => rest,
            };
            if !matches!(rest, [] | ["v2"] | ["v4"]) {
                return Err("access".into());
            }
            if words[0] == "ld" { Ok((Op::Load(space, ty()?), 1)) } else { Ok((Op::Store(space, ty()?), 0)) }
        }
        ["cp", "async", "cg", "shared", "global"] => Ok((Op::CopyAsync, 0)),
        ["cp", "async", "commit_group"] => Ok((Op::CopyCommit, 0)),
        ["cp", "async", "wait_group"] => Ok((Op::CopyWait(0), 0)),
        ["bar", "sync"] => Ok((Op::Barrier, 0)),
        ["bar", "warp", "sync"] => Ok((Op::WarpBarrier, 0)),
        ["bra"] | ["bra", "uni"] => Ok((Op::Branch(0), 0)),
        ["ret"] => Ok((Op::Return, 0)),
        ["shfl", "sync", "bfly", "b32"] => Ok((Op::ShuffleXor, 1)),
        ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", "f16", "f16", "f32"] => Ok((Op::Mma, 1)),
        ["wgmma", "mma_async", "sync", "aligned", shape, "f32", "f16", "f16"] => {
            let columns = shape.strip_prefix("m64n").and_then(|rest| rest.strip_suffix("k16"));
            let columns: usize = columns.and_then(|n| n.parse().ok()).ok_or("a product's shape")?;
            if !(8..=256).contains(&columns) || !columns.is_multiple_of(8) {
                return Err("a product's columns".into());
            }
            Ok((Op::Wgmma(columns), 1))
        }
        ["wgmma", "fence", "sync", "aligned"] => Ok((Op::WgmmaBegin, 0)),
        ["wgmma", "commit_group", "sync", "aligned"] => Ok((Op::WgmmaCommit, 0)),
        ["wgmma", "wait_group", "sync", "aligned"] => Ok((Op::WgmmaWait(0), 0)),
        ["fence", "proxy", "async", "shared::cta"] => Ok((Op::ShowToProducts, 0)),
        _ => Err("unknown instruction".into()),
    }
}
