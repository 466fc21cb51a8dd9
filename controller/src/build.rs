//! Where all parts of a controller meet.

use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use baton_process::{
    Closed, HealthHandle, Metrics, Process, Tls,
    access::Access,
    grpc, http,
    listen::reached_at,
    tls::{Allowed, Door, Role},
};
use baton_proto::v1::{control_server::ControlServer, fleet_admin_server::FleetAdminServer};
use baton_registry::{MemoryConfig, MemoryStore, Revision, Store, StoreService};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

#[cfg(feature = "kubernetes")]
use crate::scale::Scaling;
use crate::{
    admin::AdminService,
    config::{ControllerConfig, StoreKind},
    coordinators::Coordinators,
    desk::Desk,
    error::ControllerError,
    journal::Journal,
    lead::LeaderTask,
    metrics::ControllerMetrics,
    ranktable,
    session::ControlService,
};

/// Keys that an embedded store has room for, for each instance there may be: three of its own, what is held of its health,
/// the role of one that is gone, and as many again, as what is new may be written before what is old is deleted.
const KEYS_PER_INSTANCE: usize = 10;

/// gRPC services whose health is the controller's.
const SERVICES: [&str; 2] = ["baton.v1.Control", "baton.v1.FleetAdmin"];

/// Coordinators only read the store, and so may nobody write it from without.
const DOOR: Door = Door {
    calls: &[
        ("/baton.v1.Control/Session", Allowed::Roles(&[Role::Server])),
        ("/baton.v1.Control/Coordinate", Allowed::Roles(&[Role::Coordinator])),
        ("/baton.v1.Store/Range", Allowed::Roles(&[Role::Coordinator])),
        ("/baton.v1.Store/Watch", Allowed::Roles(&[Role::Coordinator])),
        // By certificate or token: see `baton_process::access`.
        ("/baton.v1.FleetAdmin/", Allowed::Anyone),
    ],
    without_certificate: false,
};

/// The whole process, until its shutdown.
pub async fn run(process: Process<ControllerConfig>) -> Result<(), ControllerError> {
    let mut config = process.config.clone();
    let tls = process.tls(&config.tls, Role::Controller, &process.shutdown)?;
    let grpc_listener = config.listen.bind()?;
    let http_listener = config.metrics_listen.bind()?;
    let address = grpc_listener.local_addr().map_err(ControllerError::Address)?;
    let advertised = reached_at(&grpc_listener, &config.advertise_host, "advertise_host")?;
    if config.controller_id.is_empty() {
        config.controller_id = host_name();
    }
    let store = open_store(&config, &process.shutdown, &process.tasks)?;
    if config.store.kind == StoreKind::Etcd
        && let Some((setting, file)) = config.store.etcd.certificate()
    {
        process.watch_certificate(setting, file, &process.shutdown)?;
    }
    tracing::info!(%address, controller = config.controller_id, ?store, "listening");
    let router = http::router(process.metrics.clone(), process.health.clone());
    process.essential.serve(
        "http",
        http::serve(
            http_listener,
            http::Port::of_observers(router),
            process.shutdown.clone(),
            drain_of_calls(process.drain()),
        ),
    );
    let parts = Parts {
        config,
        advertised,
        store,
        tls,
        metrics: process.metrics.clone(),
        health: process.health.clone(),
        shutdown: process.shutdown.clone(),
        tasks: process.tasks.clone(),
    };
    parts.serve(grpc_listener, drain_of_calls(process.drain())).await
}

/// The process is ended at the end of `whole`, however far it is: what outlasts this is cut off before, so that the
/// leadership can be resigned and the store closed. A quarter is plenty for both, and two seconds are in any case.
fn drain_of_calls(whole: Duration) -> Duration {
    whole - (whole / 4).min(Duration::from_secs(2))
}

/// What a controller is made of, for [`run`] and for tests.
#[derive(Debug)]
pub struct Parts {
    /// With `controller_id` filled in.
    pub config: ControllerConfig,
    /// host:port that others are told to reach it at.
    pub advertised: String,
    pub store: Arc<dyn Store>,
    pub tls: Tls,
    pub metrics: Metrics,
    pub health: HealthHandle,
    pub shutdown: CancellationToken,
    pub tasks: TaskTracker,
}

impl Parts {
    /// Leads when it can and serves, until the shutdown and for up to `drain` after it.
    pub async fn serve(self, listener: TcpListener, drain: Duration) -> Result<(), ControllerError> {
        let Self { config, advertised, store, tls, metrics, health, shutdown, tasks } = self;
        let config = Arc::new(config);
        let (open, desk) = Desk::new();
        let (ending, workers) = (shutdown.clone(), tasks.clone());
        let coordinators = Coordinators::default();
        let control = ControlService::new(
            config.clone(),
            store.clone(),
            desk.clone(),
            coordinators.clone(),
            ending,
            workers,
        );
        let access = Access::start(&config.admin, &shutdown, &tasks)?;
        let ranktable = Some(&config.ascend.ranktable_file).filter(|path| !path.is_empty());
        let ranktable = ranktable.map(|path| ranktable::follow_file(path.into(), shutdown.clone(), &tasks));
        let door = Door { without_certificate: access.takes_tokens(), ..DOOR };
        let journal = Journal::default();
        let closed = Closed::of_grpc(&metrics);
        let metrics = ControllerMetrics::register(&metrics);
        #[cfg(feature = "kubernetes")]
        if !config.kubernetes.groups.is_empty() {
            let scaling = metrics.scaling.clone();
            let (config, desk, journal) = (config.clone(), desk.clone(), journal.clone());
            let scaling = Scaling::open(config, desk, journal, scaling, shutdown.clone()).await?;
            tasks.spawn(scaling.run());
        }
        // Whoever embeds the store forgets with each restart what is in it.
        let keeps_keys = config.store.kind == StoreKind::Etcd;
        let admin = AdminService::new(store.clone(), desk, coordinators, journal.clone(), access, keeps_keys);
        let mut routes = Routes::new(ControlServer::new(control)).add_service(FleetAdminServer::new(admin));
        let mut services = SERVICES.to_vec();
        if config.store.kind == StoreKind::Embedded {
            routes = routes.add_service(StoreService::new(store.clone(), shutdown.clone()).into_server());
            services.push("baton.v1.Store");
        }
        // Each instance has one, and so has each coordinator; who has lost the leader tries the others.
        let connections = grpc::CONNECTIONS.max(config.sessions.max_instances.saturating_mul(2));
        let leader = LeaderTask {
            candidate: LeaderTask::candidate(&config, &store, advertised),
            config,
            store,
            desk: open,
            journal,
            ranktable,
            metrics,
            health: health.clone(),
            shutdown: shutdown.clone(),
        };
        let descriptors = baton_proto::FILE_DESCRIPTOR_SET;
        let options = grpc::GrpcOptions {
            health,
            services,
            descriptors,
            tls,
            door,
            shutdown: shutdown.clone(),
            drain,
            keep_alive: grpc::KeepAlive::default(),
            connections,
            frame_bytes: grpc::FRAME_BYTES,
            closed,
        };
        let serving = async {
            let served = grpc::serve(listener, routes, options).await;
            // Who cannot be reached must not lead.
            shutdown.cancel();
            served
        };
        let (served, ()) = tokio::join!(serving, leader.run());
        Ok(served?)
    }
}

/// Opens the configured store.
pub fn open_store(
    config: &ControllerConfig,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Arc<dyn Store>, ControllerError> {
    match config.store.kind {
        StoreKind::Embedded => {
            // Revisions, and with them epochs, keep growing over restarts: see `MemoryConfig::start`.
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let start = Revision(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX));
            let mut memory = MemoryConfig::new(start);
            memory.keys = memory.keys.max(config.sessions.max_instances.saturating_mul(KEYS_PER_INSTANCE));
            Ok(Arc::new(MemoryStore::start(memory, shutdown.clone(), tasks)))
        }
        StoreKind::Etcd => Ok(Arc::new(config.store.etcd.open()?)),
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "controller".to_owned() } else { name.to_owned() }
}
