//! The `Inference` service: coordinators' legs in, tokens out. A thin adapter between streams and the engine.
//!
//! Each stream has an [`outbox::Outbox`], a task that reads dispatches and cancels, and the response stream that empties
//! the outbox (`responses`). Whichever ends first ends the other, and then every leg of the stream is cancelled.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use baton_kvtransfer::FirstTokens;
use baton_process::tls;
use baton_proto::{CoordinatorId, LegId, v1};
use tokio::sync::{mpsc, watch};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    engine::{
        load::Load,
        sampler::logprobs::TokenLogprobs,
        sequence::{Address, FinishReason, LegEnd, LegUpdate, NewSequence, SequenceId, StreamId},
        thread::Command,
    },
    permits::Permits,
    role::RoleView,
};

pub mod dispatch;
pub mod outbox;
mod responses;
pub mod streams;

use dispatch::{InstanceFacts, Leg};
use outbox::Outbox;
use responses::{AttachStream, Responses, load_interval};
use streams::{STREAMS_MOST, Streams};

/// How long a new stream may take to say hello.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// What the service works with.
#[derive(Debug, Clone)]
pub struct InferenceParts {
    pub facts: Arc<InstanceFacts>,
    pub role: watch::Receiver<RoleView>,
    pub load: watch::Receiver<Load>,
    pub engine: mpsc::Sender<Command>,
    pub streams: Arc<Streams>,
    pub permits: Permits,
    pub tasks: TaskTracker,
    /// Ends every stream.
    pub shutdown: CancellationToken,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct InferenceService {
    parts: InferenceParts,
    next: Arc<AtomicU64>,
}

impl InferenceService {
    pub fn new(parts: InferenceParts) -> Self {
        Self { parts, next: Arc::new(AtomicU64::new(1)) }
    }

    /// The first of `count` numbers that nobody else has.
    fn fresh(&self, count: u32) -> u64 {
        self.next.fetch_add(count.into(), Ordering::Relaxed)
    }
}

#[tonic::async_trait]
impl v1::inference_server::Inference for InferenceService {
    type AttachStream = AttachStream;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachRequest>>,
    ) -> Result<Response<AttachStream>, Status> {
        let peer = tls::Peer::of(&request);
        let mut requests = request.into_inner();
        let (coordinator, interval) = hello(&mut requests).await?;
        peer.speaks_as(coordinator.as_str())?;
        let stream = StreamId(self.fresh(1));
        let Some(outbox) = self.parts.streams.open(stream) else {
            return Err(Status::resource_exhausted(format!(
                "{STREAMS_MOST} coordinators are attached already"
            )));
        };
        tracing::info!(%coordinator, "coordinator attached");
        let ended = self.parts.shutdown.child_token();
        let reader = Reader { service: self.clone(), stream, outbox: outbox.clone(), ended: ended.clone() };
        self.parts.tasks.spawn(reader.run(requests, coordinator));
        let mut role = self.parts.role.clone();
        let welcome = v1::attach_response::Welcome {
            instance_id: self.parts.facts.instance_id.to_string(),
            incarnation: self.parts.facts.incarnation.0,
            role: Some((*role.borrow_and_update()).into()),
        };
        let responses = Responses::new(outbox, role, self.parts.load.clone(), interval, ended);
        Ok(Response::new(responses.after(welcome)))
    }
}

/// Who attaches, and how often it is told the load.
async fn hello(requests: &mut Streaming<v1::AttachRequest>) -> Result<(CoordinatorId, Duration), Status> {
    let first = tokio::time::timeout(HELLO_WITHIN, requests.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no hello came"))??;
    match first.and_then(|request| request.frame) {
        Some(v1::attach_request::Frame::Hello(hello)) => {
            let id = CoordinatorId::new(hello.coordinator_id)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            Ok((id, load_interval(hello.load_interval_millis)))
        }
        _ => Err(Status::invalid_argument("the first frame must be a hello")),
    }
}

/// Why a coordinator's stream is over; for the log.
#[derive(Debug, thiserror::Error)]
enum Detached {
    #[error("its response stream is gone")]
    ResponsesGone,
    #[error("it has closed its stream")]
    Closed,
    #[error("its stream broke: {0}")]
    Broken(Box<Status>),
    #[error("it said hello twice")]
    HelloTwice,
    #[error("it used the number of leg {0} twice")]
    LegTwice(LegId),
    #[error("the engine has ended")]
    EngineGone,
}

/// Reads one stream's requests.
struct Reader {
    service: InferenceService,
    stream: StreamId,
    outbox: Arc<Outbox>,
    ended: CancellationToken,
}

impl Reader {
    async fn run(self, mut requests: Streaming<v1::AttachRequest>, coordinator: CoordinatorId) {
        let reason = loop {
            let message = async {
                self.outbox.room().await;
                requests.message().await
            };
            let message = tokio::select! {
                biased;
                () = self.ended.cancelled() => break Detached::ResponsesGone,
                message = message => message,
            };
            match message {
                Ok(Some(request)) => {
                    if let Err(error) = self.take(request).await {
                        break error;
                    }
                }
                Ok(None) => break Detached::Closed,
                Err(status) => break Detached::Broken(Box::new(status)),
            }
        };
        tracing::info!(%coordinator, %reason, "coordinator detached");
        self.ended.cancel();
        self.service.parts.streams.close(self.stream);
        // A closed queue means that the engine is gone, and its sequences with it.
        let _ = self.service.parts.engine.send(Command::CancelStream(self.stream)).await;
    }

    /// An error breaks the stream.
    async fn take(&self, request: v1::AttachRequest) -> Result<(), Detached> {
        match request.frame {
            Some(v1::attach_request::Frame::Dispatch(dispatch)) => self.dispatch(dispatch).await,
            Some(v1::attach_request::Frame::Cancel(cancel)) => {
                if let Some((leg, choices)) = self.outbox.choices(LegId(cancel.leg), cancel.choice) {
                    tracing::debug!(leg = cancel.leg, choice = ?cancel.choice, reason = cancel.reason, "cancelled");
                    let damaged = cancel.damaged;
                    self.command(Command::Cancel { leg, choices, damaged }).await?;
                }
                Ok(())
            }
            Some(v1::attach_request::Frame::Hello(_)) => Err(Detached::HelloTwice),
            // From a newer coordinator: an older instance leaves out what it does not know.
            None => Ok(()),
        }
    }

    async fn dispatch(&self, dispatch: v1::Dispatch) -> Result<(), Detached> {
        let parts = &self.service.parts;
        let leg = LegId(dispatch.leg);
        let asked = dispatch.sampling.as_ref().map_or(1, |sampling| sampling.choices);
        let asked = asked.clamp(1, FirstTokens::MOST as u32);
        // Before the role is read: a role switch waits for every permit that was taken before it began.
        let permit = parts.permits.take();
        let checked = Leg::try_from(dispatch).and_then(|leg| {
            let role = *parts.role.borrow();
            leg.check(&parts.facts, role).map(|()| leg)
        });
        let choices = checked.as_ref().map_or(asked, |leg| leg.asked.choices);
        let id = SequenceId(self.service.fresh(choices));
        if !self.outbox.open(leg, id, choices) {
            return Err(Detached::LegTwice(leg));
        }
        match checked {
            Ok(leg) => {
                let new = self.sequence(id, leg, permit);
                self.command(Command::Add(Box::new(new))).await
            }
            Err(error) => {
                tracing::debug!(%leg, code = error.code.name(), %error, "leg refused");
                // Whoever asked for several choices waits for the end of each.
                for choice in 0..choices {
                    self.outbox.put(LegUpdate::failed(leg, choice, error.clone()));
                }
                Ok(())
            }
        }
    }

    fn sequence(&self, id: SequenceId, leg: Leg, permit: TaskTrackerToken) -> NewSequence {
        let span = tracing::info_span!("leg", request_id = %leg.asked.request, work = leg.asked.work.name());
        leg.trace.adopt(&span);
        NewSequence {
            id,
            address: Address { stream: self.stream, leg: leg.leg },
            asked: leg.asked,
            wanted: Instant::now() + leg.first_token_within,
            deadline: leg.timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            permit: Some(permit),
            span,
        }
    }

    async fn command(&self, command: Command) -> Result<(), Detached> {
        self.service.parts.engine.send(command).await.map_err(|_| Detached::EngineGone)
    }
}

impl From<RoleView> for v1::RoleChange {
    fn from(view: RoleView) -> Self {
        Self { role: view.role.to_wire().into(), epoch: view.epoch.0, phase: view.phase.to_wire().into() }
    }
}

impl From<LegUpdate> for v1::LegOutput {
    fn from(update: LegUpdate) -> Self {
        let end = update.end.map(|end| match end {
            LegEnd::Finished { reason, prompt_tokens, cached_tokens, completion_tokens } => {
                let reason = match reason {
                    FinishReason::Stop => v1::FinishReason::Stop,
                    FinishReason::Length => v1::FinishReason::Length,
                    FinishReason::HandedOff => v1::FinishReason::HandedOff,
                    FinishReason::Cancelled => v1::FinishReason::Cancelled,
                };
                v1::leg_output::End::Finished(v1::Finished {
                    reason: reason.into(),
                    prompt_tokens,
                    cached_tokens,
                    completion_tokens,
                })
            }
            LegEnd::Failed(error) => v1::leg_output::End::Failed(error.into()),
        });
        Self {
            leg: update.leg.0,
            choice: update.choice,
            first_position: update.first_position,
            tokens: update.tokens,
            logprobs: update.logprobs.into_iter().map(v1::TokenLogprobs::from).collect(),
            cached_tokens: update.cached_tokens,
            end,
        }
    }
}

impl From<TokenLogprobs> for v1::TokenLogprobs {
    fn from(of: TokenLogprobs) -> Self {
        let (top_tokens, top_logprobs) = of.top.into_iter().unzip();
        Self { logprob: of.logprob, top_tokens, top_logprobs }
    }
}
