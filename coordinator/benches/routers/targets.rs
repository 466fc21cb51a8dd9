//! Who is measured, and how each of them is started: Baton's coordinator as it is, but that it hands every prompt over, the
//! others in their mode for prefill and decode apart, with their logs at warnings and everything else as they are by default.

use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
};

use baton_proto::InstanceSpec;
use baton_registry::{
    EtcdConfig, EtcdStore, Store, Txn, keys, records,
    testing::{EtcdServer, instance_spec},
};
use clap::ValueEnum;
use tokio::process::{Child, Command};

use crate::{
    error::BenchError,
    lines::Line,
    protocol::{Listens, Spelling, WorkerReady},
    words::Words,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub(crate) enum Target {
    /// The worker itself: what the others add to.
    Direct,
    /// A process that only writes what is streamed: what the kernel takes of every router.
    Floor,
    Baton,
    /// The coordinator, asked with token ids: without the work of tokenising.
    BatonIds,
    SglangRouter,
    Smg,
    VllmRouter,
}

impl Target {
    pub(crate) const ALL: [Self; 7] = [
        Self::Direct,
        Self::Floor,
        Self::Baton,
        Self::BatonIds,
        Self::SglangRouter,
        Self::Smg,
        Self::VllmRouter,
    ];
    pub(crate) const PEERS: [Self; 3] = [Self::SglangRouter, Self::Smg, Self::VllmRouter];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Floor => "writes alone",
            Self::Baton => "baton",
            Self::BatonIds => "baton, ids",
            Self::SglangRouter => "sglang-router",
            Self::Smg => "smg",
            Self::VllmRouter => "vllm-router",
        }
    }

    /// Whether it has an answer to that.
    pub(crate) fn answers(self, line: &Line) -> bool {
        self != Self::Floor || line.answer.is_streamed()
    }

    pub(crate) fn spelling(self) -> Spelling {
        if self == Self::BatonIds { Spelling::Ids } else { Spelling::Chat }
    }
}

/// The programs, by path.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Programs {
    /// The coordinator's program [default: the one that was built along with this one]
    #[arg(long, value_name = "PATH")]
    coordinator: Option<PathBuf>,
    /// sglang-router's launcher; without it its column is empty.
    #[arg(long, value_name = "PATH")]
    sglang_router: Option<PathBuf>,
    /// smg's launcher; without it its column is empty.
    #[arg(long, value_name = "PATH")]
    smg: Option<PathBuf>,
    /// vllm-router's launcher; without it its column is empty.
    #[arg(long, value_name = "PATH")]
    vllm_router: Option<PathBuf>,
}

impl Programs {
    /// `None`: it was not named.
    pub(crate) fn of(&self, target: Target) -> Option<PathBuf> {
        match target {
            Target::Direct | Target::Floor => None,
            Target::Baton | Target::BatonIds => {
                let built = || env!("CARGO_BIN_EXE_baton-coordinator").into();
                Some(self.coordinator.clone().unwrap_or_else(built))
            }
            Target::SglangRouter => self.sglang_router.clone(),
            Target::Smg => self.smg.clone(),
            Target::VllmRouter => self.vllm_router.clone(),
        }
    }
}

/// A router that runs; it is killed when this is dropped.
pub(crate) struct Router {
    pub(crate) address: String,
    pub(crate) pid: u32,
    _child: Child,
    /// What its instances are registered in.
    _store: Option<EtcdServer>,
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16, BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    Ok(listener.map_err(BenchError::io("find a free port"))?.port())
}

fn start(
    program: &Path,
    arguments: Vec<String>,
    (address, logs): (String, &Path),
    store: Option<EtcdServer>,
) -> Result<Router, BenchError> {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let log = File::create(logs.join(format!("{name}.log"))).map_err(BenchError::io("write a log"))?;
    let also = log.try_clone().map_err(BenchError::io("write a log"))?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(also)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| BenchError::Start { program: program.to_owned(), source })?;
    let pid = child.id().ok_or_else(|| BenchError::said(name.to_string(), "it has no process id"))?;
    Ok(Router { address, pid, _child: child, _store: store })
}

/// The coordinator, with an etcd in which the worker's instances are registered.
pub(crate) async fn coordinator(
    program: &Path,
    model: &Path,
    (words, worker, logs): (&Words, &WorkerReady, &Path),
) -> Result<Router, BenchError> {
    let etcd = EtcdServer::start().await;
    let config = EtcdConfig::new([etcd.endpoint()]);
    let store = EtcdStore::new(&config)?;
    for instance in worker.prefill.iter().chain(&worker.decode) {
        let spec = spec(instance, words);
        let put = Txn::new().put(keys::instance(&spec.id), records::encode_spec(&spec), None);
        store.txn(put).await?;
    }
    let address = format!("127.0.0.1:{}", free_port()?);
    let endpoints = format!("store.etcd.endpoints=[\"{}\"]", etcd.endpoint());
    let arguments = [
        "--model",
        &model.display().to_string(),
        "--listen",
        &address,
        "--admin-listen",
        &format!("127.0.0.1:{}", free_port()?),
        "--set",
        &endpoints,
        // Room for as many streams as may be asked for.
        "--set",
        "limits.max_connections=20000",
        "--set",
        "limits.max_concurrent=20000",
        "--set",
        "placement.local_prefill_tokens=0",
    ];
    let arguments = arguments.into_iter().map(str::to_owned).collect();
    start(program, arguments, (address, logs), Some(etcd))
}

fn spec(instance: &Listens, words: &Words) -> InstanceSpec {
    let mut spec = instance_spec(&instance.id, 1);
    spec.model.name = words.model.clone();
    spec.model.revision = words.revision.clone();
    spec.model.vocabulary_size = words.vocabulary;
    spec.context_tokens = 131_072;
    spec.inference_endpoint = instance.grpc.clone();
    spec.handoff_endpoint = instance.grpc.clone();
    spec
}

/// One of the others.
pub(crate) fn peer(
    target: Target,
    program: &Path,
    (worker, logs): (&WorkerReady, &Path),
) -> Result<Router, BenchError> {
    let port = free_port()?.to_string();
    let metrics = free_port()?.to_string();
    let mut arguments: Vec<String> = Vec::new();
    let apart = if target == Target::VllmRouter { "--vllm-pd-disaggregation" } else { "--pd-disaggregation" };
    let warnings = if target == Target::VllmRouter { "warning" } else { "warn" };
    for argument in [
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        apart,
        "--log-level",
        warnings,
        "--prometheus-host",
        "127.0.0.1",
        "--prometheus-port",
        &metrics,
        // Of the workers at the start, which are up already.
        "--worker-startup-check-interval",
        "1",
    ] {
        arguments.push(argument.to_owned());
    }
    for (number, prefill) in worker.prefill.iter().enumerate() {
        arguments.extend(["--prefill".to_owned(), format!("http://{}", prefill.http)]);
        // The port is only told to the workers, which do not use it.
        if target != Target::VllmRouter {
            arguments.push((9_000 + number).to_string());
        }
    }
    for decode in &worker.decode {
        arguments.extend(["--decode".to_owned(), format!("http://{}", decode.http)]);
    }
    start(program, arguments, (format!("127.0.0.1:{port}"), logs), None)
}
