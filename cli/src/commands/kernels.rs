//! `nibble kernels`: the fused products this binary has, and what they reach here.

use super::Run;
use crate::arguments::{Threads, shape};
use crate::failure::{Stopped, Usage};
use crate::limits::Limits;
use crate::output::{self, Table};
use crate::session::Session;
use anyhow::Result;
use nibble_kernels::gemm::{GEMMS, GemmKernel, Product};
use nibble_kernels::weight::WeightKind;
use nibble_kernels::{Activations, Isa, PackedWeight, Pool, probe};
use nibble_quant::recipe::glob;
use serde::Serialize;
use serde_json::json;
use std::time::{Duration, Instant};

/// How long a kernel is timed.
const TIME: Duration = Duration::from_millis(200);

/// List the fused matrix products: which this CPU has, which are picked, and with --time what they reach
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble kernels --time --threads 1

Picked kernels are marked `<--`; NIBBLE_ISA=scalar|avx2|avxvnni|avx512|amx caps what may be picked. GB/s are bytes of weight
read; TOPS count a multiply-add as two operations. A weight that fits into the cache is read faster than from memory:
--shape makes it larger.")]
pub struct Kernels {
    /// Time every kernel that is present
    #[arg(long)]
    time: bool,
    /// Shape of the weight that is timed
    #[arg(long, value_name = "ROWSxCOLUMNS", value_parser = shape, default_value = "4096x4096")]
    shape: [usize; 2],
    /// Activation rows of kernels for many rows
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(2..))]
    rows: u16,
    /// Fail if a picked kernel whose name fits PATTERN (`*` is anything) is below this share of its limit: read bandwidth
    /// for single rows, int8 multiply-adds for many
    #[arg(long = "assert", value_name = "PATTERN=SHARE", value_parser = floor, requires = "time")]
    floors: Vec<Floor>,
    #[command(flatten)]
    threads: Threads,
}

/// The least share of its limit that kernels are to reach.
#[derive(Debug, Clone)]
struct Floor {
    pattern: String,
    share: f64,
}

fn floor(text: &str) -> Result<Floor, String> {
    let wanted = || format!("`{text}`: wanted PATTERN=SHARE such as 'gemm_w4*_1x16_*=0.6'");
    let (pattern, share) = text.rsplit_once('=').ok_or_else(wanted)?;
    let share = share.parse().ok().filter(|share: &f64| share.is_finite() && *share >= 0.0).ok_or_else(wanted)?;
    Ok(Floor { pattern: pattern.to_string(), share })
}

impl Floor {
    /// The kernels below it.
    ///
    /// # Errors
    /// It is about none.
    fn missed_by<'a>(&self, rows: &'a [Row]) -> Result<Vec<(&'a Row, f64)>> {
        let about = rows.iter().filter(|row| row.picked && glob::matches(&self.pattern, row.name));
        let shares: Vec<_> = about.filter_map(|row| Some((row, row.share()?))).collect();
        if shares.is_empty() {
            return Err(Usage(format!("--assert: no kernel that is picked here fits `{}`", self.pattern)).into());
        }
        Ok(shares.into_iter().filter(|(_, share)| *share < self.share).collect())
    }
}

/// One kernel as it is reported.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    isa: &'static str,
    weight: &'static str,
    activations: &'static str,
    /// Activation rows it holds in registers; 1 serves single rows.
    rows: usize,
    /// Whether this CPU has its instructions.
    present: bool,
    /// Whether it is what its problem gets in this process.
    picked: bool,
    #[serde(flatten)]
    speed: Option<Speed>,
}

impl Row {
    /// Of what bounds its problem.
    fn share(&self) -> Option<f64> {
        self.speed.map(|speed| if self.rows == 1 { speed.bandwidth_share } else { speed.int8_share })
    }
}

/// What a kernel reached.
#[derive(Debug, Clone, Copy, Serialize)]
struct Speed {
    microseconds: f64,
    gigabytes_per_second: f64,
    tera_operations_per_second: f64,
    bandwidth_share: f64,
    int8_share: f64,
}

impl Run for Kernels {
    fn run(self, session: &Session) -> Result<()> {
        let pool = Pool::new(self.threads.threads.map_or_else(Pool::default_threads, |n| n.get()));
        let limits = self.time.then(|| Limits::of(&pool));
        let mut rows = Vec::new();
        // Kernels for the same weight lie apart in the table, so each kind is packed once and kept.
        let mut weights: Vec<(WeightKind, PackedWeight)> = Vec::new();
        for kernel in GEMMS {
            if session.stopped() {
                return Err(Stopped.into());
            }
            let speed = match &limits {
                Some(limits) if kernel.isa.is_present() => Some(self.time(kernel, &pool, limits, &mut weights)?),
                _ => None,
            };
            rows.push(Row {
                name: kernel.name,
                isa: kernel.isa.name(),
                weight: kernel.weight.name(),
                activations: kernel.act.name(),
                rows: kernel.rows,
                present: kernel.isa.is_present(),
                picked: is_picked(kernel),
                speed,
            });
        }
        if session.json {
            output::json(&json!({"isa": Isa::best().name(), "limits": limits, "kernels": rows}))?;
        } else {
            output::say(&format!("instructions in use: {}", Isa::best()))?;
            if let Some(limits) = limits {
                output::say(&limits.line())?;
            }
            output::say("")?;
            output::say(&self.table(&rows).render())?;
        }
        self.check_floors(&rows)
    }
}

/// Whether [`nibble_kernels::gemm::select`] would take this kernel for the problems it is meant for.
fn is_picked(kernel: &'static GemmKernel) -> bool {
    let best = Isa::best();
    let first = GEMMS.iter().find(|other| other.accepts(kernel.weight, kernel.act, kernel.rows, best));
    first.is_some_and(|first| std::ptr::eq(first, kernel))
}

impl Kernels {
    fn check_floors(&self, rows: &[Row]) -> Result<()> {
        let mut missed = Vec::new();
        for floor in &self.floors {
            for (row, share) in floor.missed_by(rows)? {
                missed.push(format!("{} reached {share:.3} of its limit, wanted {}", row.name, floor.share));
            }
        }
        if missed.is_empty() { Ok(()) } else { anyhow::bail!("{}", missed.join("; ")) }
    }

    fn table(&self, rows: &[Row]) -> Table {
        let mut head = vec!["kernel", "rows", "present"];
        if self.time {
            head.extend(["us", "GB/s", "bandwidth", "TOPS", "int8"]);
        }
        head.push("");
        let mut table = Table::new(&head);
        for row in rows {
            let mut cells = vec![row.name.to_string(), row.rows.to_string(), yes(row.present)];
            if self.time {
                cells.extend(match row.speed {
                    Some(speed) => [
                        format!("{:.1}", speed.microseconds),
                        format!("{:.2}", speed.gigabytes_per_second),
                        format!("{:.1} %", speed.bandwidth_share * 100.0),
                        format!("{:.4}", speed.tera_operations_per_second),
                        format!("{:.1} %", speed.int8_share * 100.0),
                    ],
                    None => std::array::from_fn(|_| "-".to_string()),
                });
            }
            cells.push(if row.picked { "<--" } else { "" }.to_string());
            table.row(cells);
        }
        table
    }

    fn time(
        &self,
        kernel: &'static GemmKernel,
        pool: &Pool,
        limits: &Limits,
        weights: &mut Vec<(WeightKind, PackedWeight)>,
    ) -> Result<Speed> {
        let [n, k] = self.shape;
        if !weights.iter().any(|(kind, _)| *kind == kernel.weight) {
            weights.push((kernel.weight, probe::weight(kernel.weight, n, k)?));
        }
        let Some((_, weight)) = weights.iter().find(|(kind, _)| *kind == kernel.weight) else {
            anyhow::bail!("{}: no weight of its kind", kernel.name);
        };
        let m = if kernel.rows == 1 { 1 } else { usize::from(self.rows) };
        let x: Vec<f32> = (0..m * k).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
        let mut activations = Activations::with_capacity(m, k);
        activations.fill(m, k, &x)?;
        let mut out = vec![0f32; m * n];
        let mut once = || -> Result<Duration> {
            let start = Instant::now();
            let product = Product { weight, bias: None, accumulate: false, out: &mut out };
            kernel.multiply(pool, &mut activations, product)?;
            Ok(start.elapsed())
        };
        once()?;
        // The best run is the kernel's own speed; other work on the machine only ever slows a run down.
        let (started, mut best) = (Instant::now(), Duration::MAX);
        while started.elapsed() < TIME {
            best = best.min(once()?);
        }
        let seconds = best.as_secs_f64().max(1e-9);
        let bytes = weight.bytes() as f64 / seconds;
        let multiply_adds = (m * n * k) as f64 / seconds;
        Ok(Speed {
            microseconds: seconds * 1e6,
            gigabytes_per_second: bytes / 1e9,
            tera_operations_per_second: multiply_adds * 2.0 / 1e12,
            bandwidth_share: bytes / limits.read_bytes_per_second,
            int8_share: multiply_adds / limits.int8_multiply_adds_per_second,
        })
    }
}

fn yes(flag: bool) -> String {
    if flag { "yes" } else { "no" }.to_string()
}
