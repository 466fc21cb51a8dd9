//! Where all components meet: the life of one server process, from its listeners to its goodbye.
//!
//! Order of the start: listeners (so that every address is known and free), the model's metadata (so that the
//! hello is complete), duty and session (so that the controller sees it loading), the weights, then
//! [`crate::serving`] with everything that needs them. While weights load the gRPC port answers health and
//! reflection alone. The end runs backwards: drain, goodbye, streams, engine, transfers.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use baton_process::{
    Closed, Process, Tls,
    grpc::{self, GrpcOptions, KeepAlive},
    http,
    tls::{self, Allowed, Door},
};
use baton_proto::{FILE_DESCRIPTOR_SET, Incarnation, RoleEpoch};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    config::ServerConfig,
    duty::{self, Duty},
    engine::{
        load::Load,
        thread::{COMMAND_QUEUE, Command},
    },
    error::ServerError,
    metrics::RoleMetrics,
    permits::Permits,
    role::{Assignment, Event, Role, RoleView},
    serving::{Serving, ServingParts, Shared},
    session::{self, Session},
};

mod listeners;
mod plan;

use listeners::Listeners;
use plan::Plan;

/// What a drain's end needs of the process's own: to fail what still runs and wait for its fences, to say goodbye, and
/// to let the last calls linger. Of a drain too short for that, half.
const ENDGAME: Duration = duty::FENCES_WITHIN.saturating_add(session::GOODBYE_WITHIN).saturating_add(LINGER);

/// How long calls may linger once every leg has ended.
const LINGER: Duration = Duration::from_secs(2);

/// How long an instance that has read its model waits for a controller to say whether its incarnation will do.
const SETTLED_WITHIN: Duration = Duration::from_secs(5);

/// A prompt of 32k tokens comes in one frame: in those of HTTP/2's own length it would be eight.
const PROMPT_FRAME_BYTES: u32 = 160 << 10;

/// Who may call what at the gRPC port.
const DOOR: Door = Door {
    calls: &[
        ("/baton.v1.Inference/", Allowed::Roles(&[tls::Role::Coordinator])),
        ("/baton.v1.KvCache/", Allowed::Roles(&[tls::Role::Coordinator])),
        ("/baton.v1.Handoff/", Allowed::Roles(&[tls::Role::Server])),
    ],
    without_certificate: false,
};

/// Runs a server until its process is asked to stop.
pub async fn run(process: Process<ServerConfig>) -> Result<(), ServerError> {
    let tls = process.tls(&process.config.tls, tls::Role::Server, &process.shutdown)?;
    let listeners = Listeners::bind(&process.config)?;
    let plan = Plan::read(&process.config).await?;
    let mut facts = plan.facts(&process.config)?;

    // What must outlive the process's shutdown signal, until the drain is over.
    let (stop, goodbye) = (CancellationToken::new(), CancellationToken::new());
    let _ends_with_errors_too = (stop.clone().drop_guard(), goodbye.clone().drop_guard());
    let (events, incoming_events) = mpsc::channel(duty::EVENT_QUEUE);
    let (engine, commands) = mpsc::channel(COMMAND_QUEUE);
    let (view, role) = watch::channel(RoleView::default());
    let (load_shown, load) = watch::channel(Load::default());
    let permits = Permits::default();
    let health = process.health.clone();
    let duty =
        Duty { events: incoming_events, view, permits: permits.clone(), engine: engine.clone(), health };
    let duty = process.tasks.spawn(duty.run());

    let (id, group) = (process.config.instance_id.clone(), process.config.group.to_string());
    process.metrics.register(|registry| RoleMetrics::register(registry, id, group, role.clone()));
    let router = http::router(process.metrics.clone(), process.health.clone());
    process.essential.serve(
        "http",
        http::serve(listeners.metrics, http::Port::of_observers(router), stop.clone(), LINGER),
    );
    let controllers = process.config.controllers.clone();
    let (settle, settled) = oneshot::channel();
    let session = (!controllers.is_empty()).then(|| {
        let spec = plan.spec(&process.config, &facts, &listeners.endpoints);
        let (role, load, events) = (role.clone(), load.clone(), events.clone());
        let (settle, shutdown) = (Some(settle), goodbye.clone());
        let dial = tls.dial(tls::Role::Controller);
        let session = Session { spec, settle, controllers, dial, role, load, events, shutdown };
        let end = process.shutdown.clone();
        process.tasks.spawn(async move {
            let ended = session.run().await;
            if let Err(replaced) = &ended {
                tracing::error!(
                    %replaced,
                    "draining, then ending: give one of the two another id, or stop one; a supervisor may start this \
                     one again"
                );
                end.cancel();
            }
            ended
        })
    });
    assign_from_config(&process.config, &events).await;

    let closed = Closed::of_grpc(&process.metrics);
    let executor = {
        let until_loaded = CancellationToken::new();
        let _ends_with_loading = until_loaded.clone().drop_guard();
        let cloned = listeners.grpc.try_clone();
        let listener = cloned.map_err(|source| ServerError::Address { what: "gRPC", source })?;
        let options = grpc_options(&process, &tls, &closed, until_loaded.clone(), Duration::ZERO);
        let early = process.tasks.spawn(grpc::serve(listener, Routes::default(), options));
        let loaded = async {
            let executor = plan.load(events.clone()).await?;
            facts.incarnation = settled_incarnation(settled, facts.incarnation).await;
            Ok::<_, ServerError>(executor)
        };
        let executor = tokio::select! {
            () = process.shutdown.cancelled() => None,
            loaded = loaded => Some(loaded?),
        };
        until_loaded.cancel();
        let _ = early.await;
        executor
    };
    let at_work = executor.is_some().then(|| engine.clone());
    if let Some(executor) = executor {
        let facts = Arc::new(facts);
        let shared =
            Shared { facts, role, load, engine, permits, tasks: process.tasks.clone(), stop: stop.clone() };
        let mut serving = Serving::start(ServingParts {
            executor,
            layout: plan.kv_layout(),
            limits: plan.limits(&process.config),
            handoff: process.config.handoff.clone(),
            peers: tls.dial(tls::Role::Server),
            data_listener: listeners.data,
            data_endpoint: listeners.endpoints.data,
            commands,
            load: load_shown,
            metrics: process.metrics.clone(),
            shared,
        })?;
        process.essential.serve("engine", serving.engine_ended());
        let options = grpc_options(&process, &tls, &closed, stop.clone(), LINGER);
        process.essential.serve("grpc", grpc::serve(listeners.grpc, serving.routes(), options));
        let _ = events.send(Event::Loaded).await;
        tracing::info!(
            instance = %process.config.instance_id,
            grpc = listeners.endpoints.grpc,
            metrics = listeners.endpoints.metrics,
            "loaded and listening"
        );
        process.shutdown.cancelled().await;
    }

    let _ = events.send(Event::Stop { drain: drain_of_legs(process.drain()) }).await;
    let _ = duty.await;
    if let Some(engine) = at_work {
        // What the last legs said must be on their streams before these end.
        let (answer, settled) = oneshot::channel();
        let _ = engine.send(Command::Settle(answer)).await;
        let _ = tokio::time::timeout(LINGER, settled).await;
    }
    goodbye.cancel();
    if let Some(session) = session {
        // Only if it panicked there is nothing to say of how it ended.
        let ended = session.await.unwrap_or(Ok(()));
        stop.cancel();
        ended?;
    }
    stop.cancel();
    Ok(())
}

/// The process is ended at the end of `whole`, however far it is.
fn drain_of_legs(whole: Duration) -> Duration {
    whole - ENDGAME.min(whole / 2)
}

fn grpc_options(
    process: &Process<ServerConfig>,
    tls: &Tls,
    closed: &Closed,
    shutdown: CancellationToken,
    drain: Duration,
) -> GrpcOptions {
    GrpcOptions {
        health: process.health.clone(),
        services: vec!["baton.v1.Inference", "baton.v1.Handoff", "baton.v1.KvCache"],
        descriptors: FILE_DESCRIPTOR_SET,
        tls: tls.clone(),
        door: DOOR,
        shutdown,
        drain,
        keep_alive: keep_alive(process.config.handoff.lease),
        connections: grpc::CONNECTIONS,
        frame_bytes: PROMPT_FRAME_BYTES,
        closed: closed.clone(),
    }
}

/// A peer that only pauses may use its whole lease up, and keeps its control stream for as long: with the stream all of its
/// transfers would end.
fn keep_alive(lease: Duration) -> KeepAlive {
    let usual = KeepAlive::default();
    KeepAlive { timeout: usual.timeout.max(lease), ..usual }
}

/// A role from the configuration counts as an assignment below any that a controller makes.
async fn assign_from_config(config: &ServerConfig, events: &mpsc::Sender<Event>) {
    let role = match config.role.as_str() {
        "prefill" => Role::Prefill,
        "decode" => Role::Decode,
        "mixed" => Role::Mixed,
        _ => return,
    };
    let assignment = Assignment { role, epoch: RoleEpoch(1), drain: Duration::ZERO, cordoned: false };
    let _ = events.send(Event::Assigned(assignment)).await;
}

/// Milliseconds from 1970: differs from start to start and grows with them, as long as the clock is not set back; what
/// happens then is [`Session::settle`]'s. Never 0, which means any.
fn incarnation(now: SystemTime) -> Incarnation {
    let from_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_else(|before| before.duration());
    Incarnation(u64::try_from(from_epoch.as_millis()).unwrap_or(u64::MAX).max(1))
}

/// What the session has settled, or this process's own if it says nothing in time: then that stays.
async fn settled_incarnation(mut settled: oneshot::Receiver<Incarnation>, own: Incarnation) -> Incarnation {
    match tokio::time::timeout(SETTLED_WITHIN, &mut settled).await {
        Ok(settled) => settled.unwrap_or(own),
        Err(_) => {
            settled.close();
            settled.try_recv().unwrap_or(own)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incarnation_is_never_the_one_that_means_any() {
        let at = |millis| incarnation(UNIX_EPOCH + Duration::from_millis(millis));
        assert_eq!([at(0), at(1), at(1_700_000_000_000)], [1, 1, 1_700_000_000_000].map(Incarnation));
        let before = |millis| incarnation(UNIX_EPOCH - Duration::from_millis(millis));
        assert_eq!([before(1), before(86_400_000)], [1, 86_400_000].map(Incarnation));
    }

    #[tokio::test(start_paused = true)]
    async fn an_incarnation_is_settled_in_time_or_stays() {
        let own = Incarnation(5);
        let (settle, settled) = oneshot::channel();
        settle.send(Incarnation(9)).expect("somebody waits");
        assert_eq!(settled_incarnation(settled, own).await, Incarnation(9));
        let (settle, settled) = oneshot::channel();
        assert_eq!(settled_incarnation(settled, own).await, own);
        assert!(settle.send(Incarnation(9)).is_err(), "too late");
        let (settle, settled) = oneshot::channel();
        drop(settle);
        assert_eq!(settled_incarnation(settled, own).await, own);
    }

    #[test]
    fn a_connection_is_kept_for_as_long_as_a_peer_may_pause() {
        let usual = KeepAlive::default();
        for (lease, timeout) in [(3, 10), (10, 10), (30, 30), (3600, 3600)]
            .map(|(lease, timeout)| (Duration::from_secs(lease), Duration::from_secs(timeout)))
        {
            assert_eq!(keep_alive(lease), KeepAlive { timeout, ..usual }, "{lease:?}");
        }
    }

    #[test]
    fn legs_leave_time_for_the_end() {
        let seconds = Duration::from_secs;
        assert_eq!(drain_of_legs(seconds(30)), seconds(30) - ENDGAME);
        assert_eq!(drain_of_legs(seconds(4)), seconds(2));
        assert_eq!(drain_of_legs(Duration::ZERO), Duration::ZERO);
    }
}
