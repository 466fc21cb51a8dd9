//! `baton up`: a whole cluster on this machine, each service a process of its own.
//!
//! In order: the model ([`model`]), the addresses ([`addresses`]), what to start ([`plan`], pure), whether the services
//! understand it ([`check`]), the supervisor ([`supervise`]: restarts by [`restart`], pure; logs by [`logs`]), and the
//! wait until it serves ([`ready`]).

mod addresses;
mod args;
mod check;
mod error;
mod logs;
mod model;
mod plan;
mod ready;
mod restart;
mod signals;
mod supervise;

pub(crate) use args::UpArgs;
pub(crate) use error::UpError;

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use baton_checkpoint::ModelRoot;
use baton_process::Listen;
use tokio_util::sync::CancellationToken;

use crate::{
    run_file::{RunFile, cache_directory, runs_directory},
    screen::{Screen, say},
};
use addresses::Addresses;
use supervise::{Stop, Supervisor};

/// What a shell reports of a program that Ctrl-C ended: this one ended before it was done.
const FORCED: u8 = 130;

/// Runs until the user ends it, or until it cannot go on.
pub(crate) async fn run(args: UpArgs) -> Result<ExitCode, UpError> {
    let screen = Screen::new();
    let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
    signals::watch(&stop, &kill, args.supervised)?;

    let cache = args.cache_dir.clone().or_else(cache_directory).ok_or(UpError::NoHome("--cache-dir"))?;
    if args.fetch_only {
        let path = cancellable(&stop, model::fetch(&cache, &screen)).await?;
        say(&path.display().to_string());
        return Ok(ExitCode::SUCCESS);
    }
    let programs = plan::Programs::beside_this_one()?;
    args.check_counts()?;
    // Whatever can be told at once is told before anything slow begins.
    if args.model.is_empty() {
        model::prepare(&cache)?;
    }
    let root = ModelRoot::at(&plan::model_root(&args.set)).map_err(UpError::ModelRoot)?;
    let given = model::check_all(&args.model, &root).await?;
    // Readiness is asked in plaintext: whoever shows certificates to clients may ask them for some, too.
    let own = plan::is_https(&args.set).then(Listen::loopback);
    let addresses = Addresses::bind(&args.listen, args.metrics_listen.as_ref().or(own.as_ref()))?;
    let run_dir = run_directory(&args, &addresses)?;
    let models = if given.is_empty() {
        model::check_all(&[cancellable(&stop, model::fetch(&cache, &screen)).await?], &root).await?
    } else {
        given
    };
    let plan = plan::plan(&args, &programs, (&models, &cache), &addresses, &run_dir)?;
    let reached = cancellable(&stop, check::check(&plan)).await?;

    let run_file = RunFile {
        pid: std::process::id(),
        started_unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        ready: false,
        models,
        url: format!(
            "{}://{}",
            if reached.is_https { "https" } else { "http" },
            addresses::reachable(addresses.http)
        ),
        controller: addresses.controller.to_string(),
        coordinator: addresses.coordinator_admin.to_string(),
        processes: Vec::new(),
    };
    let probed = addresses.probed(&reached.metrics_listen)?;
    let supervisor =
        Supervisor::start(plan, addresses.listeners, run_file, run_dir, screen.clone(), args.verbose)?;
    let ended = tokio::select! {
        error = supervisor.gave_up() => Err(error),
        served = serve(&supervisor, &screen, (&args, probed)) => served,
        () = stop.cancelled() => Ok(()),
    };
    let how = supervisor.stop(&kill).await;
    ended.map(|()| if how == Stop::Forced { ExitCode::from(FORCED) } else { ExitCode::SUCCESS })
}

/// The model that is served when none is named, fetched if need be.
pub(crate) async fn default_model() -> Result<PathBuf, UpError> {
    let cache = cache_directory().ok_or(UpError::NoHome("--model"))?;
    model::prepare(&cache)?;
    model::fetch(&cache, &Screen::new()).await
}

/// Waits until the cluster serves, says so, and then for ever.
async fn serve(
    supervisor: &Supervisor,
    screen: &Screen,
    (args, probed): (&UpArgs, SocketAddr),
) -> Result<(), UpError> {
    let run = supervisor.run_file();
    ready::wait(&run, (probed, args.instances() as usize * run.models.len()), screen).await?;
    supervisor.mark_ready();
    say(&ready::greeting(&run, supervisor.run_dir(), args.run_dir.is_some()));
    std::future::pending().await
}

async fn cancellable<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, UpError>>,
) -> Result<T, UpError> {
    tokio::select! {
        result = work => result,
        () = stop.cancelled() => Err(UpError::Interrupted),
    }
}

/// One per listening address, so that two clusters never share one.
fn run_directory(args: &UpArgs, addresses: &Addresses) -> Result<PathBuf, UpError> {
    let directory = match &args.run_dir {
        Some(directory) => directory.clone(),
        None => {
            let name = addresses.http.to_string().replace([':', '[', ']'], "-");
            runs_directory().ok_or(UpError::NoHome("--run-dir"))?.join(name)
        }
    };
    // What has our own id was left by an earlier process: in a container, every start has the same one.
    let is_in_use = |run: &RunFile| run.is_alive() && run.pid != std::process::id();
    if let Some(other) = RunFile::read(&directory).filter(is_in_use) {
        return Err(UpError::RunDirInUse { path: directory, pid: other.pid });
    }
    std::fs::create_dir_all(&directory)
        .and_then(|()| directory.canonicalize())
        .map_err(|source| UpError::RunDir { path: directory, source })
}
