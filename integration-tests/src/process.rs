//! Real processes: started, signalled by pid, and never left behind.

use std::{
    fs::File,
    io::Read,
    net::TcpListener,
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// The lines of a log, or of what was said instead, that tell of a panic.
pub fn panics(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| line.contains(baton_process::PANIC_LOGGED) || line.contains("panicked at"))
}

/// A child that does not outlive its test.
pub struct Service(pub Child);

impl Service {
    /// Starts it; what it says goes to a file.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let log = File::create(log).expect("a log file");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file can be shared")).stderr(log);
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// host:port that nobody listens at, and that nobody is given meanwhile who asks the system for any.
pub fn free_address() -> String {
    free_ports(1)
}

/// The first of so many ports in a row that nobody listens at and that were not given before, below those that the system hands
/// out by itself.
pub fn free_ports(count: u16) -> String {
    static NEXT: Mutex<u16> = Mutex::new(20_000);
    let mut next = NEXT.lock().expect("nobody panics with it");
    let is_free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let begin = (*next..32_000 - count).step_by(usize::from(count));
    let first = begin.into_iter().find(|first| (*first..first + count).all(is_free)).expect("ports in a row");
    *next = first + count;
    format!("127.0.0.1:{first}")
}

/// Sends a signal to a process of this test's own.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a pid is positive");
    kill_process(pid, signal).unwrap_or_else(|error| panic!("cannot signal {pid:?}: {error}"));
}

/// Whether a process still runs (a zombie does not).
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('Z' | 'X'))
    })
}

/// Waits for a child to end by itself.
pub fn wait_exit(child: &mut Child, patience: Duration) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status;
        }
        if begin.elapsed() > patience {
            let _ = child.kill();
            panic!("process {} did not end within {patience:?}", child.id());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts one of our programs with arguments that must fail: it ends by itself, with an error's status, and with one line that
/// says why, which is returned.
pub fn refused(program: &str, arguments: &[&str]) -> String {
    let child = Command::new(crate::binary(program))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let Output { status, stderr, .. } = finish(child, Duration::from_secs(60));
    let said = String::from_utf8_lossy(&stderr);
    let what = format!("{program} {arguments:?} ended with {status}: {said}");
    assert!(status.code().is_some_and(|code| code != 0), "{what}");
    assert_eq!(panics(&said).count(), 0, "{what}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("not one error: {what}") };
    error.to_owned()
}

/// Runs a child whose pipes are captured to its end, however little time it is given.
pub fn finish(mut child: Child, patience: Duration) -> Output {
    let mut pipes = (child.stdout.take(), child.stderr.take());
    let readers = std::thread::spawn(move || {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let stdout = pipes.0.as_mut().map(|pipe| pipe.read_to_end(&mut out));
        let stderr = pipes.1.as_mut().map(|pipe| pipe.read_to_end(&mut err));
        for read in [stdout, stderr].into_iter().flatten() {
            read.expect("a child's pipe can be read");
        }
        (out, err)
    });
    let status = wait_exit(&mut child, patience);
    let (stdout, stderr) = readers.join().expect("the readers do not panic");
    Output { status, stdout, stderr }
}
