//! The path of a request through the stages: Received -> Prepared -> Admitted -> Placed -> Streaming.
//!
//! Called by [`crate::http`] with what arrived; answers with a [`Streaming`] or one error. Each stage consumes the one
//! before it, so that nothing can be skipped and everything a request holds is given back wherever it is dropped.

use std::sync::Arc;

use baton_proto::ApiError;
use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    admit::{Gate, Permit, Ticket},
    config::LimitsConfig,
    dispatch::Assignment,
    metrics::Metrics,
    place::{Attempts, Placer},
    prepare::{Endpoint, Prepared, PreparedPrompt, RequestLimits, Served, prepare},
    report::Report,
    requests::{CardGuard, Placing, Roster, Stage},
    schedule::{NoPlace, board::Booking},
    stream::{Lane, Overdue, Reading, Streaming},
};

/// Bodies up to this size are prepared on the spot; tokenising larger ones would hold up everybody else's tokens.
const PREPARE_INLINE_BYTES: usize = 2 << 10;

/// Everything the stages need.
pub struct Service {
    pub served: Arc<Served>,
    pub limits: LimitsConfig,
    pub gate: Gate,
    pub placer: Arc<Placer>,
    pub roster: Arc<Roster>,
    pub overdue: Arc<Overdue>,
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
    /// One for each prompt.
    bookings: Vec<Booking>,
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
        self.dispatch(placed)
    }

    /// Whether any request could be served now.
    pub fn can_serve(&self) -> Result<(), NoPlace> {
        self.placer.board.can_serve(&self.served.revision)
    }

    /// The ticket goes where the body goes: work on a large one goes on after its client has left, and its place in the
    /// house is taken until it is done.
    async fn prepare(
        &self,
        endpoint: Endpoint,
        body: Bytes,
        ticket: Ticket,
    ) -> Result<(Prepared, Ticket), ApiError> {
        let limits = RequestLimits {
            max_completion_tokens: self.limits.max_completion_tokens,
            max_choices: self.limits.max_choices,
        };
        let seed = rand::random();
        let (served, bytes) = (self.served.clone(), body.len());
        let work = move || prepare(&served, endpoint, &body, limits, seed);
        if bytes <= PREPARE_INLINE_BYTES {
            return Ok((work()?, ticket));
        }
        let turn = self.gate.turn(ticket, bytes).await?;
        let work = move || {
            let prepared = work()?;
            Ok((prepared, turn.done()))
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            tracing::error!(%error, "preparing a request panicked");
            Err(ApiError::new(baton_proto::ErrorCode::Internal, "the request could not be prepared"))
        })
    }

    async fn place(&self, mut admitted: Admitted) -> Result<Placed, ApiError> {
        let deadline = self.deadline(&admitted.card);
        match self.placer.book(&admitted.prepared.prompts, deadline).await {
            Ok(bookings) => {
                bookings.iter().for_each(|booking| admitted.card.placed(Placing::new(booking, None)));
                Ok(Placed { admitted, bookings })
            }
            Err(reason) => {
                let error = reason.into();
                admitted.report.failed(&error);
                Err(error)
            }
        }
    }

    /// By when a request must have been answered.
    fn deadline(&self, card: &CardGuard) -> Instant {
        card.card().arrived + self.limits.request_timeout
    }

    fn dispatch(&self, placed: Placed) -> Result<Streaming, ApiError> {
        let Placed { admitted, bookings } = placed;
        let Admitted { prepared, permit, traceparent, card, mut report } = admitted;
        let mut lanes = Vec::new();
        for (prompt, booking) in prepared.prompts.iter().zip(bookings) {
            let lane = self.lane(prompt, &prepared, booking, &traceparent, &card);
            lanes.push(lane.inspect_err(|error| report.failed(error))?);
        }
        self.metrics.prompt_tokens.inc_by(u64::from(prepared.prompt_tokens()));
        Ok(Streaming::new(prepared.shape, lanes, report, card, permit))
    }

    /// Sends one prompt on its way.
    fn lane(
        &self,
        prompt: &PreparedPrompt,
        prepared: &Prepared,
        booking: Booking,
        traceparent: &str,
        card: &CardGuard,
    ) -> Result<Lane, ApiError> {
        let assignment = Assignment {
            request: card.card().request.clone(),
            traceparent: traceparent.to_owned(),
            prompt: prompt.tokens.clone(),
            generated: Arc::default(),
            sampling: prompt.sampling.clone(),
            priority: prepared.priority,
            deadline: self.deadline(card),
        };
        let attempts = Attempts::new(self.placer.clone(), assignment);
        let started = self.placer.start(booking, attempts.assignment().clone());
        let reading = |_| {
            let reader = self.served.text.reader(&prepared.stops);
            Reading::new(reader, attempts.assignment(), prepared.stops.included, &prompt.echo)
        };
        let readings = (0..prompt.sampling.choices).map(reading).collect();
        Lane::new(started, attempts, readings)
    }
}
