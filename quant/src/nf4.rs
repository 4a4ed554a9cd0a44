//! QLoRA's numbers (arXiv 2305.14314): the 16 normal-float levels and bitsandbytes' 8-bit dynamic map for their scales.

use std::sync::LazyLock;

/// The normal-float levels: quantiles of a normal distribution, made to hold 0 and scaled to -1..=1.
///
/// Source: bitsandbytes `functional.get_4bit_type("nf4")`.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// The signed 8-bit dynamic map, ascending: 7 binades of 10 with 1 to 64 values each side of zero, 0 and 1.
///
/// Source: bitsandbytes `functional.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(build_dynamic_map);
    &MAP
}

fn build_dynamic_map() -> [f32; 256] {
    let mut values = Vec::with_capacity(256);
    for exponent in 0..7 {
        let count = 1usize << exponent;
        let power: f32 = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0][exponent];
        for i in 0..count {
            let middle = fraction_boundary(i, count).midpoint(fraction_boundary(i + 1, count));
            // torch rounds the power to f32 before it multiplies a tensor of f32.
            let value = power * middle;
            values.extend([value, -value]);
        }
    }
    values.extend([0.0, 1.0]);
    values.sort_by(f32::total_cmp);
    let mut map = [0.0; 256];
    map.copy_from_slice(&values);
    map
}

/// Boundary `i` of `count` equal parts of 0.1..=1, from the nearer end as torch's `linspace` does.
fn fraction_boundary(i: usize, count: usize) -> f32 {
    let step = (1.0f32 - 0.1) / count as f32;
    if i < count.div_ceil(2) { 0.1 + step * i as f32 } else { 1.0 - step * (count - i) as f32 }
}

/// Index of the nearest value of the dynamic map; of two equally near ones the lower. "Nearest" is by the
/// middles between values, rounded to f32, as in bitsandbytes.
pub fn dynamic_code(value: f32) -> u8 {
    let map = dynamic_map();
    let above = map.partition_point(|&m| m < value);
    match above {
        0 => 0,
        256 => 255,
        i if value <= (map[i - 1] + map[i]) / 2.0 => (i - 1) as u8,
        i => i as u8,
    }
}
