//! A coordinator in this process, between a real HTTP client and scripted instances on loopback.
//!
//! Tests read what instances are sent and answer it step by step; nothing computes anything here. Tokens are bytes.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use baton_coordinator::{
    CoordinatorConfig, Parts, assemble, keys::Source, prepare::Served, serve::Service, serve_clients,
};
use baton_process::{Essential, HealthHandle, Tls, http::Port};
use baton_proto::{ApiError, ErrorCode, InstanceId, InstanceSpec, ModelIdentity, tokens, v1};
use baton_registry::{
    FleetWatch, FleetWatchConfig, MemoryConfig, MemoryStore, Revision, Store, Txn, keys,
    testing::instance_spec,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tonic::{Request, Response, Status, Streaming};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer, leg_output::End};

pub(crate) mod cache;
mod models;
pub(crate) use models::{Watched, other, served};

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The id of the coordinator that is there from the start.
pub(crate) const COORDINATOR: &str = "coordinator-0";

/// Waits until `what` is true.
pub(crate) async fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let wait = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never came true: {what}"));
}

/// The tokens of a dispatched prompt.
pub(crate) fn prompt_of(dispatch: &v1::Dispatch) -> Vec<u32> {
    tokens::from_wire(&dispatch.prompt_tokens).expect("whole token ids")
}

/// The sending halves of the streams that coordinators have open, by their ids.
type Outgoing = Arc<Mutex<HashMap<String, mpsc::Sender<Result<v1::AttachResponse, Status>>>>>;

struct Script {
    id: String,
    incarnation: u64,
    role: v1::RoleChange,
    /// What it tells of its load at first, if anything.
    load: Option<v1::InstanceLoad>,
    outgoing: Outgoing,
    incoming: mpsc::Sender<Ask>,
    greeted: mpsc::Sender<v1::attach_request::Hello>,
}

#[tonic::async_trait]
impl v1::inference_server::Inference for Script {
    type AttachStream = ReceiverStream<Result<v1::AttachResponse, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut frames = request.into_inner();
        let Some(v1::AttachRequest { frame: Some(Ask::Hello(hello)) }) = frames.message().await? else {
            return Err(Status::invalid_argument("the first frame must be a hello"));
        };
        let (sender, receiver) = mpsc::channel(256);
        let welcome = v1::attach_response::Welcome {
            instance_id: self.id.clone(),
            incarnation: self.incarnation,
            role: Some(self.role),
        };
        let welcome = v1::AttachResponse { frame: Some(Answer::Welcome(welcome)) };
        sender.try_send(Ok(welcome)).expect("room for the first message");
        if let Some(load) = self.load {
            let load = v1::AttachResponse { frame: Some(Answer::Load(load)) };
            sender.try_send(Ok(load)).expect("room for the second message");
        }
        self.outgoing.lock().insert(hello.coordinator_id.clone(), sender);
        // Only one test reads them, and not those of many attempts to connect.
        let _ = self.greeted.try_send(hello);
        let incoming = self.incoming.clone();
        tokio::spawn(async move {
            while let Ok(Some(v1::AttachRequest { frame: Some(frame) })) = frames.message().await {
                if incoming.send(frame).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// An instance that does what the test says.
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) role: v1::Role,
    pub(crate) cache: cache::Cache,
    address: SocketAddr,
    outgoing: Outgoing,
    incoming: mpsc::Receiver<Ask>,
    greeted: mpsc::Receiver<v1::attach_request::Hello>,
    stop: Option<DropGuard>,
    ended: TaskTracker,
}

impl Instance {
    async fn start(
        id: &str,
        role: v1::Role,
        at: Option<SocketAddr>,
        incarnation: u64,
        load: Option<v1::InstanceLoad>,
    ) -> Self {
        let at = at.unwrap_or_else(|| "127.0.0.1:0".parse().expect("an address"));
        let listener = TcpListener::bind(at).await.expect("a free port");
        let address = listener.local_addr().expect("is bound");
        let (sender, incoming) = mpsc::channel(256);
        let (greets, greeted) = mpsc::channel(8);
        let outgoing = Outgoing::default();
        let change = v1::RoleChange { role: role.into(), epoch: 1, phase: v1::Phase::Ready.into() };
        let script = Script {
            id: id.into(),
            incarnation,
            role: change,
            load,
            outgoing: outgoing.clone(),
            incoming: sender,
            greeted: greets,
        };
        let stop = CancellationToken::new();
        let service = v1::inference_server::InferenceServer::new(script);
        let cache = cache::Cache::default();
        let events = v1::kv_cache_server::KvCacheServer::new(cache.clone());
        let serve = tonic::transport::Server::builder()
            .add_service(service)
            .add_service(events)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
        let ended = TaskTracker::new();
        ended.spawn(serve);
        ended.close();
        Self {
            id: InstanceId::new(id).expect("a good id"),
            role,
            cache,
            address,
            outgoing,
            incoming,
            greeted,
            stop: Some(stop.drop_guard()),
            ended,
        }
    }

    pub(crate) fn spec(&self, served: &Served) -> InstanceSpec {
        let spec = instance_spec(self.id.as_str(), 1);
        InstanceSpec {
            model: ModelIdentity {
                name: served.name.to_string(),
                revision: served.revision.clone(),
                vocabulary_size: served.text.vocabulary(),
                ..spec.model
            },
            context_tokens: served.context_tokens,
            inference_endpoint: self.address.to_string(),
            handoff_endpoint: format!("{}-handoff:1", self.id),
            ..spec
        }
    }

    /// The next frame after the greeting.
    pub(crate) async fn next(&mut self) -> Ask {
        let frame = timeout(PATIENCE, self.incoming.recv()).await;
        let frame = frame.unwrap_or_else(|_| panic!("{} was sent nothing", self.id));
        frame.unwrap_or_else(|| panic!("the stream to {} ended", self.id))
    }

    /// How the next coordinator that attached has greeted.
    pub(crate) async fn greeting(&mut self) -> v1::attach_request::Hello {
        timeout(PATIENCE, self.greeted.recv()).await.expect("a greeting in time").expect("a greeting")
    }

    pub(crate) async fn dispatch(&mut self) -> v1::Dispatch {
        match self.next().await {
            Ask::Dispatch(dispatch) => dispatch,
            other => panic!("{} got {other:?} for a dispatch", self.id),
        }
    }

    pub(crate) async fn cancelled(&mut self) -> v1::Cancel {
        match self.next().await {
            Ask::Cancel(cancel) => cancel,
            other => panic!("{} got {other:?} for a cancel", self.id),
        }
    }

    /// Whether nothing waits to be read.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.incoming.is_empty()
    }

    pub(crate) fn say(&self, answer: Answer) {
        self.say_to(COORDINATOR, answer);
    }

    pub(crate) fn say_to(&self, coordinator: &str, answer: Answer) {
        let outgoing = self.outgoing.lock();
        let sender = outgoing.get(coordinator).expect("the coordinator is attached");
        sender.try_send(Ok(v1::AttachResponse { frame: Some(answer) })).expect("room for a message");
    }

    /// What says something to the coordinator when it is called, as long as one is attached.
    pub(crate) fn voice(&self) -> impl Fn(Answer) + Send + use<> {
        let outgoing = self.outgoing.clone();
        move |answer| {
            if let Some(sender) = outgoing.lock().get(COORDINATOR) {
                let _ = sender.try_send(Ok(v1::AttachResponse { frame: Some(answer) }));
            }
        }
    }

    /// Tokens of one of a leg's choices, and its end.
    pub(crate) fn of_choice(
        &self,
        (leg, choice): (u64, u32),
        first_position: u32,
        text: &str,
        end: Option<v1::FinishReason>,
    ) {
        let finished = |reason: v1::FinishReason| {
            End::Finished(v1::Finished { reason: reason.into(), cached_tokens: 5, ..Default::default() })
        };
        let tokens = text.bytes().map(u32::from).collect();
        let (end, logprobs) = (end.map(finished), Vec::new());
        let output =
            v1::LegOutput { leg, choice, first_position, tokens, end, logprobs, cached_tokens: None };
        self.say(Answer::Step(v1::StepOutput { legs: vec![output] }));
    }

    fn leg(&self, leg: u64, first_position: u32, text: &str, end: Option<End>) {
        self.scored(leg, first_position, text, Vec::new(), end);
    }

    /// Tokens with their log probabilities.
    pub(crate) fn scored(
        &self,
        leg: u64,
        first_position: u32,
        text: &str,
        logprobs: Vec<v1::TokenLogprobs>,
        end: Option<End>,
    ) {
        let tokens = text.bytes().map(u32::from).collect();
        let (choice, cached_tokens) = (0, None);
        let output = v1::LegOutput { leg, choice, first_position, tokens, end, logprobs, cached_tokens };
        self.say(Answer::Step(v1::StepOutput { legs: vec![output] }));
    }

    pub(crate) fn tokens(&self, leg: u64, first_position: u32, text: &str) {
        self.leg(leg, first_position, text, None);
    }

    /// A leg's first tokens, and how many of the prompt's were cached.
    pub(crate) fn begin(&self, leg: u64, text: &str, cached_tokens: u32) {
        let tokens = text.bytes().map(u32::from).collect();
        let begun = v1::LegOutput { leg, tokens, cached_tokens: Some(cached_tokens), ..Default::default() };
        self.say(Answer::Step(v1::StepOutput { legs: vec![begun] }));
    }

    pub(crate) fn finish(&self, leg: u64, first_position: u32, text: &str, reason: v1::FinishReason) {
        let finished = v1::Finished { reason: reason.into(), cached_tokens: 5, ..Default::default() };
        self.leg(leg, first_position, text, Some(End::Finished(finished)));
    }

    /// Hands on what it has computed, of which so much of the prompt was cached.
    pub(crate) fn hand_on(&self, leg: u64, first_position: u32, text: &str, cached_tokens: u32) {
        let reason = v1::FinishReason::HandedOff.into();
        let handed_on = v1::Finished { reason, cached_tokens, ..Default::default() };
        self.leg(leg, first_position, text, Some(End::Finished(handed_on)));
    }

    pub(crate) fn fail(&self, leg: u64, code: ErrorCode) {
        let failed = ApiError::new(code, "as scripted").into();
        self.leg(leg, 0, "", Some(End::Failed(failed)));
    }

    /// Cuts the stream, as a killed process does.
    pub(crate) fn cut(&self) {
        self.outgoing.lock().clear();
    }

    /// Ends the instance; its address is free afterwards.
    pub(crate) async fn kill(&mut self) {
        self.cut();
        self.stop = None;
        timeout(PATIENCE, self.ended.wait()).await.expect("the server ends");
    }

    /// Starts it again where it was, as the same process for all that anybody can tell.
    pub(crate) async fn restart(&mut self) {
        self.restart_as(1).await;
    }

    /// Starts another process of it, where it was.
    pub(crate) async fn restart_as(&mut self, incarnation: u64) {
        let load = Some(v1::InstanceLoad::default());
        *self = Self::start(self.id.as_str(), self.role, Some(self.address), incarnation, load).await;
    }

    /// Starts it again where it was; what it tells of its load the test says.
    pub(crate) async fn restart_silent(&mut self) {
        *self = Self::start(self.id.as_str(), self.role, Some(self.address), 1, None).await;
    }
}

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
            let put = Txn::new().put(
                keys::instance(&instance.id),
                baton_registry::records::encode_spec(&spec),
                None,
            );
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

pub(crate) fn merge(into: &mut Value, more: Value) {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend(more);
    }
}

/// The events of a stream that has ended, without `data: `.
pub(crate) fn events(body: &str) -> Vec<&str> {
    let events = body.split_terminator("\n\n");
    events.map(|event| event.strip_prefix("data: ").expect("an event")).collect()
}

/// The text that a chat's stream carried.
pub(crate) fn chat_text(events: &[&str]) -> String {
    let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    chunks.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

pub(crate) fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Waits until the only request has this many tokens.
pub(crate) async fn consumed(cluster: &Cluster, tokens: u32) {
    until("the tokens are there", || {
        cluster.service.roster.list().iter().any(|card| card.completion_tokens() == tokens)
    })
    .await;
}

/// Answers one request on a pair: `text`'s first byte by prefill, the rest by decode.
pub(crate) async fn answer(prefill: &mut Instance, decode: &mut Instance, text: &str) {
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.finish(p.leg, 0, &text[..1], v1::FinishReason::HandedOff);
    decode.finish(d.leg, 1, &text[1..], v1::FinishReason::Length);
}
