//! Keeps processes running: starts each, starts it again when it dies ([`super::restart`] decides when), and stops them
//! in the order that lets requests finish: coordinator, servers, controller.
//!
//! Every child is in a process group of its own (the terminal's Ctrl-C is for us alone) and holds the other end of a
//! pipe on its standard input, so that it ends when we do, however we end.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    UpError,
    addresses::Listeners,
    logs::{Log, Words},
    plan::{ChildSpec, FIRST_INHERITED_FD, Service, Socket},
    restart::{Decision, RestartPolicy},
};
use crate::{
    run_file::{ProcessEntry, RunFile},
    screen::Screen,
};

/// How long the rest of a dead process's output is waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// All processes of one cluster.
pub(super) struct Supervisor {
    keepers: Vec<Keeper>,
    shared: Arc<Shared>,
}

/// How a stop went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    InOrder,
    /// It was cut short: requests may have been cut off.
    Forced,
}

/// One process and the task that keeps it running.
struct Keeper {
    service: Service,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

struct Shared {
    run: Mutex<RunFile>,
    run_dir: PathBuf,
    screen: Screen,
    listeners: Listeners,
    served: AtomicBool,
    kill: CancellationToken,
    given_up: CancellationToken,
    cause: Mutex<Option<UpError>>,
}

impl Supervisor {
    /// Starts every process of the plan and the tasks that keep them.
    pub(super) fn start(
        plan: Vec<ChildSpec>,
        listeners: Listeners,
        mut run: RunFile,
        run_dir: PathBuf,
        screen: Screen,
        verbose: bool,
    ) -> Result<Self, UpError> {
        let unwritable = |path: &Path| {
            let path = path.to_owned();
            move |source| UpError::RunDir { path, source }
        };
        let mut logs = Vec::new();
        for spec in &plan {
            let log = Log::create(&run_dir, &spec.name, verbose.then(|| screen.clone()));
            let log = log.map_err(unwritable(&run_dir))?;
            run.processes.push(ProcessEntry {
                name: spec.name.clone(),
                pid: None,
                restarts: 0,
                config: spec.config.clone(),
                log: log.path().to_owned(),
            });
            logs.push(log);
        }
        run.write(&run_dir).map_err(unwritable(&run_dir))?;
        let shared = Arc::new(Shared {
            run: Mutex::new(run),
            run_dir,
            screen,
            listeners,
            served: AtomicBool::new(false),
            kill: CancellationToken::new(),
            given_up: CancellationToken::new(),
            cause: Mutex::new(None),
        });
        let keep = |(index, (spec, log)): (usize, (ChildSpec, Log))| {
            let stop = CancellationToken::new();
            let service = spec.service;
            let task = tokio::spawn(keep(index, spec, log, stop.clone(), shared.clone()));
            Keeper { service, stop, task }
        };
        let keepers = plan.into_iter().zip(logs).enumerate().map(keep).collect();
        Ok(Self { keepers, shared })
    }

    /// Resolves when a process cannot be got to run.
    pub(super) async fn gave_up(&self) -> UpError {
        self.shared.given_up.cancelled().await;
        let cause = locked(&self.shared.cause).take();
        cause.unwrap_or(UpError::Interrupted)
    }

    pub(super) fn run_file(&self) -> RunFile {
        locked(&self.shared.run).clone()
    }

    pub(super) fn run_dir(&self) -> &Path {
        &self.shared.run_dir
    }

    /// The cluster serves: from now on no process is given up.
    pub(super) fn mark_ready(&self) {
        self.shared.served.store(true, Ordering::Relaxed);
        self.shared.change(|run| run.ready = true);
    }

    /// Stops all processes and waits for their ends. `kill` cuts every wait short; the answer says whether it did.
    pub(super) async fn stop(self, kill: &CancellationToken) -> Stop {
        let shared = self.shared.clone();
        shared.screen.line("stopping: letting running requests finish (Ctrl-C again stops at once)");
        let in_order = async {
            let mut keepers = self.keepers;
            for service in [Service::Coordinator, Service::Server, Service::Controller] {
                let (now, later): (Vec<_>, Vec<_>) =
                    keepers.into_iter().partition(|keeper| keeper.service == service);
                now.iter().for_each(|keeper| keeper.stop.cancel());
                for keeper in now {
                    // A keeper ends by itself; were it to panic, its child dies with the pipe that it held.
                    let _ = keeper.task.await;
                }
                keepers = later;
            }
        };
        tokio::pin!(in_order);
        let how = tokio::select! {
            () = &mut in_order => Stop::InOrder,
            () = kill.cancelled() => {
                shared.kill.cancel();
                in_order.await;
                Stop::Forced
            }
        };
        RunFile::remove(&shared.run_dir);
        shared.screen.line("stopped");
        how
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut RunFile)) {
        let mut run = locked(&self.run);
        change(&mut run);
        if let Err(error) = run.write(&self.run_dir) {
            self.screen.line(&format!("the run file cannot be written: {error}"));
        }
    }

    fn give_up(&self, error: UpError) {
        locked(&self.cause).get_or_insert(error);
        self.given_up.cancel();
    }

    fn socket(&self, socket: Socket) -> io::Result<OwnedFd> {
        let socket = match socket {
            Socket::Http => &self.listeners.http,
            Socket::Controller => &self.listeners.controller,
            Socket::CoordinatorAdmin => &self.listeners.coordinator_admin,
            Socket::CoordinatorMetrics => {
                self.listeners.coordinator_metrics.as_ref().ok_or(io::ErrorKind::NotFound)?
            }
        };
        socket.try_clone()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What these locks guard is whole after every statement.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// How one life ended.
enum Ended {
    Died { status: String, lived: Duration },
    Stopped,
}

/// Whether a process is to end for good: its turn has come, or all are to end at once.
fn is_over(stop: &CancellationToken, shared: &Shared) -> bool {
    stop.is_cancelled() || shared.kill.is_cancelled()
}

/// One process, over all its lives, until `stop` or the kill of all.
async fn keep(index: usize, spec: ChildSpec, mut log: Log, stop: CancellationToken, shared: Arc<Shared>) {
    let mut policy = RestartPolicy::default();
    let last = log.last();
    while !is_over(&stop, &shared) {
        let Ended::Died { status, lived } = live(index, &spec, &mut log, &stop, &shared).await else {
            return;
        };
        shared.change(|run| run.processes[index].pid = None);
        let words = last.take();
        match policy.died(lived, shared.served.load(Ordering::Relaxed)) {
            Decision::GiveUp { deaths } => {
                let (name, log) = (spec.name.clone(), log.path().to_owned());
                let last = match words {
                    Words::Error(words) | Words::Line(words) => words,
                    Words::Nothing => "it wrote nothing".to_owned(),
                };
                return shared.give_up(UpError::KeepsDying { name, deaths, status, last, log });
            }
            Decision::StartAfter(pause) => {
                let name = &spec.name;
                let why = if let Words::Error(error) = words { format!(": {error}") } else { String::new() };
                shared.screen.line(&format!("{name} died ({status}){why}; starting it again in {pause:?}"));
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => return,
                    () = shared.kill.cancelled() => return,
                }
                shared.change(|run| run.processes[index].restarts += 1);
            }
        }
    }
}

/// One life: from the start to the end that it or `stop` brings about.
async fn live(
    index: usize,
    spec: &ChildSpec,
    log: &mut Log,
    stop: &CancellationToken,
    shared: &Shared,
) -> Ended {
    let begin = Instant::now();
    let (mut child, output) = match spawn(spec, shared) {
        Ok(started) => started,
        Err(error) => {
            return Ended::Died { status: format!("it cannot be started: {error}"), lived: Duration::ZERO };
        }
    };
    shared.change(|run| run.processes[index].pid = child.id());
    // Held to the end of this life: waiting for a child would close what is left in it, and its end is our death.
    let _held = child.stdin.take();
    let follow = log.follow(output);
    tokio::pin!(follow);
    let (mut following, mut stopped) = (true, false);
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            _ = &mut follow, if following => following = false,
            () = stop.cancelled(), if !stopped => {
                stopped = true;
                terminate(&child);
            }
            () = too_late(stop, spec.grace, &shared.kill) => {
                // Fails only for a process that is gone, and then wait answers.
                let _ = child.start_kill();
                break child.wait().await;
            }
        }
    };
    if following {
        let _ = tokio::time::timeout(LAST_WORDS, follow).await;
    }
    if is_over(stop, shared) {
        return Ended::Stopped;
    }
    let status = status.map_or_else(|error| error.to_string(), describe);
    Ended::Died { status, lived: begin.elapsed() }
}

/// Resolves `grace` after the stop, or at once on `kill`.
async fn too_late(stop: &CancellationToken, grace: Duration, kill: &CancellationToken) {
    let expired = async {
        stop.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        () = expired => {}
        () = kill.cancelled() => {}
    }
}

fn spawn(spec: &ChildSpec, shared: &Shared) -> io::Result<(Child, OwnedFd)> {
    let (output, input) = io::pipe()?;
    let mut mappings = Vec::new();
    for (number, socket) in (FIRST_INHERITED_FD..).zip(&spec.sockets) {
        mappings.push(FdMapping { parent_fd: shared.socket(*socket)?, child_fd: number });
    }
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        .stdin(Stdio::piped())
        .stdout(input.try_clone()?)
        .stderr(input)
        .process_group(0)
        .kill_on_drop(true);
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    Ok((command.spawn()?, output.into()))
}

/// Asks a process to end.
fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // Not yet reaped, so the id is still its own; it may be a zombie, and then nothing happens.
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
#[path = "supervise_tests.rs"]
mod tests;
