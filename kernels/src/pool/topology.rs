//! Which physical cores this process may use, read from what Linux shows in /proc and /sys.

use std::collections::BTreeSet;

/// One logical CPU of each physical core in the affinity mask, ascending; empty where the system doesn't say.
pub(super) fn cores() -> Vec<usize> {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return Vec::new() };
    let Some(allowed) = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")) else {
        return Vec::new();
    };
    distinct(&parse_list(allowed), |cpu| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    })
}

/// The first of `allowed` on each core; a CPU whose siblings are unknown counts as a core.
fn distinct(allowed: &[usize], siblings: impl Fn(usize) -> Option<String>) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    let mut cores = Vec::new();
    for &cpu in allowed {
        let core = siblings(cpu).and_then(|list| parse_list(&list).first().copied()).unwrap_or(cpu);
        if seen.insert(core) {
            cores.push(cpu);
        }
    }
    cores
}

/// Linux's list of CPUs, as in `0-3,8,10-11`; parts that aren't numbers are skipped.
fn parse_list(text: &str) -> Vec<usize> {
    /// More CPUs than any kernel is built for.
    const MOST: usize = 1 << 16;
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>()) {
            cpus.extend(first..=last.min(MOST));
        }
    }
    cpus.into_iter().collect()
}

/// Binds the calling thread to a CPU; without effect where that can't be done.
pub(super) fn pin(cpu: usize) {
    #[cfg(target_os = "linux")]
    {
        if cpu >= libc::CPU_SETSIZE as usize {
            return;
        }
        // SAFETY: an all-zero cpu_set_t is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: cpu < CPU_SETSIZE, so that the bit lies in the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
        // SAFETY: 0 names the calling thread, and the size given is that of the set that is pointed at. A refusal
        // leaves the thread unbound, which is what the caller documents.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cpu;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_as_linux_writes_them() {
        assert_eq!(parse_list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse_list("\t5\n"), [5]);
        assert_eq!(parse_list(""), []);
        assert_eq!(parse_list("3-1,x,7-,2"), [2]);
        assert!(parse_list("0-18446744073709551615").len() <= (1 << 16) + 1);
    }

    #[test]
    fn smt_siblings_are_one_core_and_unknown_ones_are_cores() {
        // Siblings as on many servers: cpu n and n + 4 share a core.
        let paired = |cpu: usize| Some(format!("{},{}", cpu % 4, cpu % 4 + 4));
        assert_eq!(distinct(&[0, 1, 2, 3, 4, 5, 6, 7], paired), [0, 1, 2, 3]);
        assert_eq!(distinct(&[1, 5, 6], paired), [1, 6]);
        assert_eq!(distinct(&[0, 1], |_| None), [0, 1]);
        assert_eq!(distinct(&[], paired), []);
    }

    #[test]
    fn a_pinned_thread_may_use_its_cpu_only() {
        let Some(&cpu) = cores().last() else { return };
        std::thread::spawn(move || {
            pin(cpu);
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
            assert_eq!(parse_list(allowed), [cpu]);
        })
        .join()
        .unwrap();
    }
}
