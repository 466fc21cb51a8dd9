//! The whole life of a process: configuration, telemetry, the service's own work, and a shutdown with a deadline.
//!
//! States: starting -> running -> draining (someone asked, or an essential task ended) -> ended. Every way out leads
//! through [`run`], which answers with the exit status: 0 after a clean stop, 1 after an error, told in one line.

use std::{
    any::Any,
    future::Future,
    io::Write,
    num::NonZero,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::OnceLock,
    thread,
    time::Duration,
};

use tokio::runtime::Runtime;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    CommonArgs, ConfigError, Essential, HealthHandle, Https, HttpsConfig, Metrics, ProcessError,
    ServiceConfig, Tls, TlsConfig, TlsError, config,
    error::one_line,
    open_files, reference,
    settings::Invalid,
    signals,
    telemetry::Telemetry,
    tls::{self, Role},
};

/// What a service's main is given. Cheap to clone in its parts.
#[derive(Debug)]
pub struct Process<T> {
    pub config: T,
    /// Cancelled when the process is to stop. Main is expected to drain and return then.
    pub shutdown: CancellationToken,
    /// Every task that main spawns and does not await itself; the end waits for them.
    pub tasks: TaskTracker,
    pub metrics: Metrics,
    pub health: HealthHandle,
    /// Spawns what it cannot do without.
    pub essential: Essential,
    /// Of all its ports; none where all is plaintext.
    tls_counts: OnceLock<tls::Counts>,
}

impl<T: ServiceConfig> Process<T> {
    /// How long running work may take once `shutdown` is cancelled.
    pub fn drain(&self) -> Duration {
        self.config.drain()
    }

    /// Reads the TLS files of a process with this role; they are followed until then.
    pub fn tls(&self, config: &TlsConfig, own: Role, until: &CancellationToken) -> Result<Tls, TlsError> {
        Tls::start(config, own, || self.tls_counts(), until, &self.tasks)
    }

    /// Reads the files by which clients are served; they are followed until then. None: in plaintext.
    pub fn https(&self, config: &HttpsConfig, until: &CancellationToken) -> Result<Option<Https>, TlsError> {
        Https::start(config, || self.tls_counts(), until, &self.tasks)
    }

    /// Has the metrics say when a certificate ends that something else reads and shows; its file is followed until then.
    /// `setting` names it.
    pub fn watch_certificate(
        &self,
        setting: &'static str,
        path: &Path,
        until: &CancellationToken,
    ) -> Result<(), TlsError> {
        tls::watch(setting, path, self.tls_counts(), until, &self.tasks)
    }

    fn tls_counts(&self) -> tls::Counts {
        self.tls_counts.get_or_init(|| tls::Counts::register(&self.metrics)).clone()
    }
}

/// Runs a service from its flags to its exit status. `overrides` are dotted keys and values from the binary's own
/// flags; `--set` wins over them. `main` returns when its work is done or drained.
pub fn run<T, F, Fut, E>(
    service: &'static str,
    args: CommonArgs,
    overrides: Vec<(String, String)>,
    main: F,
) -> ExitCode
where
    T: ServiceConfig,
    F: FnOnce(Process<T>) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: std::error::Error + 'static,
{
    if args.config_schema {
        return say(&format!("{:#}\n", reference::schema::<T>(service)));
    }
    if args.config_reference {
        return match reference::page::<T>(service) {
            Ok(page) => say(&page),
            Err(error) => fail(&error),
        };
    }
    let config = match configure::<T>(service, args.config, &args.set, overrides) {
        Ok(config) => config,
        Err(error) => return fail(&error),
    };
    if args.check_config {
        return match config::render(&config) {
            Ok(text) => say(&text),
            Err(error) => fail(&error),
        };
    }
    open_files::raise();
    let runtime = match runtime(&config) {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(live(service, config, args.supervised, main));
    // Blocking work that is stuck must not hold the process: everything that had to end has ended by now.
    runtime.shutdown_background();
    code
}

/// Whoever reads no further has what they wanted.
fn say(text: &str) -> ExitCode {
    let _ = write!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}

fn configure<T: ServiceConfig>(
    service: &str,
    file: Option<PathBuf>,
    set: &[String],
    mut overrides: Vec<(String, String)>,
) -> Result<T, ConfigError> {
    overrides.extend(config::parse_set(set)?);
    let config: T =
        config::load(service, file.as_deref(), &overrides).map_err(|error| error.of_unserved(T::UNSERVED))?;
    let valid = config.process().validate().and_then(|()| config.validate());
    valid.map_err(|source: Invalid| ConfigError::Invalid {
        origin: config::origin_of(service, file.as_deref(), &overrides, &source.key),
        source,
    })?;
    Ok(config)
}

fn runtime(config: &impl ServiceConfig) -> Result<Runtime, ProcessError> {
    let threads = match config.process().worker_threads {
        0 => thread::available_parallelism().map_or(1, NonZero::get).div_ceil(config.cores_per_worker()),
        asked => asked,
    };
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    built.map_err(|source| ProcessError::Setup { what: "the asynchronous runtime", source: source.into() })
}

async fn live<T, F, Fut, E>(service: &'static str, config: T, supervised: bool, main: F) -> ExitCode
where
    T: ServiceConfig,
    F: FnOnce(Process<T>) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: std::error::Error + 'static,
{
    let telemetry = match Telemetry::start(service, config.process()) {
        Ok(telemetry) => telemetry,
        Err(error) => return fail(&error),
    };
    log_panics();
    let shutdown = CancellationToken::new();
    let watched = signals::watch(shutdown.clone())
        .and_then(|()| if supervised { signals::watch_stdin(shutdown.clone()) } else { Ok(()) });
    if let Err(error) = watched {
        return fail(&error);
    }
    tracing::info!(service, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
    let code = work(service, config, shutdown, main).await;
    tracing::info!(service, "stopped");
    // The exporter's last flush blocks.
    let _ = tokio::task::spawn_blocking(move || telemetry.stop()).await;
    code
}

/// Runs main and what it spawned. From the moment of a shutdown all of it has `drain` to end.
async fn work<T, F, Fut, E>(
    service: &'static str,
    config: T,
    shutdown: CancellationToken,
    main: F,
) -> ExitCode
where
    T: ServiceConfig,
    F: FnOnce(Process<T>) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: std::error::Error + 'static,
{
    let drain = config.drain();
    let tasks = TaskTracker::new();
    let essential = Essential::new(tasks.clone(), shutdown.clone());
    let (metrics, health) = (Metrics::new(service), HealthHandle::default());
    metrics.register(|registry| registry.register_collector(Box::new(health.clone())));
    let process = Process {
        config,
        shutdown: shutdown.clone(),
        tasks: tasks.clone(),
        metrics,
        health,
        essential: essential.clone(),
        tls_counts: OnceLock::new(),
    };
    let whole = async {
        let result = main(process).await;
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
        result
    };
    let deadline = async {
        shutdown.cancelled().await;
        tokio::time::sleep(drain).await;
    };
    // Main's own task may panic too: that is an error like any other, not a trace on the terminal.
    let whole = caught(whole);
    tokio::select! {
        ended = whole => match ended {
            Some(Ok(())) => match essential.take_failure() {
                Some(error) => fail(&error),
                None => ExitCode::SUCCESS,
            },
            Some(Err(error)) => fail(&error),
            None => fail(&ProcessError::Essential { task: "main", reason: "it panicked; the log says where".to_owned() }),
        },
        () = deadline => fail(&ProcessError::DrainTimeout(drain)),
    }
}

/// None if the future panicked.
async fn caught<R>(future: impl Future<Output = R>) -> Option<R> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(move |context| {
        match std::panic::catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
            Ok(poll) => poll.map(Some),
            Err(_) => std::task::Poll::Ready(None),
        }
    })
    .await
}

/// What a line of the human log has where something has panicked.
pub const PANIC_LOGGED: &str = "baton_process::life: panic thread=";

/// A panic anywhere becomes a line of the log, with its place, instead of a trace that a collector cannot read.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed").to_owned();
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let said = message_of(info.payload());
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            let backtrace = std::backtrace::Backtrace::capture();
            tracing::error!(%thread, %place, %said, %backtrace, "panic");
        } else {
            tracing::error!(%thread, %place, %said, "panic");
        }
    }));
}

fn message_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {}", one_line(error));
    ExitCode::FAILURE
}
