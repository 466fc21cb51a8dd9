//! Where all components meet: built from the configuration, run until shutdown, drained.

use std::sync::Arc;

use axum::Router;
use baton_process::{Health, HealthHandle};
use baton_proto::CoordinatorId;
use baton_registry::FleetWatch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    CoordinatorError,
    admit::Gate,
    config::CoordinatorConfig,
    fleet::keeper::{Keeper, Links},
    http,
    metrics::Metrics,
    prepare::Served,
    schedule::board::Board,
    serve::Service,
};

/// What a coordinator is built from besides its configuration; tests bring their own.
pub struct Parts {
    pub served: Served,
    pub fleet: FleetWatch,
    pub metrics: baton_process::Metrics,
    pub health: HealthHandle,
    pub tasks: TaskTracker,
    pub shutdown: CancellationToken,
}

/// Builds the coordinator and starts its tasks. What is left to do is to serve the router.
pub fn assemble(
    config: &CoordinatorConfig,
    parts: Parts,
) -> Result<(Arc<Service>, Router), CoordinatorError> {
    let metrics = parts.metrics.register(Metrics::register);
    let board = Board::new(config.fleet.absent_grace);
    let links = Arc::new(Links::default());
    let keeper = Keeper {
        board: board.clone(),
        links: links.clone(),
        coordinator: CoordinatorId::new(config.id.as_str())?,
        config: config.fleet.clone(),
        metrics: metrics.clone(),
        listed: parts.fleet.subscribe(),
        tasks: parts.tasks.clone(),
        shutdown: parts.shutdown.clone(),
    };
    parts.tasks.spawn(keeper.run());
    let service = Arc::new(Service {
        served: Arc::new(parts.served),
        limits: config.limits.clone(),
        gate: Gate::new(&config.limits, metrics.clone()),
        board,
        links,
        roster: Arc::default(),
        metrics,
    });
    parts.tasks.spawn(watch_readiness(service.clone(), parts.health.clone(), parts.shutdown));
    let router = http::router(service.clone(), parts.metrics, parts.health);
    Ok((service, router))
}

/// Ready while a request could be served.
async fn watch_readiness(service: Arc<Service>, health: HealthHandle, shutdown: CancellationToken) {
    let mut changes = service.board.changes();
    loop {
        changes.borrow_and_update();
        match service.can_serve() {
            Ok(()) => health.set_ready(),
            Err(reason) => health.set_not_ready(reason.to_string()),
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            changed = changes.changed() => if changed.is_err() { break },
        }
    }
    health.set(Health::Draining);
}
