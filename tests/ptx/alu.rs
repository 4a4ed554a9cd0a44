//! Arithmetic over the 32 lanes of a warp. Values are raw bits, extended with zeros to 64.

use super::parse::{Binary, Compare, Type, Unary};
use half::f16;

/// One value a lane.
pub type Lanes = [u64; 32];

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn bits(value: f32) -> u64 {
    value.to_bits().into()
}

/// Both halves of a pair.
fn halves(pair: u64) -> [f16; 2] {
    [f16::from_bits(pair as u16), f16::from_bits((pair >> 16) as u16)]
}

fn pair([lo, hi]: [f16; 2]) -> u64 {
    u64::from(lo.to_bits()) | u64::from(hi.to_bits()) << 16
}

/// Only the type's bits.
fn cut(value: u64, ty: Type) -> u64 {
    match ty.bytes() {
        8 => value,
        n => value & ((1 << (8 * n)) - 1),
    }
}

/// With the sign that the type gives it.
pub fn signed(value: u64, ty: Type) -> i64 {
    let unused = 64 - 8 * ty.bytes() as u32;
    (value << unused) as i64 >> unused
}

fn each2(a: &Lanes, b: &Lanes, op: impl Fn(u64, u64) -> u64) -> Lanes {
    std::array::from_fn(|i| op(a[i], b[i]))
}

/// Two operands; `None` for a pair of operation and type that isn't known.
pub fn binary(op: Binary, ty: Type, a: &Lanes, b: &Lanes) -> Option<Lanes> {
    let signs = matches!(ty, Type::S(_));
    let integer = |op: fn(u64, u64) -> u64| Some(each2(a, b, |a, b| cut(op(a, b), ty)));
    let float = |op: fn(f32, f32) -> f32| Some(each2(a, b, |a, b| bits(op(f(a), f(b)))));
    match (op, ty) {
        (Binary::Add, Type::F32) => float(|a, b| a + b),
        (Binary::Sub, Type::F32) => float(|a, b| a - b),
        (Binary::Mul, Type::F32) => float(|a, b| a * b),
        (Binary::Div, Type::F32) => float(|a, b| a / b),
        (Binary::Min, Type::F32) => float(f32::min),
        (Binary::Max, Type::F32) => float(f32::max),
        (Binary::Sub, Type::F16x2) => Some(each2(a, b, |a, b| {
            let ([a0, a1], [b0, b1]) = (halves(a), halves(b));
            // 24 bits hold the exact difference or enough of it: rounding twice is rounding once.
            pair([f16::from_f32(a0.to_f32() - b0.to_f32()), f16::from_f32(a1.to_f32() - b1.to_f32())])
        })),
        (_, Type::F16 | Type::F16x2 | Type::F32) => None,
        (Binary::Add, _) => integer(u64::wrapping_add),
        (Binary::Sub, _) => integer(u64::wrapping_sub),
        (Binary::Mul, _) => integer(u64::wrapping_mul),
        (Binary::MulWide, Type::U(4)) => Some(each2(a, b, |a, b| cut(a, ty) * cut(b, ty))),
        (Binary::MulWide, Type::S(4)) => Some(each2(a, b, |a, b| signed(a, ty).wrapping_mul(signed(b, ty)) as u64)),
        (Binary::MulHi, Type::U(4)) => Some(each2(a, b, |a, b| (cut(a, ty) * cut(b, ty)) >> 32)),
        (Binary::Div, Type::U(_)) => integer(|a, b| a.checked_div(b).unwrap_or(u64::MAX)),
        (Binary::Rem, Type::U(_)) => integer(|a, b| a.checked_rem(b).unwrap_or(a)),
        (Binary::Min, _) if signs => Some(each2(a, b, |a, b| cut(signed(a, ty).min(signed(b, ty)) as u64, ty))),
        (Binary::Max, _) if signs => Some(each2(a, b, |a, b| cut(signed(a, ty).max(signed(b, ty)) as u64, ty))),
        (Binary::Min, _) => integer(u64::min),
        (Binary::Max, _) => integer(u64::max),
        (Binary::And, _) => integer(|a, b| a & b),
        (Binary::Or, _) => integer(|a, b| a | b),
        (Binary::Xor, _) => integer(|a, b| a ^ b),
        (Binary::Shl, _) => Some(each2(a, b, |a, b| cut(if b < 64 { a << b } else { 0 }, ty))),
        (Binary::Shr, _) if signs => Some(each2(a, b, |a, b| cut((signed(a, ty) >> b.min(63)) as u64, ty))),
        (Binary::Shr, _) => Some(each2(a, b, |a, b| if b < 64 { cut(a, ty) >> b } else { 0 })),
        _ => None,
    }
}

/// One operand.
pub fn unary(op: Unary, ty: Type, a: &Lanes) -> Option<Lanes> {
    let float = |op: fn(f32) -> f32| Some(a.map(|a| bits(op(f(a)))));
    match (op, ty) {
        (Unary::Mov, _) => Some(*a),
        (Unary::Not, Type::Predicate) => Some(a.map(|a| a ^ 1)),
        (Unary::Not, _) => Some(a.map(|a| cut(!a, ty))),
        (Unary::Neg, Type::F32) => float(|a| -a),
        (Unary::Neg, Type::S(_)) => Some(a.map(|a| cut(a.wrapping_neg(), ty))),
        (Unary::Sqrt, Type::F32) => float(f32::sqrt),
        (Unary::Reciprocal, Type::F32) => float(|a| 1.0 / a),
        (Unary::Exp2, Type::F32) => float(|a| f64::from(a).exp2() as f32),
        _ => None,
    }
}

/// a * b + c, floats rounded once.
pub fn multiply_add(ty: Type, a: &Lanes, b: &Lanes, c: &Lanes) -> Option<Lanes> {
    Some(std::array::from_fn(|i| match ty {
        Type::F32 => bits(f(a[i]).mul_add(f(b[i]), f(c[i]))),
        Type::F16x2 => {
            let (a, b, c) = (halves(a[i]), halves(b[i]), halves(c[i]));
            // Products and sums of halves are exact in double precision.
            pair([0, 1].map(|h| f16::from_f64(a[h].to_f64() * b[h].to_f64() + c[h].to_f64())))
        }
        _ => cut(a[i].wrapping_mul(b[i]).wrapping_add(c[i]), ty),
    }))
}

/// 0 or 1 a lane.
pub fn compare(op: Compare, ty: Type, a: &Lanes, b: &Lanes) -> Lanes {
    use std::cmp::Ordering::{Equal, Greater, Less};
    each2(a, b, |a, b| {
        let order = match ty {
            Type::F32 => f(a).partial_cmp(&f(b)),
            Type::S(_) => Some(signed(a, ty).cmp(&signed(b, ty))),
            _ => Some(cut(a, ty).cmp(&cut(b, ty))),
        };
        let holds = match op {
            Compare::Eq => order == Some(Equal),
            Compare::Ne => order.is_some_and(|o| o != Equal),
            Compare::Lt => order == Some(Less),
            Compare::Le => matches!(order, Some(Less | Equal)),
            Compare::Gt => order == Some(Greater),
            Compare::Ge => matches!(order, Some(Greater | Equal)),
            Compare::LtOrNan => matches!(order, None | Some(Less)),
            Compare::LeOrNan => matches!(order, None | Some(Less | Equal)),
            Compare::GtOrNan => matches!(order, None | Some(Greater)),
            Compare::GeOrNan => matches!(order, None | Some(Greater | Equal)),
            Compare::Numbers => order.is_some(),
        };
        holds.into()
    })
}

/// From one type to another.
pub fn convert(to: Type, from: Type, nearest_int: bool, a: &Lanes) -> Lanes {
    a.map(|a| match (to, from) {
        (Type::F32, Type::F16) => bits(f16::from_bits(a as u16).to_f32()),
        (Type::F32, Type::U(_)) => bits(cut(a, from) as f32),
        (Type::F32, Type::S(_)) => bits(signed(a, from) as f32),
        (Type::F32, _) => cut(a, from),
        // Conversions to integers saturate; NaN becomes 0.
        (Type::S(4), Type::F32) if nearest_int => cut(i64::from(f(a).round_ties_even() as i32) as u64, to),
        (_, Type::S(_)) => cut(signed(a, from) as u64, to),
        _ => cut(cut(a, from), to),
    })
}

/// Two floats to a pair of halves, the first one above.
pub fn pack_halves(hi: &Lanes, lo: &Lanes) -> Lanes {
    each2(hi, lo, |hi, lo| pair([f16::from_f32(f(lo)), f16::from_f32(f(hi))]))
}

/// Any function of three bits, bit by bit.
pub fn lop3(a: &Lanes, b: &Lanes, c: &Lanes, table: u64) -> Lanes {
    std::array::from_fn(|i| {
        let mut result = 0;
        for row in (0..8).filter(|row| table >> row & 1 == 1) {
            let side = |value: u64, bit: u32| if row >> bit & 1 == 1 { value } else { !value };
            result |= side(a[i], 2) & side(b[i], 1) & side(c[i], 0);
        }
        result & 0xffff_ffff
    })
}

/// Four of eight bytes; a selector's highest bit spreads the byte's sign.
pub fn prmt(a: &Lanes, b: &Lanes, selector: &Lanes) -> Lanes {
    std::array::from_fn(|i| {
        let bytes = (a[i] & 0xffff_ffff) | b[i] << 32;
        (0..4).fold(0, |result, n| {
            let choice = selector[i] >> (4 * n);
            let byte = bytes >> (8 * (choice & 7)) & 255;
            let byte = if choice & 8 == 0 { byte } else { 255 * (byte >> 7) };
            result | byte << (8 * n)
        })
    })
}

/// `len` bits of `a` put into `b` at `start`.
pub fn bit_insert(a: u64, b: u64, start: u64, len: u64) -> u64 {
    let mask = if len >= 32 { 0xffff_ffff } else { (1 << len) - 1 };
    let (mask, a) = if start >= 32 { (0, 0) } else { (mask << start & 0xffff_ffff, a << start) };
    (b & !mask) | (a & mask)
}

/// d = a b + c of 16 x 16 by 16 x 8 halves. The 16 products and the sum are added exactly and rounded once; the hardware
/// rounds a few times more, which is why bounds count roundings of the whole sum.
pub fn mma(a: [&Lanes; 4], b: [&Lanes; 2], c: [&Lanes; 4]) -> [Lanes; 4] {
    let mut wide_a = [[0f64; 16]; 16];
    let mut wide_b = [[0f64; 16]; 8]; // by column
    for lane in 0..32 {
        let (i, j) = (lane / 4, 2 * (lane % 4));
        for (part, (row, col)) in [(i, j), (i + 8, j), (i, j + 8), (i + 8, j + 8)].into_iter().enumerate() {
            let [lo, hi] = halves(a[part][lane]);
            (wide_a[row][col], wide_a[row][col + 1]) = (lo.to_f64(), hi.to_f64());
        }
        for (part, row) in [j, j + 8].into_iter().enumerate() {
            let [lo, hi] = halves(b[part][lane]);
            (wide_b[i][row], wide_b[i][row + 1]) = (lo.to_f64(), hi.to_f64());
        }
    }
    let mut d = [[0; 32]; 4];
    for lane in 0..32 {
        for part in 0..4 {
            let (row, col) = (lane / 4 + part / 2 * 8, 2 * (lane % 4) + part % 2);
            let products: f64 = wide_a[row].iter().zip(&wide_b[col]).map(|(a, b)| a * b).sum();
            d[part][lane] = bits((products + f64::from(f(c[part][lane]))) as f32);
        }
    }
    d
}
