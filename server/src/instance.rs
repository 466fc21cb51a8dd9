//! Where all components meet: the life of one server process, from its listeners to its goodbye.
//!
//! Order of the start: listeners (so that every address is known and free), the model's metadata (so that the
//! hello is complete), duty and session (so that the controller sees it loading), the weights, then
//! [`crate::serving`] with everything that needs them. While weights load the gRPC port answers health and
//! reflection alone. The end runs backwards: drain, goodbye, streams, engine, transfers.

use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use baton_checkpoint::{Checkpoint, Dtype};
use baton_kvtransfer::KvLayout;
use baton_process::{
    Listen, Process,
    grpc::{self, GrpcOptions},
    http,
};
use baton_proto::{FILE_DESCRIPTOR_SET, Incarnation, InstanceId, RoleEpoch, v1};
use baton_runtime::{DeviceKind, Executor, KvPoolLayout, LoadOptions};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    config::ServerConfig,
    duty::{self, Duty},
    engine::{
        scheduler::Limits,
        thread::{COMMAND_QUEUE, Load},
    },
    error::ServerError,
    handoff::kv_layout,
    inference::dispatch::InstanceFacts,
    permits::Permits,
    role::{Assignment, Event, Role, RoleView},
    serving::{Serving, ServingParts, Shared},
    session::{self, Session},
};

/// What a drain's end needs of the process's own: to fail what still runs and wait for its fences, to say goodbye, and
/// to let the last calls linger. Of a drain too short for that, half.
const ENDGAME: Duration = duty::FENCES_WITHIN.saturating_add(session::GOODBYE_WITHIN).saturating_add(LINGER);

/// How long calls may linger once every leg has ended.
const LINGER: Duration = Duration::from_secs(2);

/// How long an instance that has read its model waits for a controller to say whether its incarnation will do.
const SETTLED_WITHIN: Duration = Duration::from_secs(5);

/// Runs a server until its process is asked to stop.
pub async fn run(process: Process<ServerConfig>) -> Result<(), ServerError> {
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

    let router = http::router(process.metrics.clone(), process.health.clone());
    process.spawn_essential("http", http::serve(listeners.metrics, router, stop.clone(), LINGER));
    let controllers = process.config.controllers.clone();
    let (settle, settled) = oneshot::channel();
    let session = (!controllers.is_empty()).then(|| {
        let spec = plan.spec(&process.config, &facts, &listeners.endpoints);
        let (role, load, events) = (role.clone(), load.clone(), events.clone());
        let (settle, shutdown) = (Some(settle), goodbye.clone());
        let session = Session { spec, settle, controllers, role, load, events, shutdown };
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

    let executor = {
        let until_loaded = CancellationToken::new();
        let _ends_with_loading = until_loaded.clone().drop_guard();
        let listener = listeners.grpc.try_clone().map_err(|source| address("gRPC", source))?;
        let options = grpc_options(&process, until_loaded.clone(), Duration::ZERO);
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
    if let Some(executor) = executor {
        let facts = Arc::new(facts);
        let shared =
            Shared { facts, role, load, engine, permits, tasks: process.tasks.clone(), stop: stop.clone() };
        let mut serving = Serving::start(ServingParts {
            executor,
            layout: plan.kv_layout(),
            limits: plan.limits(&process.config),
            handoff: process.config.handoff.clone(),
            data_listener: listeners.data,
            data_endpoint: listeners.endpoints.data,
            commands,
            load: load_shown,
            metrics: process.metrics.clone(),
            shared,
        })?;
        process.spawn_essential("engine", serving.engine_ended());
        let options = grpc_options(&process, stop.clone(), LINGER);
        process.spawn_essential("grpc", grpc::serve(listeners.grpc, serving.routes(), options));
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
    shutdown: CancellationToken,
    drain: Duration,
) -> GrpcOptions {
    GrpcOptions {
        health: process.health.clone(),
        services: vec!["baton.v1.Inference", "baton.v1.Handoff", "baton.v1.KvCache"],
        descriptors: FILE_DESCRIPTOR_SET,
        shutdown,
        drain,
    }
}

/// A role from the configuration counts as an assignment below any that a controller makes.
async fn assign_from_config(config: &ServerConfig, events: &mpsc::Sender<Event>) {
    let role = match config.role.as_str() {
        "prefill" => Role::Prefill,
        "decode" => Role::Decode,
        "mixed" => Role::Mixed,
        _ => return,
    };
    let assignment = Assignment { role, epoch: RoleEpoch(1), drain: Duration::ZERO };
    let _ = events.send(Event::Assigned(assignment)).await;
}

/// host:port of each listener, as peers reach it.
struct Endpoints {
    grpc: String,
    metrics: String,
    data: String,
}

struct Listeners {
    grpc: TcpListener,
    metrics: TcpListener,
    data: TcpListener,
    endpoints: Endpoints,
}

impl Listeners {
    fn bind(config: &ServerConfig) -> Result<Self, ServerError> {
        let bind = |what: &'static str, listen: &Listen| {
            let listener = listen.bind().map_err(|source| ServerError::Listen { what, source })?;
            let endpoint = advertised(&listener, &config.advertise_host, what)?;
            Ok::<_, ServerError>((listener, endpoint))
        };
        let (grpc, grpc_endpoint) = bind("listen", &config.listen)?;
        let (metrics, metrics_endpoint) = bind("metrics_listen", &config.metrics_listen)?;
        let (data, data_endpoint) = bind("kv_data_listen", &config.kv_data_listen)?;
        let endpoints = Endpoints { grpc: grpc_endpoint, metrics: metrics_endpoint, data: data_endpoint };
        Ok(Self { grpc, metrics, data, endpoints })
    }
}

fn address(what: &'static str, source: std::io::Error) -> ServerError {
    ServerError::Address { what, source }
}

fn advertised(listener: &TcpListener, host: &str, what: &'static str) -> Result<String, ServerError> {
    let local = listener.local_addr().map_err(|source| address(what, source))?;
    match (host, local.ip().is_unspecified()) {
        ("", true) => Err(ServerError::Advertise { what }),
        ("", false) => Ok(local.to_string()),
        (host, _) if host.contains(':') => Ok(format!("[{host}]:{}", local.port())),
        (host, _) => Ok(format!("{host}:{}", local.port())),
    }
}

/// What is known of the model before its weights are read.
struct Plan {
    checkpoint: Arc<Checkpoint>,
    options: LoadOptions,
    layout: KvPoolLayout,
    revision: String,
}

impl Plan {
    async fn read(config: &ServerConfig) -> Result<Self, ServerError> {
        let path = config.model.path.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let checkpoint = Checkpoint::open(&path)?;
            let revision = checkpoint.revision()?;
            Ok::<_, ServerError>((checkpoint, revision))
        });
        let (checkpoint, revision) = opened.await.map_err(|_| ServerError::LoadPanicked)??;
        let mut options = LoadOptions {
            device: DeviceKind::Cpu,
            threads: config.runtime.threads,
            kv_dtype: config.runtime.kv_dtype()?,
            exact_bf16: config.runtime.exact_bf16,
            packed_copies: Some(config.runtime.packed_copies.clone())
                .filter(|folder| !folder.as_os_str().is_empty()),
            kv_blocks: 1,
            max_batch_tokens: config.runtime.max_batch_tokens as usize,
        };
        let one_block = baton_runtime::kv_layout(checkpoint.config(), &options);
        config.runtime.check_batch(one_block.block_tokens)?;
        options.kv_blocks = config.runtime.blocks(one_block.total_bytes() as u64)?;
        let layout = KvPoolLayout { blocks: options.kv_blocks, ..one_block };
        let plan = Self { checkpoint: Arc::new(checkpoint), options, layout, revision };
        let (pool_tokens, context) = (plan.pool_tokens(), plan.context_tokens(config));
        if pool_tokens < u64::from(context) {
            tracing::warn!(
                pool_tokens,
                context,
                "the KV cache holds less than one full context, so that less is offered; raise runtime.kv_cache_bytes"
            );
        }
        Ok(plan)
    }

    /// What peers must have, too: the model, computed in the same way.
    fn kv_layout(&self) -> KvLayout {
        let in_bf16 = || self.checkpoint.tensors().any(|(_, tensor)| tensor.dtype == Dtype::Bf16);
        let exactly = self.options.exact_bf16 && in_bf16();
        kv_layout(&self.layout, &format!("{}{}", self.revision, if exactly { ", bf16 as it is" } else { "" }))
    }

    fn pool_tokens(&self) -> u64 {
        u64::from(self.layout.blocks) * u64::from(self.layout.block_tokens)
    }

    /// What clients are told: a context that is never refused for want of blocks.
    fn offered_context_tokens(&self, config: &ServerConfig) -> u32 {
        self.context_tokens(config).min(u32::try_from(self.pool_tokens()).unwrap_or(u32::MAX))
    }

    fn context_tokens(&self, config: &ServerConfig) -> u32 {
        let own = self.checkpoint.config().context_tokens;
        match config.runtime.max_context_tokens {
            0 => own,
            limit => own.min(limit),
        }
    }

    fn facts(&self, config: &ServerConfig) -> Result<InstanceFacts, ServerError> {
        let name = &config.model.name;
        Ok(InstanceFacts {
            instance_id: InstanceId::new(config.instance_id.as_str())?,
            incarnation: incarnation(SystemTime::now()),
            model: if name.is_empty() { self.checkpoint.name().to_owned() } else { name.clone() },
            vocabulary: self.checkpoint.config().vocabulary,
            context_tokens: self.context_tokens(config),
        })
    }

    fn limits(&self, config: &ServerConfig) -> Limits {
        Limits {
            max_batch_tokens: config.runtime.max_batch_tokens,
            max_sequences: config.runtime.max_sequences,
            max_waiting: config.runtime.max_waiting,
            context_tokens: self.context_tokens(config),
            block_tokens: self.layout.block_tokens,
            prefix_cache: config.runtime.prefix_cache,
        }
    }

    fn spec(&self, config: &ServerConfig, facts: &InstanceFacts, endpoints: &Endpoints) -> v1::InstanceSpec {
        v1::InstanceSpec {
            instance_id: facts.instance_id.to_string(),
            incarnation: facts.incarnation.0,
            group: config.group.clone(),
            device: "cpu".into(),
            device_count: 1,
            model: Some(v1::ModelIdentity {
                name: facts.model.clone(),
                revision: self.revision.clone(),
                architecture: self.checkpoint.config().architecture.name().to_owned(),
                context_tokens: self.offered_context_tokens(config),
                vocabulary_size: facts.vocabulary,
            }),
            kv_layout: Some((&self.kv_layout()).into()),
            inference_endpoint: endpoints.grpc.clone(),
            handoff_endpoint: endpoints.grpc.clone(),
            metrics_endpoint: endpoints.metrics.clone(),
            transports: config.handoff.transports.clone(),
            labels: config.labels.clone().into_iter().collect(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Reads the weights, on a thread of its own; tells the duty how far it is.
    async fn load(&self, events: mpsc::Sender<Event>) -> Result<Box<dyn Executor>, ServerError> {
        let (checkpoint, options) = (self.checkpoint.clone(), self.options.clone());
        let loading = tokio::task::spawn_blocking(move || {
            let mut told = 0;
            let mut progress = |done: u64, total: u64| {
                let permille = (done.saturating_mul(1000) / total.max(1)).min(1000) as u32;
                if permille > told {
                    told = permille;
                    // Progress is for show: what does not fit into the queue is left out.
                    let _ = events.try_send(Event::Progress { permille });
                }
            };
            baton_runtime::load(&checkpoint, &options, &mut progress)
        });
        Ok(loading.await.map_err(|_| ServerError::LoadPanicked)??)
    }
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
    fn legs_leave_time_for_the_end() {
        let seconds = Duration::from_secs;
        assert_eq!(drain_of_legs(seconds(30)), seconds(30) - ENDGAME);
        assert_eq!(drain_of_legs(seconds(4)), seconds(2));
        assert_eq!(drain_of_legs(Duration::ZERO), Duration::ZERO);
    }

    /// The layout that a server over the tiny model of this name tells.
    async fn layout_of(tiny: &str, exact_bf16: bool) -> KvLayout {
        let tiny = format!("{}/runtime/tests/reference/tiny/{tiny}", env!("CARGO_MANIFEST_DIR"));
        let mut config = ServerConfig::default();
        config.model.path = tiny.into();
        config.runtime.exact_bf16 = exact_bf16;
        Plan::read(&config).await.expect("the model reads").kv_layout()
    }

    #[tokio::test]
    async fn those_that_round_bf16_weights_do_not_pair_with_those_that_do_not() {
        let (rounds, exact) =
            (layout_of("hf-bf16-mistral", false).await, layout_of("hf-bf16-mistral", true).await);
        assert!(rounds.compatible_with(&exact).is_err() && rounds.fingerprint() != exact.fingerprint());
        let (one, other) =
            (layout_of("hf-f32-ratio1-tied", false).await, layout_of("hf-f32-ratio1-tied", true).await);
        assert_eq!(one.compatible_with(&other), Ok(()), "without bf16 weights there is no difference");
    }

    #[test]
    fn what_is_advertised_can_be_reached() {
        let here = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = here.local_addr().expect("an address").port();
        assert_eq!(advertised(&here, "", "listen").expect("fine"), format!("127.0.0.1:{port}"));
        assert_eq!(advertised(&here, "a.b", "listen").expect("fine"), format!("a.b:{port}"));
        assert_eq!(advertised(&here, "::1", "listen").expect("fine"), format!("[::1]:{port}"));
        let everywhere = TcpListener::bind("0.0.0.0:0").expect("a port");
        assert!(matches!(
            advertised(&everywhere, "", "listen"),
            Err(ServerError::Advertise { what: "listen" })
        ));
    }
}
