//! A coordinator's process: what it opens, what it serves on which port, and how it ends.

use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::Router;
use baton_process::{
    Closed, Https, Listen, Process, ProcessError, ServiceConfig, Tls,
    access::Access,
    grpc,
    http::{Port, Settles, serve, serve_and_cut},
    listen::reached_at,
    tls::Role,
};
use baton_proto::{CoordinatorId, CoordinatorSpec};
use baton_registry::{FleetWatch, FleetWatchConfig, RemoteConfig, RemoteStore, Store};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    CoordinatorError,
    admin::Admin,
    build::{Parts, assemble, observed},
    config::{CoordinatorConfig, StoreConfig, last_requests},
    http,
    keys::Source,
    models,
    place::Placer,
    prepare::Served,
    registration::{Controllers, Registration, incarnation},
    serve::Service,
    text::TextCache,
};

/// A silent connection is probed after this long.
const CLIENT_SILENCE: Duration = Duration::from_secs(30);
/// A client that takes nothing of what was sent for this long is cut off.
const CLIENT_STALL: Duration = Duration::from_secs(120);
/// Files that are open beside clients' connections: those to instances, the state store and operators, and models'.
const FILES_BESIDE: u64 = 1024;
/// How long operators' calls, and probes, may take at most once the last request has ended.
const LAST_CALLS_MOST: Duration = Duration::from_secs(1);

/// The whole of a coordinator process.
pub async fn run(process: Process<CoordinatorConfig>) -> Result<(), CoordinatorError> {
    let config = process.config.clone();
    let drained = CancellationToken::new();
    // Also where it does not come to serving.
    let _ends = drained.clone().drop_guard();
    // Files and ports first: what is wrong with them is told before a model is read.
    let tls = process.tls(&config.tls, Role::Coordinator, &drained)?;
    let access = Access::start(&config.admin, &drained, &process.tasks)?;
    let https = process.https(&config.https, &drained)?;
    let ports = Ports::open(&config, https.is_some())?;
    let store = open_store(&config.store, &tls)?;
    if let Some((setting, file)) = config.store.etcd.certificate() {
        process.watch_certificate(setting, file, &drained)?;
    }
    let keys = Source::open(&config.api_keys, &store)?;
    let served =
        models::open(&config.models, &config.model_root, &TextCache::new(config.text.cache_bytes)).await?;
    for Served { name, revision, sampling, .. } in &served {
        tracing::info!(model = %name, revision, %sampling, "model opened");
    }

    let (fleet, following) = FleetWatch::new(store, FleetWatchConfig::default());
    let until = drained.clone();
    process.essential.keep("fleet", async move { _ = until.run_until_cancelled(following).await });
    let controllers = match config.store.controller.as_str() {
        "" => Controllers::Leader(fleet.subscribe()),
        only => Controllers::One(only.to_owned()),
    };
    let parts = Parts {
        tls: tls.clone(),
        served,
        keys,
        fleet,
        metrics: process.metrics.clone(),
        health: process.health.clone(),
        tasks: process.tasks.clone(),
        essential: process.essential.clone(),
        shutdown: process.shutdown.clone(),
        drained: drained.clone(),
    };
    let (service, router) = assemble(&config, parts)?;
    let registration = registration(&process, &service, &ports, controllers, &tls, &drained)?;
    process.tasks.spawn(registration.run());
    let admin = Admin { service: service.clone(), access };
    let ending = Ending::of(&process, drained);
    let served = ports.serve(&process, &ending, admin, (service, router), tls, https).await;
    ending.drained.cancel();
    Ok(served?)
}

/// How a coordinator ends: in steps, each of which has its time.
struct Ending {
    /// From `limits.linger` after the shutdown on, with which it is not ready any more, nobody is let in.
    closing: CancellationToken,
    /// The last request has ended, or its time: all ends that requests need, and that looks at them.
    drained: CancellationToken,
    /// From the one to the other, at most.
    drain: Duration,
    /// For what is left then to be told so, and for operators' calls, and probes.
    last_calls: Duration,
}

impl Ending {
    fn of(process: &Process<CoordinatorConfig>, drained: CancellationToken) -> Self {
        let config = &process.config;
        let drain = last_requests(config);
        let linger = config.limits.linger.min(drain);
        Self {
            closing: later(&process.shutdown, linger, &drained, &process.tasks),
            drained,
            drain: drain - linger,
            last_calls: LAST_CALLS_MOST.min((config.drain() - drain) / 2),
        }
    }
}

/// What a coordinator listens on.
struct Ports {
    clients: TcpListener,
    /// The same, for when clients are let in no more.
    for_the_rest: TcpListener,
    admin: TcpListener,
    metrics: Option<TcpListener>,
    /// How the clients' port is reached, and the one for operators.
    http: String,
    grpc: String,
}

impl Ports {
    fn open(config: &CoordinatorConfig, https: bool) -> Result<Self, CoordinatorError> {
        let failed = |key| move |source| CoordinatorError::Listen { key, source };
        let bind = |listen: &Listen, key| listen.bind().map_err(failed(key));
        let reached = |listener: &TcpListener| reached_at(listener, &config.advertise_host, "advertise_host");
        let clients = bind(&config.listen, "listen")?;
        watch_clients(&clients);
        let for_the_rest = clients.try_clone().map_err(ProcessError::Http)?;
        let admin = bind(&config.admin_listen, "admin_listen")?;
        let grpc = reached(&admin).map_err(failed("admin_listen"))?;
        // Clients come by whatever name stands before it: this is shown, and not dialled.
        let http = reached(&clients).unwrap_or_else(|_| config.listen.to_string());
        let http = if https { format!("https://{http}") } else { http };
        let listen = config.metrics_listen.as_ref();
        let metrics = listen.map(|listen| bind(listen, "metrics_listen")).transpose()?;
        Ok(Self { clients, for_the_rest, admin, metrics, http, grpc })
    }

    /// Serves on all of them until the end; returns once clients' requests have ended.
    async fn serve(
        self,
        process: &Process<CoordinatorConfig>,
        ending: &Ending,
        admin: Admin,
        (service, router): (Arc<Service>, Router),
        tls: Tls,
        https: Option<Https>,
    ) -> Result<(), ProcessError> {
        let Ending { closing, drained, drain, last_calls } = ending;
        let (config, metrics, health) = (&process.config, &process.metrics, &process.health);
        let counted = Closed::of_grpc(metrics);
        let (routes, options) = admin.port(health.clone(), tls, counted, drained.clone(), *last_calls);
        tracing::info!(http = %self.http, grpc = %self.grpc, "serving");
        process.essential.serve("admin", grpc::serve(self.admin, routes, options));
        if let Some(listener) = self.metrics {
            let port = Port::of_observers(baton_process::http::router(metrics.clone(), health.clone()));
            process.essential.serve("metrics", serve(listener, port, drained.clone(), *last_calls));
        }
        let closed = http::closed(observed(config, metrics.clone(), health.clone()));
        let closed = Port { https: https.clone(), ..Port::of_observers(closed) };
        let rest = observe_the_rest(self.for_the_rest, closed, closing.clone(), drained.clone(), *last_calls);
        process.tasks.spawn(rest);
        let port = Port {
            router,
            https,
            connections: connections(config.limits.max_connections, baton_process::open_files::most()),
            settles: Settles::Known,
            closed: Closed::of_http(metrics),
        };
        let placer = service.placer.clone();
        serve_clients(self.clients, port, placer, closing.clone(), *drain, *last_calls).await
    }
}

/// Serves clients until `closing`, and what is under way then for up to `drain`. What is left after that is told so, for which
/// there is `last_words`; streams to instances end with it.
pub async fn serve_clients(
    listener: TcpListener,
    port: Port,
    placer: Arc<Placer>,
    closing: CancellationToken,
    drain: Duration,
    last_words: Duration,
) -> Result<(), ProcessError> {
    let cut = || placer.close();
    let served = serve_and_cut(listener, port, closing, drain, cut, last_words).await;
    placer.close();
    served
}

/// Who tells the controllers of this coordinator.
fn registration(
    process: &Process<CoordinatorConfig>,
    service: &Service,
    ports: &Ports,
    controllers: Controllers,
    tls: &Tls,
    drained: &CancellationToken,
) -> Result<Registration, CoordinatorError> {
    let spec = CoordinatorSpec {
        id: CoordinatorId::new(process.config.id.as_str())?,
        incarnation: incarnation(SystemTime::now()),
        http_endpoint: ports.http.clone(),
        admin_endpoint: ports.grpc.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        models: service.models.iter().map(|model| model.served.to_served_model()).collect(),
    };
    Ok(Registration {
        spec,
        controllers,
        dial: tls.dial(Role::Controller),
        metrics: service.metrics.clone(),
        handoffs: service.placer.handoffs.clone(),
        keys: service.keys.clone(),
        shutdown: process.shutdown.clone(),
        stop: drained.clone(),
    })
}

/// How many connections of clients there may be at once, where so many are asked for and so many files may be open.
fn connections(asked: usize, files: Option<u64>) -> usize {
    let Some(files) = files else { return asked };
    let left = files.saturating_sub(FILES_BESIDE).max(files / 2).max(1);
    let most = asked.min(usize::try_from(left).unwrap_or(usize::MAX));
    if most < asked {
        let wanted = asked as u64 + FILES_BESIDE;
        tracing::warn!(
            "limits.max_connections = {asked}, but only {most} are let in at once, so that instances can be reached: \
             raise the limit of open files of this process to {wanted} (ulimit -n), or lower max_connections"
        );
    }
    most
}

/// Answers those who observe the process from when clients are let in no more until the last request has ended.
async fn observe_the_rest(
    listener: TcpListener,
    port: Port,
    closing: CancellationToken,
    drained: CancellationToken,
    drain: Duration,
) {
    if drained.run_until_cancelled(closing.cancelled()).await.is_none() {
        return;
    }
    if let Err(error) = serve(listener, port, drained, drain).await {
        tracing::warn!(%error, "nobody can look at the rest of the drain");
    }
}

/// Cancelled so long after `shutdown`; waits for that no longer than until `end`.
fn later(
    shutdown: &CancellationToken,
    by: Duration,
    end: &CancellationToken,
    tasks: &TaskTracker,
) -> CancellationToken {
    let (shutdown, end, later) = (shutdown.clone(), end.clone(), CancellationToken::new());
    let cancelled = later.clone();
    let wait = async move {
        shutdown.cancelled().await;
        tokio::time::sleep(by).await;
        cancelled.cancel();
    };
    tasks.spawn(async move { end.run_until_cancelled(wait).await });
    later
}

/// A client that vanished, or that holds its stream open and reads nothing, is cut off by the kernel: accepted sockets
/// inherit this from the listener. Everything its request holds is then given back.
fn watch_clients(listener: &TcpListener) {
    let socket = socket2::SockRef::from(listener);
    let keep_alive = socket2::TcpKeepalive::new().with_time(CLIENT_SILENCE).with_interval(CLIENT_SILENCE / 4);
    let set =
        socket.set_tcp_keepalive(&keep_alive).and_then(|()| socket.set_tcp_user_timeout(Some(CLIENT_STALL)));
    if let Err(error) = set {
        tracing::warn!(%error, "stalled clients will not be noticed");
    }
}

fn open_store(config: &StoreConfig, tls: &Tls) -> Result<Arc<dyn Store>, CoordinatorError> {
    if config.etcd.endpoints.is_empty() {
        let dial = tls.dial(Role::Controller);
        let remote = RemoteConfig { dial, ..RemoteConfig::new([config.controller.as_str()]) };
        return Ok(Arc::new(RemoteStore::new(&remote)?));
    }
    Ok(Arc::new(config.etcd.open()?))
}

#[cfg(test)]
mod tests {
    use super::connections;

    #[test]
    fn clients_leave_files_for_the_ways_to_instances() {
        for (asked, files, let_in) in [
            (16_384, None, 16_384),
            (16_384, Some(1 << 20), 16_384),
            (16_384, Some(4096), 3072),
            (16_384, Some(1024), 512),
            (100, Some(1024), 100),
            (100, Some(0), 1),
        ] {
            assert_eq!(connections(asked, files), let_in, "{asked} of {files:?}");
        }
    }
}
