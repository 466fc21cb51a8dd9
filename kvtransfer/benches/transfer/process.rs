//! What the kernel says of processes: their processor time and memory. And running programs that must end in time.

use std::{
    fs, io,
    path::Path,
    process::{Output, Stdio},
    time::Duration,
};

use rustix::{
    param::clock_ticks_per_second,
    time::{ClockId, clock_gettime},
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::error::BenchError;

/// Nanoseconds of a clock that all processes of the machine share.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Processor time, user and system, that a process has had so far, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64, BenchError> {
    times(&format!("/proc/{pid}/stat"), 0)
}

/// Processor time of this process.
pub(crate) fn own_cpu_seconds() -> Result<f64, BenchError> {
    times("/proc/self/stat", 0)
}

/// Processor time of children of this process that have ended and been waited for.
pub(crate) fn ended_cpu_seconds() -> Result<f64, BenchError> {
    times("/proc/self/stat", 2)
}

/// The sum of two neighbours among utime, stime, cutime, cstime; see proc(5).
fn times(path: &str, from: usize) -> Result<f64, BenchError> {
    let stat = fs::read_to_string(path).map_err(BenchError::io(format!("read {path}")))?;
    // The second field is the program's name in brackets, which may hold anything; utime is the fourteenth.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    let ticks: Vec<u64> = fields.skip(11 + from).take(2).filter_map(|field| field.parse().ok()).collect();
    match ticks[..] {
        [user, system] => Ok((user + system) as f64 / clock_ticks_per_second() as f64),
        _ => Err(BenchError::said(path, stat)),
    }
}

/// The most memory that a process has had in use so far, in bytes.
pub(crate) fn peak_rss_bytes(pid: u32) -> Result<u64, BenchError> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(BenchError::io(format!("read {path}")))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| BenchError::said(path, status))
}

/// A child that is killed when it is dropped.
pub(crate) fn spawn(command: &mut Command) -> Result<Child, BenchError> {
    let started = command.stdin(Stdio::null()).kill_on_drop(true).spawn();
    let program = Path::new(command.as_std().get_program()).to_owned();
    started.map_err(|source| BenchError::Start { program, source })
}

/// Runs a program to its end, and kills it if that takes too long.
pub(crate) async fn run(command: &mut Command, limit: Duration) -> Result<Output, BenchError> {
    let what = Path::new(command.as_std().get_program()).display().to_string();
    let child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    within(&what, limit, child.wait_with_output()).await?.map_err(BenchError::io(format!("wait for {what}")))
}

/// Bounds a wait.
pub(crate) async fn within<T>(
    what: &str,
    limit: Duration,
    future: impl Future<Output = T>,
) -> Result<T, BenchError> {
    timeout(limit, future).await.map_err(|_| BenchError::Late { what: what.to_owned(), limit })
}

/// Lines of a child, up to the first that `wanted` makes something of.
pub(crate) async fn wait_for_line<T>(
    what: &str,
    limit: Duration,
    lines: &mut tokio::io::Lines<impl tokio::io::AsyncBufRead + Unpin>,
    wanted: impl Fn(&str) -> Option<T>,
) -> Result<T, BenchError> {
    let mut words = String::new();
    let search = async {
        loop {
            match lines.next_line().await? {
                Some(line) => match wanted(&line) {
                    Some(found) => return Ok(Some(found)),
                    None => words.push_str(&format!("{line}; ")),
                },
                None => return io::Result::Ok(None),
            }
        }
    };
    let found = within(what, limit, search).await?.map_err(BenchError::io(format!("read from {what}")))?;
    found.ok_or_else(|| BenchError::said(what, words))
}
