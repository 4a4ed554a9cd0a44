//! Plots of one tensor, as SVG: histograms and ranges of channels.

use super::{Histogram, escape, short};
use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 160.0;
/// Under a plot, for the numbers at its ends.
const FOOT: f64 = 18.0;
/// Channels that are drawn apart; more are drawn together.
const CHANNELS: usize = 320;

fn open(out: &mut String, label: &str) {
    let _ =
        write!(out, "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\">", HEIGHT + FOOT, escape(label));
}

fn ends(out: &mut String, left: &str, right: &str) {
    let y = HEIGHT + FOOT - 4.0;
    let _ = writeln!(
        out,
        "<text x=\"0\" y=\"{y}\">{}</text><text x=\"{WIDTH}\" y=\"{y}\" text-anchor=\"end\">{}</text></svg>",
        escape(left),
        escape(right)
    );
}

/// Bars of float values, a line of rounded ones, and the range of the integers; counts by their logarithms, as tails are
/// what ranges are about.
pub(super) fn histogram(out: &mut String, h: &Histogram) {
    let bins = h.float.len().max(h.rounded.len()).max(1);
    let most = h.float.iter().chain(&h.rounded).copied().max().unwrap_or(0);
    let top = (most as f64 + 1.0).ln().max(f64::MIN_POSITIVE);
    let height = |count: u64| HEIGHT * (count as f64 + 1.0).ln() / top;
    let step = WIDTH / bins as f64;
    let [lo, hi] = h.ends.map(f64::from);
    let width = (hi - lo) / bins as f64;
    open(out, "Histogram of float and rounded values, counts by their logarithm");
    for (i, &count) in h.float.iter().enumerate().filter(|(_, c)| **c > 0) {
        let (x, tall) = (i as f64 * step, height(count));
        let rounded = h.rounded.get(i).copied().unwrap_or(0);
        let (from, to) = (short(lo + i as f64 * width), short(lo + (i + 1) as f64 * width));
        let _ = write!(
            out,
            "<rect class=\"float\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\" \
             data-tip=\"{from} to {to}: {count} float, {rounded} rounded\"></rect>",
            HEIGHT - tall,
            (step - 0.5).max(0.5)
        );
    }
    let mut points = String::new();
    for (i, &count) in h.rounded.iter().enumerate() {
        let y = HEIGHT - height(count);
        let _ = write!(points, "{:.1},{y:.1} {:.1},{y:.1} ", i as f64 * step, (i + 1) as f64 * step);
    }
    let _ = write!(out, "<polyline class=\"rounded\" points=\"{}\"></polyline>", points.trim_end());
    if hi > lo {
        for (end, name) in h.reach.map(f64::from).into_iter().zip(["smallest", "largest"]) {
            let x = ((end - lo) / (hi - lo)).clamp(0.0, 1.0) * WIDTH;
            let _ = write!(
                out,
                "<line class=\"reach\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{HEIGHT}\" data-tip=\"{name} value of the integers: {}\"></line>",
                short(end)
            );
        }
    }
    ends(out, &short(lo), &short(hi));
}

/// A line from the smallest to the largest value of each channel.
pub(super) fn channels(out: &mut String, channels: &[[f32; 2]]) {
    let together = channels.len().div_ceil(CHANNELS).max(1);
    let drawn: Vec<[f64; 2]> = channels
        .chunks(together)
        .map(|some| some.iter().fold([0f64; 2], |[lo, hi], c| [lo.min(f64::from(c[0])), hi.max(f64::from(c[1]))]))
        .collect();
    let [lo, hi] = drawn.iter().fold([0f64; 2], |[lo, hi], c| [lo.min(c[0]), hi.max(c[1])]);
    let finite = lo.is_finite() && hi.is_finite() && hi > lo;
    let y = |v: f64| if finite { HEIGHT * (hi - v) / (hi - lo) } else { HEIGHT };
    let step = WIDTH / drawn.len().max(1) as f64;
    open(out, "Smallest and largest value of each channel");
    for (i, &[low, high]) in drawn.iter().enumerate() {
        let (from, to) = (i * together, ((i + 1) * together).min(channels.len()) - 1);
        let which = if from == to { format!("channel {from}") } else { format!("channels {from} to {to}") };
        let _ = write!(
            out,
            "<rect class=\"channel\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" data-tip=\"{which}: {} to {}\"></rect>",
            i as f64 * step,
            y(high),
            (step * 0.8).max(0.5),
            (y(low) - y(high)).max(1.0),
            short(low),
            short(high)
        );
    }
    let _ = write!(out, "<line class=\"zero\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{0:.1}\" y2=\"{0:.1}\"></line>", y(0.0));
    ends(out, "channel 0", &format!("channel {}: {} to {}", channels.len().saturating_sub(1), short(lo), short(hi)));
}
