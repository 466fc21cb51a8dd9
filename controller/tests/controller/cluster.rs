//! Controllers in this process, each in a runtime of its own so that it can be killed, and scripted servers that talk
//! to them over loopback gRPC.

use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_controller::{ControllerConfig, Parts, config::StoreKind, open_store};
use baton_process::{HealthHandle, Metrics, Tls};
use baton_proto::v1::{
    self, control_client::ControlClient, controller_order, fleet_admin_client::FleetAdminClient,
    instance_report,
};
use baton_registry::{RemoteConfig, RemoteStore, Store};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, Streaming, transport::Channel};

/// A test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Times short enough for a test.
pub(crate) fn config() -> ControllerConfig {
    let mut config = ControllerConfig { controller_id: "c0".into(), ..ControllerConfig::default() };
    config.sessions.beat = Duration::from_millis(100);
    config.sessions.lease = Duration::from_millis(800);
    config.roles.settle = Duration::from_millis(300);
    config.roles.lost_grace = Duration::from_secs(2);
    config.leader.ttl = Duration::from_secs(2);
    config.leader.records_ttl = Duration::from_secs(20);
    config
}

pub(crate) fn on_etcd(id: &str, endpoint: &str) -> ControllerConfig {
    let mut config = ControllerConfig { controller_id: id.into(), ..config() };
    config.store.kind = StoreKind::Etcd;
    config.store.etcd.endpoints = vec![endpoint.into()];
    config
}

/// A controller process, nearly.
pub(crate) struct Node {
    pub(crate) endpoint: String,
    pub(crate) metrics: Metrics,
    runtime: Option<Runtime>,
    shutdown: CancellationToken,
    served: Option<tokio::task::JoinHandle<()>>,
}

impl Node {
    pub(crate) fn start(config: ControllerConfig) -> Self {
        Self::start_at(config, "127.0.0.1:0")
    }

    pub(crate) fn start_at(config: ControllerConfig, address: &str) -> Self {
        Self::start_with(config, address, |store| store)
    }

    /// One that sees the store through what the test puts before it.
    pub(crate) fn start_over(
        config: ControllerConfig,
        before: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store> + Send + 'static,
    ) -> Self {
        Self::start_with(config, "127.0.0.1:0", before)
    }

    fn start_with(
        config: ControllerConfig,
        address: &str,
        before: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store> + Send + 'static,
    ) -> Self {
        let until = Instant::now() + PATIENCE;
        let listener = loop {
            match TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(error) if Instant::now() > until => panic!("cannot bind {address}: {error}"),
                // The killed one's socket closes in the background.
                Err(_) => std::thread::yield_now(),
            }
        };
        let endpoint = listener.local_addr().expect("address").to_string();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (shutdown, tasks, metrics) =
            (CancellationToken::new(), TaskTracker::new(), Metrics::new("controller"));
        let served = {
            let (shutdown, metrics, advertised) = (shutdown.clone(), metrics.clone(), endpoint.clone());
            runtime.spawn(async move {
                let store = before(open_store(&config, &shutdown, &tasks).expect("a store"));
                let parts = Parts {
                    tls: Tls::plaintext(),
                    config,
                    advertised,
                    store,
                    metrics,
                    health: HealthHandle::default(),
                    shutdown,
                    tasks: tasks.clone(),
                };
                parts.serve(listener, Duration::from_secs(2)).await.expect("serving");
                tasks.close();
                tasks.wait().await;
            })
        };
        Self { endpoint, metrics, runtime: Some(runtime), shutdown, served: Some(served) }
    }

    /// As kill -9 does: nothing is said to anyone.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// As SIGTERM does.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        if let Some(served) = self.served.take() {
            tokio::time::timeout(PATIENCE, served)
                .await
                .expect("it does not stop")
                .expect("it stopped badly");
        }
        self.kill();
    }

    pub(crate) async fn admin(&self) -> FleetAdminClient<Channel> {
        FleetAdminClient::connect(format!("http://{}", self.endpoint)).await.expect("connect")
    }

    pub(crate) async fn roles(&self) -> Result<Vec<v1::RoleView>, Status> {
        Ok(self.admin().await.list_roles(v1::ListRolesRequest {}).await?.into_inner().roles)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn spec(id: &str, incarnation: u64) -> v1::InstanceSpec {
    v1::InstanceSpec {
        instance_id: id.into(),
        incarnation,
        group: "default".into(),
        device: "cpu".into(),
        device_count: 1,
        model: Some(v1::ModelIdentity {
            name: "m".into(),
            revision: "r".into(),
            architecture: "llama".into(),
            context_tokens: 100,
            vocabulary_size: 10,
        }),
        kv_layout: Some(v1::KvLayout { fingerprint: "x".into(), block_tokens: 16, ..Default::default() }),
        inference_endpoint: "127.0.0.1:1".into(),
        handoff_endpoint: "127.0.0.1:2".into(),
        transports: vec!["tcp".into()],
        handoff_protocol_oldest: 1,
        handoff_protocol_newest: 1,
        ..Default::default()
    }
}

pub(crate) fn beat(role: v1::Role, epoch: u64, phase: v1::Phase) -> v1::InstanceBeat {
    v1::InstanceBeat { role: role.into(), role_epoch: epoch, phase: phase.into(), ..Default::default() }
}

pub(crate) fn waiting() -> v1::InstanceBeat {
    beat(v1::Role::None, 0, v1::Phase::Waiting)
}

/// Whether the id is another process's, for now.
fn is_taken(refused: &v1::Refuse) -> bool {
    refused.reason.as_ref().is_some_and(|reason| reason.code() == v1::ErrorCode::AlreadyExists)
}

/// A server as a script: it says and hears what the test wants.
pub(crate) struct Server {
    pub(crate) state: v1::InstanceBeat,
    reports: mpsc::Sender<v1::InstanceReport>,
    orders: Streaming<v1::ControllerOrder>,
    pub(crate) leader_epoch: u64,
}

impl Server {
    /// Opens a session and awaits the first answer, which is returned if it is no welcome.
    pub(crate) async fn call(
        endpoint: &str,
        spec: v1::InstanceSpec,
        state: v1::InstanceBeat,
    ) -> Result<Result<Self, v1::Refuse>, Status> {
        let mut client = ControlClient::connect(format!("http://{endpoint}"))
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let (reports, receiver) = mpsc::channel(16);
        let hello = v1::InstanceHello { spec: Some(spec), beat: Some(state) };
        let report = v1::InstanceReport { report: Some(instance_report::Report::Hello(hello)) };
        reports.send(report).await.expect("room");
        let mut orders = client.session(ReceiverStream::new(receiver)).await?.into_inner();
        let first = orders.message().await?.and_then(|order| order.order);
        match first {
            Some(controller_order::Order::Welcome(welcome)) => {
                Ok(Ok(Self { state, reports, orders, leader_epoch: welcome.leader_epoch }))
            }
            Some(controller_order::Order::Refuse(refuse)) => Ok(Err(refuse)),
            other => panic!("the first answer is {other:?}"),
        }
    }

    pub(crate) async fn join(endpoint: &str, spec: v1::InstanceSpec, state: v1::InstanceBeat) -> Self {
        Self::call(endpoint, spec, state).await.expect("a session").expect("a welcome")
    }

    /// Calls until some controller of these welcomes it: one that has yet to notice that the earlier process's session
    /// broke refuses a later one for as long.
    pub(crate) async fn join_any(
        endpoints: &[&str],
        spec: v1::InstanceSpec,
        state: v1::InstanceBeat,
    ) -> Self {
        let calls = async {
            loop {
                for endpoint in endpoints {
                    match Self::call(endpoint, spec.clone(), state).await {
                        Ok(Ok(server)) => return server,
                        Ok(Err(refused)) if !is_taken(&refused) => panic!("refused: {refused:?}"),
                        Ok(Err(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, calls).await.expect("no controller welcomes it")
    }

    pub(crate) async fn beat(&self) {
        let report = v1::InstanceReport { report: Some(instance_report::Report::Beat(self.state)) };
        // A session that has ended is noticed by its orders.
        self.reports.send(report).await.ok();
    }

    pub(crate) async fn bye(&self) {
        let bye = v1::InstanceBye { reason: "test".into() };
        self.reports
            .send(v1::InstanceReport { report: Some(instance_report::Report::Bye(bye)) })
            .await
            .expect("bye");
    }

    /// Beats, and does what it is told, until it is told something; the session's end is none.
    pub(crate) async fn next_order(&mut self, at_most: Duration) -> Option<Option<v1::AssignRole>> {
        let until = tokio::time::Instant::now() + at_most;
        let mut interval = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                order = self.orders.message() => {
                    return match order.ok().flatten().and_then(|order| order.order) {
                        Some(controller_order::Order::Assign(assign)) => {
                            assert!(assign.epoch > self.state.role_epoch, "{assign:?} would be ignored");
                            let load = self.state.load;
                            self.state = beat(assign.role(), assign.epoch, v1::Phase::Ready);
                            // What it has counted goes on.
                            self.state.load = load;
                            self.beat().await;
                            Some(Some(assign))
                        }
                        _ => Some(None),
                    };
                }
                _ = interval.tick() => self.beat().await,
                () = tokio::time::sleep_until(until) => return None,
            }
        }
    }

    /// The next role it is given.
    pub(crate) async fn next_role(&mut self) -> v1::AssignRole {
        self.next_order(PATIENCE).await.expect("no role came").expect("the session ended")
    }

    /// Beats for a while, in which nothing may be told.
    pub(crate) async fn hear_nothing(&mut self, during: Duration) {
        if let Some(order) = self.next_order(during).await {
            panic!("heard {order:?}");
        }
    }

    /// Lives on in the background: beats and obeys until the session ends.
    pub(crate) fn live(mut self) -> tokio::task::JoinHandle<v1::InstanceBeat> {
        tokio::spawn(async move {
            while let Some(Some(_)) = self.next_order(Duration::from_secs(600)).await {}
            self.state
        })
    }
}

/// A store over what a node serves.
pub(crate) fn remote(endpoint: &str) -> Arc<dyn Store> {
    Arc::new(RemoteStore::new(&RemoteConfig::new([endpoint])).expect("a client"))
}
