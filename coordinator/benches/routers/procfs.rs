//! What the kernel says of a router: processor time and memory of its process and all that it has started.

use std::{collections::HashMap, fs};

use rustix::param::clock_ticks_per_second;

use crate::error::BenchError;

/// A process's parent and processor time, in ticks, its own and that of the children it has waited for.
struct Stat {
    parent: u32,
    ticks: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets, which may hold anything; see proc(5).
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let parent = fields.get(1)?.parse().ok()?;
    let ticks = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(Stat { parent, ticks })
}

fn numbers_in(folder: &str) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A process and all that descend from it.
fn tree(root: u32) -> HashMap<u32, Stat> {
    let mut others: HashMap<u32, Stat> =
        numbers_in("/proc").into_iter().filter_map(|pid| Some((pid, stat(pid)?))).collect();
    let mut tree = HashMap::new();
    let mut found = vec![root];
    while let Some(pid) = found.pop() {
        found.extend(others.iter().filter(|(_, stat)| stat.parent == pid).map(|(pid, _)| *pid));
        tree.extend(others.remove(&pid).map(|stat| (pid, stat)));
    }
    tree
}

/// Processor time, user and system, up to now.
pub(crate) struct CpuTime {
    /// utime + stime of all processes: nothing is lost, and it is told to a hundredth of a second.
    millis: f64,
    /// By thread, to the nanosecond; what a thread that has ended had is lost.
    threads: HashMap<(u32, u32), u64>,
}

impl CpuTime {
    pub(crate) fn of(root: u32) -> Self {
        let tree = tree(root);
        let ticks: u64 = tree.values().map(|stat| stat.ticks).sum();
        let mut threads = HashMap::new();
        for pid in tree.into_keys() {
            for thread in numbers_in(&format!("/proc/{pid}/task")) {
                let path = format!("/proc/{pid}/task/{thread}/schedstat");
                let nanos = fs::read_to_string(path).ok();
                let nanos = nanos.and_then(|text| text.split_ascii_whitespace().next()?.parse().ok());
                threads.insert((pid, thread), nanos.unwrap_or(0));
            }
        }
        Self { millis: ticks as f64 * 1e3 / clock_ticks_per_second() as f64, threads }
    }

    /// Milliseconds since `before`: by thread, unless threads that have ended had a part of it.
    pub(crate) fn millis_since(&self, before: &Self) -> f64 {
        /// Two readings are off by a tick each.
        const OFF_MILLIS: f64 = 20.0;
        let nanos: u64 = self
            .threads
            .iter()
            .map(|(thread, nanos)| nanos.saturating_sub(before.threads.get(thread).copied().unwrap_or(0)))
            .sum();
        let (told, exact) = (self.millis - before.millis, nanos as f64 / 1e6);
        if told - exact > OFF_MILLIS { told } else { exact }
    }
}

/// From here on the most memory is looked for anew; see `clear_refs` in proc(5).
pub(crate) fn forget_peak(root: u32) {
    for pid in tree(root).into_keys() {
        // Who may not have it forgotten is told the most since the start.
        let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
    }
}

/// Most megabytes (10^6) of memory in use, since [`forget_peak`].
pub(crate) fn peak_megabytes(root: u32) -> Result<f64, BenchError> {
    let mut kib = 0;
    for pid in tree(root).into_keys() {
        let path = format!("/proc/{pid}/status");
        let status = fs::read_to_string(&path).map_err(BenchError::io(format!("read {path}")))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        kib += line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(kib as f64 * 1024.0 / 1e6)
}
