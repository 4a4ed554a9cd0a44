//! Whether a tensor's parts fit its spec: what stands between a hostile file and an index.

use super::{QTensor, ScaleData, ZeroData};
use crate::error::Result;
use crate::{FloatFormat, OutlierSpec, QuantError, ScaleFormat, Zero};

impl QTensor {
    /// Refuses lengths, codes, scales, zeros, outliers or an order that don't fit the spec and shape. A tensor that
    /// passes decodes without a panic. `name` is for the error.
    pub fn validate(&self, name: &str) -> Result<()> {
        let refuse = |why: String| QuantError::Tensor { name: name.into(), why };
        self.spec.validate().map_err(|e| refuse(e.to_string()))?;
        let [n, k] = self.shape;
        let wanted = n.checked_mul(k).ok_or_else(|| refuse(format!("a shape of {n} x {k}")))?;
        length("codes", self.codes.len(), wanted).map_err(refuse)?;
        let top = ((1u32 << self.spec.bits()) - 1) as u8;
        // The largest first: that is many codes at a time.
        let most = self.codes.iter().fold(0, |most, code| most.max(*code));
        if let Some(at) = (most > top).then(|| self.codes.iter().position(|&c| c > top)).flatten() {
            let (row, col, code) = (at / k, at % k, self.codes[at]);
            return Err(refuse(format!("code {code} at row {row}, column {col}; the grid ends at {top}")));
        }
        let signed = self.spec.signed_scales();
        self.check_numbers("scale", &self.scales, signed).map_err(refuse)?;
        self.check_zeros(top).map_err(refuse)?;
        self.check_outliers().map_err(refuse)?;
        self.check_order().map_err(refuse)
    }

    fn check_numbers(&self, what: &str, data: &ScaleData, signed: bool) -> Result<(), String> {
        let [n, k] = self.shape;
        let (rows, groups, spec) = (self.spec.scale_rows(n), self.spec.groups(k), &self.spec);
        let count = rows * groups;
        match (data, spec.scale) {
            (ScaleData::Float(values), ScaleFormat::Float(float)) => {
                length(&format!("{what}s"), values.len(), count)?;
                floats(what, values, float)
            }
            (ScaleData::Coded { codes, second }, ScaleFormat::Coded { bits, second: float, .. }) => {
                length(&format!("{what} codes"), codes.len(), count)?;
                length(&format!("second-level {what}s"), second.len(), rows * spec.spans(k))?;
                let range = if signed { -(1 << (bits - 1))..=(1 << (bits - 1)) - 1 } else { 0..=(1 << bits) - 1 };
                if let Some(code) = codes.iter().find(|c| !range.contains(*c)) {
                    return Err(format!("{what} code {code}; {} to {} are possible", range.start(), range.end()));
                }
                floats(&format!("second-level {what}"), second, float)
            }
            (ScaleData::Dynamic { codes, absmax, offset }, ScaleFormat::Dynamic { blocks }) => {
                length(&format!("{what} codes"), codes.len(), count)?;
                length(&format!("absmaxes of {what}s"), absmax.len(), count.div_ceil(blocks))?;
                floats("absmax", absmax, FloatFormat::F32)?;
                floats("offset", &[*offset], FloatFormat::F32)
            }
            (found, wanted) => Err(format!("{what}s are {}, the spec asks for {}", found.name(), wanted.name())),
        }
    }

    fn check_zeros(&self, top: u8) -> Result<(), String> {
        let [n, k] = self.shape;
        match (&self.zeros, self.spec.zero) {
            (ZeroData::None, Zero::Symmetric | Zero::FullRange) => Ok(()),
            (ZeroData::Int(zeros), Zero::Int) => {
                length("zero points", zeros.len(), self.spec.scale_rows(n) * self.spec.groups(k))?;
                match zeros.iter().find(|z| **z > top) {
                    Some(zero) => Err(format!("zero point {zero}; the grid ends at {top}")),
                    None => Ok(()),
                }
            }
            (ZeroData::Min(mins), Zero::Min) => self.check_numbers("minimum", mins, false),
            (found, wanted) => {
                let found = match found {
                    ZeroData::None => "no zeros",
                    ZeroData::Int(_) => "integer zero points",
                    ZeroData::Min(_) => "minimums",
                };
                Err(format!("{found} are stored, the spec asks for zero = {}", wanted.name()))
            }
        }
    }

    fn check_outliers(&self) -> Result<(), String> {
        let ([n, k], o) = (self.shape, &self.outliers);
        if self.spec.outliers == OutlierSpec::None {
            let stored = o.row_start.len().max(o.cols.len()).max(o.values.len());
            return if stored == 0 { Ok(()) } else { Err("outliers are stored, the spec asks for none".into()) };
        }
        length("outlier row offsets", o.row_start.len(), n + 1)?;
        length("outlier values", o.values.len(), o.cols.len())?;
        let row = self.spec.row_outliers(k);
        let fits = |(r, &start): (usize, &u32)| r.checked_mul(row) == Some(start as usize);
        if !o.row_start.iter().enumerate().all(fits) || n.checked_mul(row) != Some(o.cols.len()) {
            return Err(format!("outliers of a row are not {row} everywhere"));
        }
        if let Some(value) = o.values.iter().find(|v| !v.is_finite()) {
            return Err(format!("outlier of {value}"));
        }
        if row == 0 || n == 0 {
            return Ok(());
        }
        let first = &o.cols[..row];
        for (r, cols) in o.cols.chunks(row).enumerate() {
            if !cols.is_sorted_by(|a, b| a < b) || cols[row - 1] as usize >= k {
                return Err(format!("outlier columns of row {r} do not ascend below {k}"));
            }
            let placed = match self.spec.outliers {
                // Every group has at least one, so the runs of columns in one group are the groups.
                OutlierSpec::PerGroup(count) => {
                    let size = self.spec.group_size(k) as u32;
                    let runs = cols.chunk_by(|a, b| a / size == b / size);
                    runs.enumerate()
                        .all(|(g, run)| run[0] / size == g as u32 && run.len() == count.min(self.spec.group_len(k, g)))
                }
                _ => cols == first,
            };
            if !placed {
                return Err(format!("outliers of row {r} are not where the spec has them"));
            }
        }
        Ok(())
    }

    fn check_order(&self) -> Result<(), String> {
        let (k, Some(order)) = (self.shape[1], &self.order) else { return Ok(()) };
        length("column order", order.len(), k)?;
        let mut seen = vec![false; k];
        for &col in order {
            match seen.get_mut(col as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(format!("column order names column {col} of {k} twice or out of place")),
            }
        }
        Ok(())
    }
}

impl ScaleData {
    fn name(&self) -> &'static str {
        match self {
            ScaleData::Float(_) => "floats",
            ScaleData::Coded { .. } => "codes of a second level",
            ScaleData::Dynamic { .. } => "dynamic codes",
        }
    }
}

impl ScaleFormat {
    fn name(self) -> &'static str {
        match self {
            ScaleFormat::Float(_) => "floats",
            ScaleFormat::Coded { .. } => "codes of a second level",
            ScaleFormat::Dynamic { .. } => "dynamic codes",
        }
    }
}

fn length(what: &str, found: usize, wanted: usize) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{found} {what}, expected {wanted}")) }
}

fn floats(what: &str, values: &[f32], float: FloatFormat) -> Result<(), String> {
    match values.iter().find(|v| !v.is_finite() || float.round(**v) != **v) {
        Some(value) => Err(format!("{what} {value} is not a finite {}", float.name())),
        None => Ok(()),
    }
}
