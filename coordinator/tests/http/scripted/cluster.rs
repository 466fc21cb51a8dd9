//! A coordinator with its store, its client and the instances it finds there.

use std::{sync::Arc, time::Duration};

use baton_coordinator::{
    CoordinatorConfig, Parts, assemble, keys::Source, prepare::Served, serve::Service, serve_clients,
};
use baton_process::{Essential, HealthHandle, Tls, http::Port};
use baton_proto::{InstanceId, v1};
use baton_registry::{
    FleetWatch, FleetWatchConfig, MemoryConfig, MemoryStore, Revision, Store, Txn, keys, records,
};
use serde_json::{Value, json};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{Instance, merge, served, until};

/// The id of the coordinator that is there from the start.
pub(crate) const COORDINATOR: &str = "coordinator-0";

/// A coordinator and its instances.
pub(crate) struct Cluster {
    pub(crate) service: Arc<Service>,
    pub(crate) store: MemoryStore,
    pub(crate) url: String,
    pub(crate) client: reqwest::Client,
    _stop: DropGuard,
}

impl Cluster {
    /// Starts both, with bytes for tokens, and waits until the streams stand.
    pub(crate) async fn start<const N: usize>(
        roles: [(&str, v1::Role); N],
        configure: impl FnOnce(&mut CoordinatorConfig),
    ) -> (Self, [Instance; N]) {
        Self::start_with(served(), roles, configure).await
    }

    /// The same with a model of the test's.
    pub(crate) async fn start_with<const N: usize>(
        served: Served,
        roles: [(&str, v1::Role); N],
        configure: impl FnOnce(&mut CoordinatorConfig),
    ) -> (Self, [Instance; N]) {
        Self::start_models(vec![served], roles.map(|(id, role)| (id, role, 0)), configure).await
    }

    /// The same with several models; each instance runs the one of its index.
    pub(crate) async fn start_models<const N: usize>(
        served: Vec<Served>,
        roles: [(&str, v1::Role, usize); N],
        configure: impl FnOnce(&mut CoordinatorConfig),
    ) -> (Self, [Instance; N]) {
        let shutdown = CancellationToken::new();
        let store = MemoryStore::start(MemoryConfig::new(Revision(1)), shutdown.clone(), &TaskTracker::new());
        let mut instances = Vec::new();
        for (id, role, model) in roles {
            let instance = Instance::start(id, role, None, 1, Some(v1::InstanceLoad::default())).await;
            let spec = instance.spec(&served[model]);
            let put = Txn::new().put(keys::instance(&instance.id), records::encode_spec(&spec), None);
            store.txn(put).await.expect("the store takes it");
            instances.push(instance);
        }
        let cluster = Self::coordinator(served, store, shutdown, configure);
        let ids: Vec<_> = instances.iter().map(|instance| instance.id.clone()).collect();
        cluster.attached(&ids).await;
        (cluster, instances.try_into().unwrap_or_else(|_| panic!("as many as there were roles")))
    }

    /// Another coordinator of the same instances, which all run [`served`].
    pub(crate) async fn another(&self, id: &str) -> Self {
        let configure = |config: &mut CoordinatorConfig| config.id = id.into();
        let other =
            Self::coordinator(vec![served()], self.store.clone(), CancellationToken::new(), configure);
        let ids: Vec<_> = self.service.placer.board.own_work().into_iter().map(|(id, _)| id).collect();
        other.attached(&ids).await;
        other
    }

    fn coordinator(
        served: Vec<Served>,
        store: MemoryStore,
        shutdown: CancellationToken,
        configure: impl FnOnce(&mut CoordinatorConfig),
    ) -> Self {
        let tasks = TaskTracker::new();
        let mut config = CoordinatorConfig::default();
        // Prompts are short, and their ways in two parts are what is tested.
        config.placement.local_prefill_tokens = 0;
        config.fleet.reconnect_min = Duration::from_millis(5);
        config.fleet.reconnect_max = Duration::from_millis(20);
        config.limits.placement_timeout = Duration::from_millis(50);
        config.carry.patience = Duration::from_millis(50);
        configure(&mut config);
        let shared: Arc<dyn Store> = Arc::new(store.clone());
        let keys = Source::open(&config.api_keys, &shared).expect("good keys");
        let fleet = FleetWatch::start(shared, FleetWatchConfig::default(), shutdown.clone(), &tasks);
        let parts = Parts {
            tls: Tls::plaintext(),
            served,
            keys,
            fleet,
            metrics: baton_process::Metrics::new("coordinator"),
            health: HealthHandle::default(),
            tasks: tasks.clone(),
            essential: Essential::new(tasks.clone(), shutdown.clone()),
            shutdown: shutdown.clone(),
            drained: shutdown.clone(),
        };
        let (service, router) = assemble(&config, parts).expect("is assembled");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("is bound"));
        let port = Port::of_observers(router);
        let (placer, second) = (service.placer.clone(), Duration::from_secs(1));
        tasks.spawn(serve_clients(listener, port, placer, shutdown.clone(), second, second));
        let client = reqwest::Client::new();
        Self { service, store, url, client, _stop: shutdown.drop_guard() }
    }

    async fn attached(&self, ids: &[InstanceId]) {
        let attachments = &self.service.placer.attachments;
        let is_up = |id| attachments.get(id).is_some_and(|attachment| attachment.is_up());
        until("all streams stand", || ids.iter().all(is_up)).await;
    }

    /// Begins to drain the coordinator.
    pub(crate) async fn shut_down(self) -> Arc<Service> {
        let address = self.url.strip_prefix("http://").expect("a URL").to_owned();
        let service = self.service;
        drop(self._stop);
        until("nobody is let in any more", || std::net::TcpStream::connect(&address).is_err()).await;
        service
    }

    /// Whether a request for the first model could be served.
    pub(crate) fn can_serve(&self) -> bool {
        self.service.models.iter().next().is_some_and(|model| self.service.can_serve(model).is_ok())
    }

    /// One prefill, one decode.
    pub(crate) async fn pair() -> (Self, Instance, Instance) {
        let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
        let (cluster, [prefill, decode]) = Self::start(roles, |_| {}).await;
        (cluster, prefill, decode)
    }

    /// Sends a request whose body has `model`, `messages` of one turn, and `more`.
    pub(crate) fn chat(&self, more: Value) -> tokio::task::JoinHandle<reqwest::Response> {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
        merge(&mut body, more);
        self.post("/v1/chat/completions", body.to_string())
    }

    pub(crate) fn post(&self, path: &str, body: String) -> tokio::task::JoinHandle<reqwest::Response> {
        let request = self.client.post(format!("{}{path}", self.url)).body(body);
        tokio::spawn(async move { request.send().await.expect("an answer") })
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("{}{path}", self.url)).send().await.expect("an answer")
    }

    /// Waits until nothing is held for any request.
    pub(crate) async fn at_rest(&self) {
        let idle = || {
            self.service.roster.list().is_empty()
                && self.service.metrics.in_flight.get() == 0
                && self.service.metrics.prompt_reserved.get() == 0
                && self.service.placer.board.own_work().iter().all(|(_, work)| *work == Default::default())
        };
        until("nothing is held for any request", idle).await;
    }
}
