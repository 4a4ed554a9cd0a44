//! How long models take for a sample.

use crate::Result;
use crate::graph::{GraphRunner, Tensor};
use std::time::Instant;

/// Times of one model, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Latency {
    /// One in ten runs is faster than this.
    pub lower_decile_ms: f64,
    /// Half of the runs are.
    pub median_ms: f64,
}

/// Runs the models `rounds` times each, one after the other in every round, so that what else the machine does meets all
/// of them alike.
///
/// # Errors
/// What a run returns.
pub fn latencies(
    runners: &[&dyn GraphRunner],
    sample: &[(String, Tensor)],
    outputs: &[String],
    rounds: usize,
) -> Result<Vec<Latency>> {
    let mut times: Vec<Vec<f64>> = vec![Vec::with_capacity(rounds); runners.len()];
    // The first round finds caches and pools empty.
    for round in 0..=rounds {
        for (runner, times) in runners.iter().zip(&mut times) {
            let start = Instant::now();
            runner.run(sample, outputs)?;
            if round > 0 {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    let quantile = |times: &[f64], share: f64| times.get((share * times.len() as f64) as usize).copied();
    let latency = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let of = |share| quantile(&times, share).unwrap_or_default();
        Latency { lower_decile_ms: of(0.1), median_ms: of(0.5) }
    };
    Ok(times.into_iter().map(latency).collect())
}
