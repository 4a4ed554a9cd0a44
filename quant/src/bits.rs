//! Codes as bit streams: code i of a row sits at bits i*b .. (i+1)*b, least significant bit first, and a row is padded
//! to a byte.
//!
//! ```text
//! 4 bits   byte j = code[2j] | code[2j+1] << 4
//! 3 bits   byte 0 = code[0] | code[1] << 3 | code[2] << 6, byte 1 = code[2] >> 2 | code[3] << 1 | ...
//! ```

/// Bytes of a row of `count` codes of `bits` bits.
pub fn packed_len(count: usize, bits: usize) -> usize {
    (count * bits).div_ceil(8)
}

/// Appends one row of codes, each below 2^bits, to `out`; `bits` is 1..=8.
pub fn pack_row(codes: &[u8], bits: usize, out: &mut Vec<u8>) {
    match bits {
        8 => out.extend_from_slice(codes),
        4 => {
            let pairs = codes.chunks_exact(2);
            let last = pairs.remainder();
            out.extend(pairs.map(|p| p[0] | p[1] << 4));
            out.extend(last);
        }
        _ => {
            let (mut word, mut filled) = (0u32, 0);
            for &code in codes {
                word |= (code as u32) << filled;
                filled += bits;
                while filled >= 8 {
                    out.push(word as u8);
                    word >>= 8;
                    filled -= 8;
                }
            }
            if filled > 0 {
                out.push(word as u8);
            }
        }
    }
}

/// Reads one row of codes back: `codes.len()` of them from at least [`packed_len`] bytes; `false` if there are too few.
#[must_use]
pub fn unpack_row(bytes: &[u8], bits: usize, codes: &mut [u8]) -> bool {
    if bytes.len() < packed_len(codes.len(), bits) {
        return false;
    }
    match bits {
        8 => codes.copy_from_slice(&bytes[..codes.len()]),
        4 => {
            let middle = codes.len() / 2;
            let mut pairs = codes.chunks_exact_mut(2);
            for (pair, byte) in pairs.by_ref().zip(bytes) {
                pair[0] = byte & 15;
                pair[1] = byte >> 4;
            }
            if let [last] = pairs.into_remainder() {
                *last = bytes[middle] & 15;
            }
        }
        _ => {
            let (mut word, mut filled, mut next) = (0u32, 0, bytes.iter());
            let mask = (1u32 << bits) - 1;
            for code in codes {
                if filled < bits {
                    word |= next.next().map_or(0, |&b| b as u32) << filled;
                    filled += 8;
                }
                *code = (word & mask) as u8;
                word >>= bits;
                filled -= bits;
            }
        }
    }
    true
}

/// Appends a row of `bits`-bit signed or unsigned numbers (two's complement), as scale codes are stored.
pub fn pack_row_i16(codes: &[i16], bits: usize, out: &mut Vec<u8>) {
    let mask = ((1u32 << bits) - 1) as u8;
    let bytes: Vec<u8> = codes.iter().map(|&c| c as u8 & mask).collect();
    pack_row(&bytes, bits, out);
}

/// Reads a row of `bits`-bit numbers back, sign-extended if `signed`; `false` if there are too few bytes.
#[must_use]
pub fn unpack_row_i16(bytes: &[u8], bits: usize, signed: bool, codes: &mut [i16]) -> bool {
    let mut raw = vec![0u8; codes.len()];
    if !unpack_row(bytes, bits, &mut raw) {
        return false;
    }
    for (code, raw) in codes.iter_mut().zip(raw) {
        let wrap = if signed && raw as usize >> (bits - 1) == 1 { 1i16 << bits } else { 0 };
        *code = raw as i16 - wrap;
    }
    true
}
