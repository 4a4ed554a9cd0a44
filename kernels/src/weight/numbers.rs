//! One number a group and row, in panels: floats, or bytes against a second level.

use super::Scales;
use super::packed::{check_len, pack_rows};
use crate::buffer::Buffer;
use crate::simd::{LANES, Simd};
use crate::{KernelError, PANEL};
use half::f16;

/// Scales or minimums of a packed weight.
#[derive(Debug, Clone)]
pub(crate) enum PackedNumbers {
    /// (panels, groups, 16)
    F16(Buffer<f16>),
    /// (panels, groups, 16)
    F32(Buffer<f32>),
    /// number = (code - bias) * second
    Coded {
        /// (panels, groups, 16)
        codes: Buffer<u8>,
        /// 128 for signed codes, 0 for unsigned ones.
        bias: f32,
        /// (panels, spans, 16)
        second: Buffer<f32>,
        /// Groups of a span.
        span: usize,
    },
}

impl PackedNumbers {
    pub(crate) fn pack(n: usize, groups: usize, source: &Scales, what: &'static str) -> Result<Self, KernelError> {
        let wanted = n.saturating_mul(groups);
        match *source {
            Scales::F16(rows) => {
                check_len(what, rows.len(), wanted)?;
                Ok(PackedNumbers::F16(pack_rows(n, groups, rows)))
            }
            Scales::F32(rows) => {
                check_len(what, rows.len(), wanted)?;
                Ok(PackedNumbers::F32(pack_rows(n, groups, rows)))
            }
            Scales::Coded { codes, second, span } => {
                check_len(what, codes.len(), wanted)?;
                if span == 0 {
                    return Err(KernelError::Span { what });
                }
                let spans = groups.div_ceil(span);
                check_len("second-level scales", second.len(), n.saturating_mul(spans))?;
                let bias = if codes.iter().any(|code| *code < 0) { 128 } else { 0 };
                let mut bytes = vec![0; codes.len()];
                for (at, (byte, code)) in bytes.iter_mut().zip(codes).enumerate() {
                    *byte = u8::try_from(i32::from(*code) + bias).map_err(|_| KernelError::ScaleCode {
                        what,
                        row: at / groups,
                        group: at % groups,
                        found: *code,
                    })?;
                }
                let codes = pack_rows(n, groups, &bytes);
                Ok(PackedNumbers::Coded { codes, bias: bias as f32, second: pack_rows(n, spans, second), span })
            }
        }
    }

    /// Makes room for `panels` panels in all; there are `have`.
    pub(crate) fn reserve(&mut self, have: usize, panels: usize) {
        let all = |len: usize| len / have.max(1) * panels;
        match self {
            PackedNumbers::F16(rows) => rows.reserve(all(rows.len())),
            PackedNumbers::F32(rows) => rows.reserve(all(rows.len())),
            PackedNumbers::Coded { codes, second, .. } => {
                codes.reserve(all(codes.len()));
                second.reserve(all(second.len()));
            }
        }
    }

    /// Whether [`PackedNumbers::append`] takes these.
    pub(crate) fn is_alike(&self, other: &PackedNumbers) -> bool {
        match (self, other) {
            (PackedNumbers::Coded { span: a, .. }, PackedNumbers::Coded { span: b, .. }) => a == b,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// Adds panels that are alike.
    pub(crate) fn append(&mut self, below: &PackedNumbers) {
        match (self, below) {
            (PackedNumbers::F16(rows), PackedNumbers::F16(more)) => rows.extend(more),
            (PackedNumbers::F32(rows), PackedNumbers::F32(more)) => rows.extend(more),
            (
                PackedNumbers::Coded { codes, bias, second, .. },
                PackedNumbers::Coded { codes: more, bias: their_bias, second: more_second, .. },
            ) => {
                let start = codes.len();
                codes.extend(more);
                second.extend(more_second);
                // Codes of which some are negative are below 128, so that the others have room for their bias.
                if *bias != *their_bias {
                    let unbiased = if *bias == 0.0 { 0..start } else { start..codes.len() };
                    codes[unbiased].iter_mut().for_each(|code| *code = code.wrapping_add(128));
                    *bias = 128.0;
                }
            }
            _ => {}
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            PackedNumbers::F16(rows) => rows.bytes(),
            PackedNumbers::F32(rows) => rows.bytes(),
            PackedNumbers::Coded { codes, second, .. } => codes.bytes() + second.bytes(),
        }
    }

    /// The number of one row and group.
    pub(crate) fn at(&self, panel: usize, group: usize, groups: usize, lane: usize) -> f32 {
        let at = (panel * groups + group) * PANEL + lane;
        match self {
            PackedNumbers::F16(rows) => rows[at].to_f32(),
            PackedNumbers::F32(rows) => rows[at],
            PackedNumbers::Coded { codes, bias, second, span } => {
                let spans = groups.div_ceil(*span);
                (f32::from(codes[at]) - bias) * second[(panel * spans + group / span) * PANEL + lane]
            }
        }
    }

    /// The codes of one panel, less their bias, and the second level, if that is the same for all groups.
    #[inline(always)]
    pub(crate) fn row_coded(&self, panel: usize, groups: usize) -> Option<RowCoded<'_>> {
        match self {
            PackedNumbers::Coded { codes, bias, second, span } if *span >= groups && groups > 0 => Some(RowCoded {
                codes: &codes.as_chunks().0[panel * groups..][..groups],
                bias: *bias as i32,
                second: &second.as_chunks().0[panel],
            }),
            _ => None,
        }
    }

    /// The numbers of one panel, group after group.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize, groups: usize) -> GroupNumbers<'_> {
        let at = panel * groups;
        match self {
            PackedNumbers::F16(rows) => GroupNumbers::F16(&rows.as_chunks().0[at..][..groups]),
            PackedNumbers::F32(rows) => GroupNumbers::F32(&rows.as_chunks().0[at..][..groups]),
            PackedNumbers::Coded { codes, bias, second, span } => {
                let spans = groups.div_ceil(*span);
                GroupNumbers::Coded {
                    codes: &codes.as_chunks().0[at..][..groups],
                    bias: *bias,
                    second: &second.as_chunks().0[panel * spans..][..spans],
                    span: *span,
                    left: *span,
                }
            }
        }
    }
}

/// number = (code - bias) * second, for all groups of a panel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowCoded<'a> {
    pub(crate) codes: &'a [[u8; LANES]],
    pub(crate) bias: i32,
    pub(crate) second: &'a [f32; LANES],
}

/// Walks the groups of a panel in order.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GroupNumbers<'a> {
    F16(&'a [[f16; LANES]]),
    F32(&'a [[f32; LANES]]),
    Coded {
        codes: &'a [[u8; LANES]],
        bias: f32,
        /// From the span of the next group on.
        second: &'a [[f32; LANES]],
        span: usize,
        /// Groups of that span still to come.
        left: usize,
    },
}

impl GroupNumbers<'_> {
    /// The numbers of group `group`; to be asked for 0, 1, 2 and so on.
    #[inline(always)]
    pub(crate) fn next<S: Simd>(&mut self, s: S, group: usize) -> S::F32 {
        match self {
            GroupNumbers::F16(rows) => s.load_f16(&rows[group]),
            GroupNumbers::F32(rows) => s.load(&rows[group]),
            GroupNumbers::Coded { codes, bias, second, span, left } => {
                if *left == 0 {
                    *second = &second[1..];
                    *left = *span;
                }
                *left -= 1;
                s.mul(s.sub(s.load_u8(&codes[group]), s.splat(*bias)), s.load(&second[0]))
            }
        }
    }
}
