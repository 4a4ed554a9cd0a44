//! The statistics of a tensor: one for all of it, or one a channel.

use super::Statistics;
use super::statistics::Columns;
use crate::error::Result;
use crate::{QuantError, Range};

/// Statistics of a tensor's values, seen as (outer, channels, inner); one channel is the whole tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    inner: usize,
    each: Vec<Statistics>,
}

impl Observed {
    /// Of a whole tensor.
    pub fn tensor(histogram: bool) -> Observed {
        Observed { inner: 1, each: vec![Statistics::new(histogram)] }
    }

    /// Of each index along one axis of a tensor with these dimensions; the dimensions before it may differ from batch
    /// to batch.
    ///
    /// # Errors
    /// There is no such axis.
    pub fn channels(shape: &[usize], axis: usize, histogram: bool) -> Result<Observed> {
        let Some(&channels) = shape.get(axis) else {
            let why = format!("axis {axis} of a tensor with {} dimensions", shape.len());
            return Err(QuantError::Spec { what: "observer".into(), why });
        };
        let inner = shape[axis + 1..].iter().product();
        Ok(Observed { inner, each: vec![Statistics::new(histogram); channels] })
    }

    /// Takes in one batch.
    ///
    /// # Errors
    /// The values don't divide into channels; `name` is the tensor's.
    pub fn observe(&mut self, name: &str, values: &[f32]) -> Result<()> {
        if let [all] = self.each.as_mut_slice() {
            all.observe(values);
            return Ok(());
        }
        let (channels, inner) = (self.each.len(), self.inner);
        let sample = channels * inner;
        if sample == 0 || !values.len().is_multiple_of(sample) {
            let why = format!("{} values to observe; wanted a multiple of {channels} x {inner}", values.len());
            return if values.is_empty() { Ok(()) } else { Err(QuantError::Tensor { name: name.into(), why }) };
        }
        if inner == 1 && self.each.iter().all(|s| s.histogram().is_none()) && self.columns(values) {
            return Ok(());
        }
        let mut channel = Vec::with_capacity(values.len() / channels);
        for (c, statistics) in self.each.iter_mut().enumerate() {
            channel.clear();
            for outer in values.chunks_exact(sample) {
                channel.extend_from_slice(&outer[c * inner..(c + 1) * inner]);
            }
            statistics.observe(&channel);
        }
        Ok(())
    }

    /// Takes in (outer, channels) values row by row, as they lie in memory. Takes in nothing, and says so, if one of them
    /// isn't finite.
    fn columns(&mut self, values: &[f32]) -> bool {
        let channels = self.each.len();
        let mut columns = Columns::new(channels);
        values.chunks_exact(channels).for_each(|row| columns.add(row));
        if columns.batches().any(|b| !b.squares.is_finite()) {
            return false;
        }
        let rows = values.len() / channels;
        self.each.iter_mut().zip(columns.batches()).for_each(|(statistics, batch)| statistics.take_unseen(rows, batch));
        true
    }

    /// Takes in what another one has seen.
    ///
    /// # Errors
    /// The two have different channels; `name` is the tensor's.
    pub fn merge(&mut self, name: &str, other: &Observed) -> Result<()> {
        if self.each.len() != other.each.len() {
            let why = format!("statistics of {} channels don't merge with {}", other.each.len(), self.each.len());
            return Err(QuantError::Tensor { name: name.into(), why });
        }
        self.each.iter_mut().zip(&other.each).for_each(|(own, others)| own.merge(others));
        Ok(())
    }

    /// One a channel; one if the tensor has a single one.
    pub fn each(&self) -> &[Statistics] {
        &self.each
    }

    /// Everything together.
    pub fn whole(&self) -> Statistics {
        let histogram = self.each.iter().all(|s| s.histogram().is_some());
        self.each.iter().fold(Statistics::new(histogram), |mut whole, channel| {
            whole.merge(channel);
            whole
        })
    }

    /// Smallest and largest value of each channel, zero included.
    pub fn ranges(&self) -> Vec<Range> {
        self.each.iter().map(Statistics::range).collect()
    }

    /// Means of the channels.
    pub fn means(&self) -> Vec<f64> {
        self.each.iter().map(Statistics::mean).collect()
    }

    /// Second moments of the channels.
    pub fn mean_squares(&self) -> Vec<f32> {
        self.each.iter().map(|s| s.mean_square() as f32).collect()
    }
}
