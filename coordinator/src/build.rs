//! Where all components meet: what a coordinator is built from, and its tasks. [`crate::life`] runs it.

use std::{num::NonZero, sync::Arc, time::Duration};

use axum::Router;
use baton_process::{Essential, Health, HealthHandle, Tls, http::probes, tls::Role};
use baton_proto::CoordinatorId;
use baton_registry::FleetWatch;
use baton_schedule::board::Board;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    CoordinatorError,
    admit::Gate,
    config::CoordinatorConfig,
    fleet::{
        Breakers,
        keeper::{Attachments, Keeper},
    },
    http,
    keys::{Keys, Source},
    metrics::Metrics,
    models::Models,
    place::Placer,
    prepare::Served,
    serve::{AHEAD_MOST, Service},
};

/// What a coordinator is built from besides its configuration; tests bring their own.
pub struct Parts {
    /// The models, in the order of the configuration.
    pub served: Vec<Served>,
    /// Whom to let in.
    pub keys: Source,
    pub fleet: FleetWatch,
    pub tls: Tls,
    pub metrics: baton_process::Metrics,
    pub health: HealthHandle,
    pub tasks: TaskTracker,
    pub essential: Essential,
    /// Cancelled when the process is asked to stop: no more requests are wanted.
    pub shutdown: CancellationToken,
    /// Cancelled when the requests have ended. Until then they need all that they needed before: whoever is told of
    /// instances only until the shutdown cannot move an answer to one that came later.
    pub drained: CancellationToken,
}

/// Builds the coordinator and starts its tasks. What is left to do is to serve the router.
pub fn assemble(
    config: &CoordinatorConfig,
    parts: Parts,
) -> Result<(Arc<Service>, Router), CoordinatorError> {
    let metrics = parts.metrics.register(Metrics::register);
    let models = Arc::new(Models::new(parts.served, &config.limits, &metrics)?);
    let board = Board::new(config.fleet.absent_grace, config.placement.settings(rand::random()));
    let attachments = Arc::new(Attachments::default());
    let breakers = Arc::new(Breakers::new(&metrics));
    let keeper = Keeper {
        board: board.clone(),
        attachments: attachments.clone(),
        coordinator: CoordinatorId::new(config.id.as_str())?,
        config: config.fleet.clone(),
        metrics: metrics.clone(),
        breakers: breakers.clone(),
        dial: parts.tls.dial(Role::Server),
        listed: parts.fleet.subscribe(),
        tasks: parts.tasks.clone(),
        drained: parts.drained.clone(),
        told: None,
    };
    parts.essential.keep("instances", keeper.run());
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let gate = Gate::new(&config.limits, models.iter().len(), cores, &metrics);
    let drained = parts.drained.clone();
    let keys = Keys::start(parts.keys, &config.api_keys, metrics.clone(), drained, &parts.essential);
    let service = Arc::new(Service {
        keys,
        placer: Arc::new(Placer {
            board,
            attachments,
            handoffs: Arc::default(),
            breakers,
            placements: metrics.placements.clone(),
            closed: CancellationToken::new(),
        }),
        carry: config.carry,
        gate,
        models,
        limits: config.limits.clone(),
        roster: Arc::default(),
        overdue: Arc::default(),
        ahead: Arc::new(Semaphore::new(AHEAD_MOST)),
        metrics,
    });
    let (overdue, drained) = (service.overdue.clone(), parts.drained);
    parts.essential.keep("deadlines", async move { overdue.run(drained).await });
    let readiness =
        watch_readiness(service.clone(), parts.health.clone(), config.fleet.sweep, parts.shutdown);
    parts.essential.keep("readiness", readiness);
    let router = http::router(service.clone(), observed(config, parts.metrics, parts.health));
    Ok((service, router))
}

/// By what the process is observed where clients are served, too.
pub(crate) fn observed(
    config: &CoordinatorConfig,
    metrics: baton_process::Metrics,
    health: HealthHandle,
) -> Router {
    match config.metrics_listen {
        None => baton_process::http::router(metrics, health),
        Some(_) => probes(health),
    }
}

/// Ready while a request for each model could be served, and partly ready while one for any could. Looked at on every
/// change, and now and then without one: graces pass, too.
async fn watch_readiness(
    service: Arc<Service>,
    health: HealthHandle,
    every: Duration,
    shutdown: CancellationToken,
) {
    let mut changes = service.placer.board.changes();
    loop {
        changes.borrow_and_update();
        health.set(readiness(&service));
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            changed = changes.changed() => if changed.is_err() { break },
            () = service.keys.known(), if !service.keys.are_known() => {}
            () = tokio::time::sleep(every) => {}
        }
    }
    health.set(Health::Draining);
}

fn readiness(service: &Service) -> Health {
    if !service.keys.are_known() {
        return Health::NotReady("the API keys have not been read from the state store yet".to_owned());
    }
    let (mut ready, mut lacking) = (Vec::new(), Vec::new());
    for model in service.models.iter() {
        let name = &model.served.name;
        let served = service.can_serve(model);
        model.counts.ready.set(served.is_ok().into());
        match served {
            Ok(()) => ready.push(format!("`{name}`")),
            Err(reason) => lacking.push(reason.into_api_error(name).message),
        }
    }
    let (ready, lacking) = (ready.join(", "), lacking.join("; "));
    match (ready.is_empty(), lacking.is_empty()) {
        (_, true) => Health::Ready,
        (true, false) => Health::NotReady(lacking),
        (false, false) => Health::Partly(format!("ready: {ready}; not ready: {lacking}")),
    }
}
