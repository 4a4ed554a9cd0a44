//! Rows put together into a tensor.

use super::AlgoInput;
use super::rows::Row;
use super::second::{Dynamic, Numbers};
use crate::{OutlierSpec, QTensor, ScaleData, ScaleFormat, Zero, ZeroData};
use nibble_kernels::Outliers;

/// The tensor of `codes` (n, k) and what goes with each row.
pub(super) fn tensor(input: &AlgoInput, codes: Vec<u8>, rows: Vec<Row>, dynamic: Option<Dynamic>) -> QTensor {
    let spec = input.spec;
    let scales = match dynamic {
        Some(Dynamic { codes, absmax, offset }) => ScaleData::Dynamic { codes, absmax, offset },
        None => data(spec.scale, &rows, |row| &row.scales),
    };
    let zeros = match spec.zero {
        Zero::Symmetric | Zero::FullRange => ZeroData::None,
        Zero::Int => ZeroData::Int(rows.iter().flat_map(|row| &row.zeros).copied().collect()),
        Zero::Min => ZeroData::Min(data(spec.scale, &rows, |row| &row.mins)),
    };
    let mut outliers = Outliers::default();
    if spec.outliers != OutlierSpec::None {
        outliers.row_start.push(0);
        // Outlier columns of a tensor with one group lie in one long row.
        for row in &rows {
            outliers.cols.extend(&row.outliers);
            outliers.values.extend(&row.values);
            outliers.row_start.push(outliers.cols.len() as u32);
        }
    }
    QTensor { spec: spec.clone(), shape: input.shape, codes, scales, zeros, outliers, order: None }
}

fn data(format: ScaleFormat, rows: &[Row], numbers: impl Fn(&Row) -> &Numbers) -> ScaleData {
    match format {
        ScaleFormat::Float(_) => ScaleData::Float(rows.iter().flat_map(|row| &numbers(row).values).copied().collect()),
        ScaleFormat::Coded { .. } => ScaleData::Coded {
            codes: rows.iter().flat_map(|row| &numbers(row).codes).copied().collect(),
            second: rows.iter().flat_map(|row| &numbers(row).second).copied().collect(),
        },
        ScaleFormat::Dynamic { .. } => ScaleData::Dynamic { codes: Vec::new(), absmax: Vec::new(), offset: 0.0 },
    }
}
