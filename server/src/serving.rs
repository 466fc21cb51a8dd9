//! The part of an instance that needs the loaded model: engine, transfers and the services over them.
//!
//! Built by [`crate::instance`] once the weights are in, and by tests over a model of their own.

use std::{future::Future, net::TcpListener, sync::Arc, thread::JoinHandle, time::Duration};

use baton_kvtransfer::{
    DataPortConfig, Dialling, KnownPeer, KvLayout, KvNode, Limits as TransferLimits, NodeConfig,
};
use baton_process::{Metrics, tls};
use baton_proto::{
    BlockHash, InstanceId,
    v1::{inference_server::InferenceServer, kv_cache_server::KvCacheServer},
};
use baton_runtime::Executor;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Request, Status,
    service::{Routes, interceptor::InterceptedService},
    transport::Endpoint,
};

use crate::{
    config::{CONNECTIONS_PER_PEER, HandoffConfig},
    engine::{
        cache_events::CacheEvents,
        load::Load,
        scheduler::Limits,
        thread::{self, Command, EngineParts},
    },
    error::ServerError,
    handoff::{Transfers, kv_region},
    inference::{InferenceParts, InferenceService, dispatch::InstanceFacts, streams::Streams},
    kv_cache::{CacheFacts, KvCacheService},
    metrics::{EngineMetrics, HandoffMetrics, TransferMetrics},
    permits::Permits,
    role::RoleView,
    secret,
};

/// An offer may wait as long as its request: the sender keeps to the request's deadline and lets go of it first. This
/// is for a sender that does not.
const HELD_OFFER: Duration = Duration::from_secs(3600);

/// Largest message of a coordinator: a prompt of a million tokens, and then some.
const MESSAGE_BYTES_MOST: usize = 8 << 20;

/// What serving has in common with the rest of the instance.
pub struct Shared {
    pub facts: Arc<InstanceFacts>,
    pub role: watch::Receiver<RoleView>,
    pub load: watch::Receiver<Load>,
    pub engine: mpsc::Sender<Command>,
    pub permits: Permits,
    pub tasks: TaskTracker,
    /// Ends everything here.
    pub stop: CancellationToken,
}

/// What serving needs.
pub struct ServingParts {
    pub executor: Box<dyn Executor>,
    pub layout: KvLayout,
    pub limits: Limits,
    pub handoff: HandoffConfig,
    /// The way to other servers.
    pub peers: tls::Dial,
    pub data_listener: TcpListener,
    /// host:port at which peers reach `data_listener`.
    pub data_endpoint: String,
    pub commands: mpsc::Receiver<Command>,
    pub load: watch::Sender<Load>,
    pub metrics: Metrics,
    pub shared: Shared,
}

/// Tells the transfer node whom a server's certificate names.
fn known_peer(mut request: Request<()>) -> Result<Request<()>, Status> {
    if let tls::Peer::Named(identity) = tls::Peer::of(&request)
        && let Some(name) = &identity.name
    {
        let id = InstanceId::new(name.as_str());
        let id = id.map_err(|error| Status::permission_denied(format!("the certificate's name: {error}")))?;
        request.extensions_mut().insert(KnownPeer(id));
    }
    Ok(request)
}

/// Dials other servers as the whole process does.
struct Peers(tls::Dial);

impl baton_kvtransfer::Dial for Peers {
    fn dial(&self, peer: Endpoint, receiver: &InstanceId) -> Dialling {
        let dial = self.0.clone().named(receiver.as_str());
        Box::pin(async move { dial.connect(peer).await })
    }
}

/// See the module.
pub struct Serving {
    node: KvNode,
    inference: InferenceService,
    kv_cache: KvCacheService,
    ended: Option<(oneshot::Receiver<()>, JoinHandle<()>)>,
    stop: CancellationToken,
}

impl Serving {
    /// Starts the transfer node and the engine's thread. Must be called within a tokio runtime.
    pub fn start(parts: ServingParts) -> Result<Self, ServerError> {
        let shared = &parts.shared;
        let runtime = Handle::current();
        let streams = Arc::new(Streams::default());
        let inference = InferenceService::new(InferenceParts {
            facts: shared.facts.clone(),
            role: shared.role.clone(),
            load: shared.load.clone(),
            engine: shared.engine.clone(),
            streams: streams.clone(),
            permits: shared.permits.clone(),
            tasks: shared.tasks.clone(),
            shutdown: shared.stop.clone(),
        });
        let pool = parts.executor.kv_pool().clone();
        let cache_facts = CacheFacts {
            incarnation: shared.facts.incarnation,
            layout_fingerprint: parts.layout.fingerprint(),
            block_tokens: pool.layout().block_tokens,
        };
        let root = BlockHash::root(&cache_facts.layout_fingerprint, "");
        let cache_events = Arc::new(CacheEvents::default());
        let kv_cache = KvCacheService::new(cache_facts, cache_events.clone(), shared.stop.clone());
        let blocks = pool.layout().blocks;
        let peers = parts.handoff.max_peers as usize;
        let usual = DataPortConfig::new(parts.data_listener);
        let data_port = DataPortConfig {
            advertise: Some(parts.data_endpoint),
            connections: usual.connections.max(peers.saturating_mul(CONNECTIONS_PER_PEER)),
            ..usual
        };
        let secrets = secret::read(&parts.handoff)?;
        if let Some(secrets) = secrets.clone() {
            let followed = secret::follow_files(parts.handoff.clone(), secrets);
            shared.tasks.spawn(shared.stop.clone().run_until_cancelled_owned(followed));
        }
        let node = KvNode::start(
            NodeConfig {
                instance_id: shared.facts.instance_id.clone(),
                incarnation: shared.facts.incarnation,
                layout: parts.layout,
                region: kv_region(&pool),
                blocks,
                data_port,
                transports: parts.handoff.transports()?,
                dial: Arc::new(Peers(parts.peers)),
                secret: secrets,
                convert: parts.handoff.convert,
                lease: parts.handoff.lease,
                // Each transfer holds a block at least, so the pool bounds them.
                limits: TransferLimits {
                    incoming_transfers: blocks as usize,
                    outgoing_transfers: blocks as usize,
                    // A decode leg may wait for blocks for as long as its prefill leg lives.
                    held_offers: parts.limits.max_waiting as usize + parts.limits.max_sequences as usize,
                    held_offer: parts.handoff.timeout.max(HELD_OFFER),
                    peers,
                    unproven_streams: peers.max(TransferLimits::default().unproven_streams),
                    staging_bytes: usize::try_from(parts.handoff.staging_bytes).unwrap_or(usize::MAX),
                    ..TransferLimits::for_lease(parts.handoff.lease)
                },
                // Every transfer's task closes it and waits for that, unless the whole process ends.
                reclaim: Arc::new(
                    |reclaimed| tracing::debug!(transfer = %reclaimed.id, "blocks reclaimed at the end"),
                ),
            },
            shared.stop.clone(),
        )?;
        let (engine_metrics, handoff_metrics) = parts.metrics.register(|registry| {
            TransferMetrics::register(registry, node.clone());
            (EngineMetrics::register(registry), HandoffMetrics::register(registry))
        });
        let transfers = Transfers::new(
            node.clone(),
            pool.layout(),
            shared.engine.clone(),
            parts.handoff.timeout,
            shared.tasks.clone(),
            runtime.clone(),
            handoff_metrics,
        );
        let (alive, ended) = oneshot::channel();
        let stop = shared.stop.clone();
        let thread = thread::spawn(EngineParts {
            executor: parts.executor,
            limits: parts.limits,
            root,
            commands: parts.commands,
            transfers,
            cache_events,
            deliver: Arc::new(move |delivery| streams.deliver(delivery)),
            load: parts.load,
            metrics: engine_metrics,
            shutdown: stop.clone(),
            runtime,
            alive,
        })
        .map_err(ServerError::Thread)?;
        Ok(Self { node, inference, kv_cache, ended: Some((ended, thread)), stop })
    }

    /// The gRPC services: Inference, Handoff and KvCache.
    pub fn routes(&self) -> Routes {
        let inference =
            InferenceServer::new(self.inference.clone()).max_decoding_message_size(MESSAGE_BYTES_MOST);
        Routes::new(inference)
            .add_service(InterceptedService::new(self.node.handoff_service(), known_peer))
            .add_service(KvCacheServer::new(self.kv_cache.clone()))
    }

    /// Resolves when the engine's thread has ended and nothing touches the KV cache: an error unless it was told to.
    pub fn engine_ended(&mut self) -> impl Future<Output = Result<(), ServerError>> + Send + 'static {
        let (ended, stop, node) = (self.ended.take(), self.stop.clone(), self.node.clone());
        async move {
            if let Some((ended, thread)) = ended {
                let _ = ended.await;
                // The thread's last act was to end that channel: this does not wait for anything.
                match tokio::task::spawn_blocking(|| thread.join()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(ServerError::EngineDied),
                }
            }
            if !stop.is_cancelled() {
                return Err(ServerError::EngineDied);
            }
            node.stopped().await;
            Ok(())
        }
    }
}
