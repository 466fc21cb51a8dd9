//! The path of a request through the stages: Received -> Prepared -> Admitted -> Placed -> Streaming.
//!
//! Called by [`crate::http`] with what arrived; answers with a [`Streaming`] or one error. Each stage consumes the one
//! before it, so that nothing can be skipped and everything a request holds is given back wherever it is dropped.

use std::sync::Arc;

use baton_proto::ApiError;
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use tokio::time::{Instant, timeout_at};
use tracing::Span;

use crate::{
    admit::{Gate, Permit, Ticket},
    config::LimitsConfig,
    dispatch::{Assignment, Generation},
    fleet::keeper::Links,
    metrics::{Metrics, RequestLabels},
    prepare::{Endpoint, Prepared, Sampling, Served, prepare},
    requests::{CardGuard, Roster, Stage},
    schedule::{
        NoPlace,
        board::{Board, Booking},
    },
    stream::{Streaming, Usage},
};

/// Bodies up to this size are prepared on the spot; tokenising larger ones would hold up everybody else's tokens.
const PREPARE_INLINE_BYTES: usize = 2 << 10;
/// How often a request is placed before its failure is told.
const ATTEMPTS_MOST: u32 = 2;

/// Everything the stages need.
pub struct Service {
    pub served: Arc<Served>,
    pub limits: LimitsConfig,
    pub gate: Gate,
    pub board: Arc<Board>,
    pub links: Arc<Links>,
    pub roster: Arc<Roster>,
    pub metrics: Arc<Metrics>,
}

/// A request whose body has been read.
pub struct Received {
    pub endpoint: Endpoint,
    pub body: Bytes,
    /// W3C trace context for instances; empty = none.
    pub traceparent: String,
    pub ticket: Ticket,
    pub card: CardGuard,
    pub report: Report,
}

struct Admitted {
    prepared: Prepared,
    permit: Permit,
    traceparent: String,
    card: CardGuard,
    report: Report,
}

struct Placed {
    admitted: Admitted,
    booking: Booking,
}

impl Service {
    /// Carries a request to where its answer streams.
    pub async fn carry(self: &Arc<Self>, received: Received) -> Result<Streaming, ApiError> {
        let mut report = received.report;
        let result = async {
            let (prepared, ticket) = self.prepare(received.endpoint, received.body, received.ticket).await?;
            received.card.set(Stage::Queued { prompt_tokens: prepared.prompt_tokens() });
            let permit = self.gate.admit(ticket).await?;
            Ok((prepared, permit))
        }
        .await;
        let (prepared, permit) = result.inspect_err(|error| report.failed(error))?;
        report.prepared(prepared.prompt_tokens());
        let admitted =
            Admitted { prepared, permit, traceparent: received.traceparent, card: received.card, report };
        let placed = self.place(admitted).await?;
        self.dispatch(placed).await
    }

    /// Whether any request could be served now.
    pub fn can_serve(&self) -> Result<(), NoPlace> {
        self.board.can_serve(&self.served.checkpoint, &self.served.revision)
    }

    /// The ticket goes where the body goes: work on a large one goes on after its client has left, and its place in the
    /// house is taken until it is done.
    async fn prepare(
        &self,
        endpoint: Endpoint,
        body: Bytes,
        ticket: Ticket,
    ) -> Result<(Prepared, Ticket), ApiError> {
        let (most, seed) = (self.limits.max_completion_tokens, rand::random());
        let (served, inline) = (self.served.clone(), body.len() <= PREPARE_INLINE_BYTES);
        let work = move || Ok((prepare(&served, endpoint, &body, most, seed)?, ticket));
        if inline {
            return work();
        }
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            tracing::error!(%error, "preparing a request panicked");
            Err(ApiError::new(baton_proto::ErrorCode::Internal, "the request could not be prepared"))
        })
    }

    fn book(&self, prompt_tokens: u32, sampling: &Sampling) -> Result<Booking, NoPlace> {
        let booking = self.board.place(
            prompt_tokens,
            sampling.max_tokens,
            &self.served.checkpoint,
            &self.served.revision,
        )?;
        tracing::debug!(placement = ?booking.placement, receipt = ?booking.receipt, "placed");
        Ok(booking)
    }

    async fn place(&self, mut admitted: Admitted) -> Result<Placed, ApiError> {
        let prepared = &admitted.prepared;
        let deadline = Instant::now() + self.limits.placement_timeout;
        match self.book_by(deadline, prepared.prompt_tokens(), &prepared.sampling).await {
            Ok(booking) => {
                admitted.card.set(Stage::placed(prepared.prompt_tokens(), &booking.placement));
                Ok(Placed { admitted, booking })
            }
            Err(reason) => {
                let error = reason.into();
                admitted.report.failed(&error);
                Err(error)
            }
        }
    }

    /// Books as soon as an instance can take the request: one that is being started again is worth a short wait.
    async fn book_by(
        &self,
        deadline: Instant,
        prompt_tokens: u32,
        sampling: &Sampling,
    ) -> Result<Booking, NoPlace> {
        let mut changes = self.board.changes();
        loop {
            changes.borrow_and_update();
            match self.book(prompt_tokens, sampling) {
                Err(reason) if reason.may_pass() => match timeout_at(deadline, changes.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(reason),
                },
                settled => return settled,
            }
        }
    }

    async fn dispatch(self: &Arc<Self>, placed: Placed) -> Result<Streaming, ApiError> {
        let Placed { admitted: Admitted { prepared, permit, traceparent, card, mut report }, booking } =
            placed;
        let assignment = Assignment {
            request: card.card().request.clone(),
            traceparent,
            prompt: prepared.prompt,
            sampling: prepared.sampling,
            deadline: card.card().arrived + self.limits.request_timeout,
        };
        let mut attempts = Attempts { service: self.clone(), assignment, made: 1 };
        let started = match Generation::start(&self.links, booking, attempts.assignment.clone()) {
            Ok(generation) => Ok(generation),
            Err(error) => match attempts.again(error) {
                Ok(replacing) => replacing.await.map(|(generation, stage)| {
                    card.set(stage);
                    generation
                }),
                Err(error) => Err(error),
            },
        };
        let generation = started.inspect_err(|error| report.failed(error))?;
        self.metrics.prompt_tokens.inc_by(u64::from(attempts.prompt_tokens()));
        let reader = self.served.text.reader(prepared.stops);
        Ok(Streaming::new(prepared.shape, generation, attempts, reader, report, card, permit))
    }
}

/// A request on its way to another place.
pub type Replacing = BoxFuture<'static, Result<(Generation, Stage), ApiError>>;

/// What it takes to place a request again.
pub struct Attempts {
    service: Arc<Service>,
    assignment: Assignment,
    made: u32,
}

impl Attempts {
    pub fn prompt_tokens(&self) -> u32 {
        self.assignment.prompt.len() as u32
    }

    /// Tokens that end this request's sequence, ascending.
    pub fn ends_sequence(&self) -> Vec<u32> {
        let sampling = &self.assignment.sampling;
        if sampling.ignore_eos { Vec::new() } else { sampling.stop_token_ids.clone() }
    }

    /// Places the request once more after `error`, as soon as an instance can take it; `error` is the answer if none can
    /// within the time.
    pub fn again(&mut self, error: ApiError) -> Result<Replacing, ApiError> {
        if self.made >= ATTEMPTS_MOST {
            return Err(error);
        }
        self.made += 1;
        let (service, assignment) = (self.service.clone(), self.assignment.clone());
        let prompt_tokens = self.prompt_tokens();
        let replacing = async move {
            let deadline = (Instant::now() + service.limits.placement_timeout).min(assignment.deadline);
            let booked = service.book_by(deadline, prompt_tokens, &assignment.sampling).await;
            let Ok(booking) = booked else { return Err(error) };
            tracing::info!(request = %assignment.request, %error, "placing the request again");
            let stage = Stage::placed(prompt_tokens, &booking.placement);
            Ok((Generation::start(&service.links, booking, assignment)?, stage))
        };
        Ok(replacing.boxed())
    }
}

/// What one request adds to the metrics; a request dropped before its end counts as the client's leaving.
pub struct Report {
    metrics: Arc<Metrics>,
    route: &'static str,
    arrived: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    tokens: u32,
    told: bool,
    /// Open for as long as the request lives.
    span: Span,
}

impl Report {
    pub fn new(metrics: Arc<Metrics>, route: &'static str, arrived: Instant, span: Span) -> Self {
        Self { metrics, route, arrived, first_token: None, last_token: arrived, tokens: 0, told: false, span }
    }

    fn prepared(&self, prompt_tokens: u32) {
        self.metrics.request_prompt_tokens.observe(f64::from(prompt_tokens));
    }

    /// The answer has this many tokens now.
    pub fn tokens(&mut self, tokens: u32, now: Instant) {
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.metrics.time_to_first_token.observe((now - self.arrived).as_secs_f64());
        }
        self.metrics.generation_tokens.inc_by(u64::from(tokens - self.tokens));
        self.tokens = tokens;
        self.last_token = now;
    }

    /// The answer is complete.
    pub fn finished(&mut self, usage: &Usage) {
        self.metrics.cached_tokens.inc_by(u64::from(usage.cached_tokens));
        self.metrics.request_generation_tokens.observe(f64::from(self.tokens));
        self.metrics.end_to_end.observe(self.arrived.elapsed().as_secs_f64());
        if let (Some(first), 2..) = (self.first_token, self.tokens) {
            let later = (self.last_token - first).as_secs_f64() / f64::from(self.tokens - 1);
            self.metrics.time_per_output_token.observe(later);
        }
        self.tell("200");
        let _entered = self.span.enter();
        tracing::debug!(?usage, seconds = self.arrived.elapsed().as_secs_f64(), "answered");
    }

    /// The request ends with an error. Logged here and nowhere else.
    pub fn failed(&mut self, error: &ApiError) {
        self.tell(error.code.name());
        let _entered = self.span.enter();
        if error.code.http() >= 500 {
            tracing::warn!(code = error.code.name(), %error, "request failed");
        } else {
            tracing::debug!(code = error.code.name(), %error, "request refused");
        }
    }

    fn tell(&mut self, code: &str) {
        if !std::mem::replace(&mut self.told, true) {
            let labels = RequestLabels { route: self.route, code: code.to_owned() };
            self.metrics.requests.get_or_create(&labels).inc();
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.tell("client_gone");
    }
}
