//! An instance of which the test says what it answers.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use baton_coordinator::prepare::Served;
use baton_proto::{ApiError, ErrorCode, InstanceId, InstanceSpec, ModelIdentity, v1};
use baton_registry::testing::instance_spec;
use parking_lot::Mutex;
use tokio::{net::TcpListener, sync::mpsc, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tonic::{Request, Response, Status, Streaming};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer, leg_output::End};

use super::{COORDINATOR, PATIENCE, cache};

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
    pub(super) async fn start(
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
