//! `nibble doctor`: whether this machine has what nibble needs, in a line each.

use super::Run;
use crate::limits::Limits;
use crate::output::{self, bytes};
use crate::session::Session;
use anyhow::{Result, bail};
use nibble_kernels::{Isa, Pool, probe};
use nibble_models::hub::{self, HubOptions};
use nibble_quant::format::free_space;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// How long the hub may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Below this, most models can't be had from the hub, nor written.
const LITTLE_SPACE: u64 = 5_000_000_000;
/// Below this, a model of a billion parameters can't be made small.
const LITTLE_MEMORY: u64 = 1_000_000_000;

/// Check this machine: processor and kernels, memory, GPU, hub, cache and disk, a line each with what would help
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: nibble doctor
Example: nibble doctor --offline --json

Every kernel that this processor can run multiplies numbers whose products are known, and so do the first GPU's if nibble was
built with --features cuda. A wrong product ends with exit code 1; what is only missing or scarce doesn't.")]
pub struct Doctor {
    /// Don't ask the hub
    #[arg(long)]
    offline: bool,
}

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    found: String,
    /// What would help; none if nothing has to.
    remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// Something nibble can do without.
    Absent,
    Scarce,
    Wrong,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Absent => "absent",
            State::Scarce => "scarce",
            State::Wrong => "WRONG",
        }
    }
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, state: State::Ok, found: found.into(), remedy: None }
    }

    fn not(state: State, check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, state, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn line(&self) -> String {
        let remedy = self.remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default();
        format!("{:<7} {:<9} {}{remedy}", self.state.word(), self.check, self.found)
    }
}

impl Run for Doctor {
    fn run(self, session: &Session) -> Result<()> {
        let pool = Pool::new(Pool::default_threads());
        let mut findings = Vec::new();
        let mut say = |finding: Finding| -> Result<()> {
            if !session.json {
                output::say(&finding.line())?;
            }
            findings.push(finding);
            Ok(())
        };
        say(Finding::ok("nibble", format!("{}, {}", env!("CARGO_PKG_VERSION"), features())))?;
        say(instructions())?;
        say(kernels(&pool)?)?;
        say(Finding::ok("limits", Limits::of(&pool).line()))?;
        say(memory())?;
        say(gpu())?;
        let options = HubOptions::from_env();
        say(match &options {
            Ok(options) => self.hub(options),
            Err(error) => Finding::not(State::Absent, "hub", error.to_string(), "checkpoints in folders work without"),
        })?;
        if let Ok(options) = &options {
            say(folder("cache", &options.cache, "set HF_HUB_CACHE to a folder that has room"))?;
        }
        say(folder("disk", Path::new("."), "run nibble where there is room, or give -o such a folder"))?;
        if session.json {
            output::json(&findings)?;
        }
        match findings.iter().find(|finding| finding.state == State::Wrong) {
            Some(wrong) => bail!("{}: {}", wrong.check, wrong.found),
            None => Ok(()),
        }
    }
}

impl Doctor {
    fn hub(&self, options: &HubOptions) -> Finding {
        let endpoint = &options.endpoint;
        if options.offline {
            return Finding::not(State::Absent, "hub", "HF_HUB_OFFLINE is set", "unset it to fetch models");
        }
        if self.offline {
            return Finding::ok("hub", format!("{endpoint} was not asked"));
        }
        match hub::greet(options, PATIENCE) {
            Ok(Some(name)) => Finding::ok("hub", format!("{endpoint} answers, and knows the token as {name}'s")),
            Ok(None) => Finding::ok("hub", format!("{endpoint} answers; no token, so public models only")),
            Err(error) => {
                let remedy = match options.token {
                    Some(_) => "check the network, HF_ENDPOINT and HF_TOKEN",
                    None => "check the network and HF_ENDPOINT; checkpoints in folders work without",
                };
                Finding::not(State::Absent, "hub", error.to_string(), remedy)
            }
        }
    }
}

fn features() -> &'static str {
    match (cfg!(feature = "cuda"), cfg!(feature = "ort")) {
        (true, true) => "built with CUDA and ONNX Runtime",
        (true, false) => "built with CUDA",
        (false, true) => "built with ONNX Runtime",
        (false, false) => "built for the CPU",
    }
}

fn instructions() -> Finding {
    let present: Vec<&str> = Isa::ALL.iter().filter(|isa| isa.is_present()).map(|isa| isa.name()).collect();
    let widest = present.last().copied().unwrap_or_default();
    let name = processor().unwrap_or_else(|| std::env::consts::ARCH.to_string());
    let found = format!("{name}: {}; in use: {}", present.join(", "), Isa::best());
    if Isa::best().name() != widest {
        return Finding::not(State::Scarce, "CPU", found, "unset NIBBLE_ISA to use all of it");
    }
    if Isa::best() == Isa::Scalar {
        return Finding::not(State::Scarce, "CPU", found, "AVX2 (x86-64 since 2013) would be many times as fast");
    }
    Finding::ok("CPU", found)
}

/// The processor's name as the system knows it.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_string())
}

fn kernels(pool: &Pool) -> Result<Finding> {
    let (count, wrong) = probe::cpu(pool)?;
    Ok(judged("kernels", count, &wrong, "of this CPU; NIBBLE_ISA=avx2 or scalar may avoid them; please report it"))
}

fn judged(check: &'static str, count: usize, wrong: &[probe::Wrong], remedy: &str) -> Finding {
    if wrong.is_empty() {
        return Finding::ok(check, format!("{count} products of known numbers are right"));
    }
    let words: Vec<String> = wrong.iter().map(|w| format!("{} is off by {:.1e}", w.kernel, w.error)).collect();
    Finding::not(State::Wrong, check, format!("{} of {count} products: {}", wrong.len(), words.join(", ")), remedy)
}

fn memory() -> Finding {
    let read = || {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        Some((value("MemTotal:")? * 1024, value("MemAvailable:")? * 1024))
    };
    match read() {
        None => Finding::ok("memory", "this system doesn't say how much there is"),
        Some((total, free)) => {
            let found = format!("{} of {} free", bytes(free), bytes(total));
            if free < LITTLE_MEMORY {
                let remedy = "end other programs; nibble quantize --dry-run says what a conversion needs";
                return Finding::not(State::Scarce, "memory", found, remedy);
            }
            Finding::ok("memory", found)
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> Finding {
    use nibble_kernels::KernelError;
    use nibble_kernels::cuda::{Cuda, driver::Driver};
    let asked = || -> Result<(String, f64, usize, Vec<probe::Wrong>), KernelError> {
        let driver = Driver::open(0)?;
        let (name, copies) = (driver.name()?, driver.copy_bytes_per_second()?);
        let (count, wrong) = probe::gpu(&Cuda::new(driver)?)?;
        Ok((name, copies, count, wrong))
    };
    match asked() {
        Err(error) => Finding::not(State::Absent, "GPU", error.to_string(), "models run on the CPU"),
        Ok((name, copies, count, wrong)) => {
            let mut finding = judged("GPU", count, &wrong, "please report it; models run on the CPU");
            finding.found = format!("{name}: copies reach {:.2} TB/s; {}", copies / 1e12, finding.found);
            finding
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Finding {
    let remedy = "`cargo build --release --features cuda` builds one that does, on any machine";
    Finding::not(State::Absent, "GPU", "this nibble doesn't use any", remedy)
}

/// A folder that files are written to, or its nearest parent that is there.
fn folder(check: &'static str, path: &Path, remedy: &'static str) -> Finding {
    let name = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let Some(there) = name.ancestors().find(|folder| folder.is_dir()) else {
        return Finding::not(State::Scarce, check, format!("{}: no such folder", name.display()), remedy);
    };
    match free_space(there) {
        Err(error) => Finding::not(State::Scarce, check, format!("{}: {error}", there.display()), remedy),
        Ok(free) => {
            let found = format!("{} free in {}", bytes(free), name.display());
            // Asked by doing it: permissions, read-only file systems and quotas all count.
            if let Err(error) = tempfile::tempfile_in(there) {
                let found = format!("{}: can't be written to: {error}", there.display());
                return Finding::not(State::Scarce, check, found, remedy);
            }
            if free < LITTLE_SPACE {
                return Finding::not(State::Scarce, check, found, remedy);
            }
            Finding::ok(check, found)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_products_are_named_with_what_would_help() {
        let wrong = [probe::Wrong { kernel: "gemm_x".to_string(), error: 0.25 }];
        let finding = judged("kernels", 3, &wrong, "do that");
        assert_eq!(finding.state, State::Wrong);
        assert_eq!(finding.line(), "WRONG   kernels   1 of 3 products: gemm_x is off by 2.5e-1; do that");
        assert_eq!(judged("kernels", 3, &[], "do that").state, State::Ok);
    }

    #[test]
    fn folders_are_asked_whether_they_can_be_written_to() {
        let place = tempfile::tempdir().unwrap();
        // A folder that isn't there yet is judged by its parent.
        let finding = folder("cache", &place.path().join("a/b"), "move");
        assert!(matches!(finding.state, State::Ok | State::Scarce), "{finding:?}");
        assert!(finding.found.contains(" free in "), "{finding:?}");
        let finding = folder("cache", Path::new("/proc"), "move");
        assert_eq!((finding.state, finding.remedy.as_deref()), (State::Scarce, Some("move")), "{finding:?}");
    }
}
