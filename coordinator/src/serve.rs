//! The path of a request through the stages: Received -> Prepared -> Admitted -> Placed -> Streaming.
//!
//! Called by [`crate::http`] with what arrived; answers with a [`Streaming`] or one error. Each stage consumes the one
//! before it, so that nothing can be skipped and everything a request holds is given back wherever it is dropped.

use std::sync::Arc;

use baton_proto::ApiError;
use bytes::Bytes;

use crate::{
    admit::{Gate, Permit, Ticket},
    config::LimitsConfig,
    dispatch::{Assignment, Generation},
    metrics::Metrics,
    place::{Attempts, Placer},
    prepare::{Endpoint, Prepared, Served, prepare},
    report::Report,
    requests::{CardGuard, Roster, Stage},
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

    async fn place(&self, mut admitted: Admitted) -> Result<Placed, ApiError> {
        let prepared = &admitted.prepared;
        match self.placer.book(prepared.prompt_tokens(), &prepared.sampling).await {
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
        let mut attempts = Attempts::new(self.placer.clone(), assignment);
        let started = match Generation::start(&self.placer.links, booking, attempts.assignment().clone()) {
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
        let readers = vec![Reading::new(
            self.served.text.reader(&prepared.stops),
            attempts.assignment(),
            prepared.stops.included,
            &prepared.echo,
        )];
        let lane = Lane::new(generation, attempts, readers);
        Ok(Streaming::new(prepared.shape, vec![lane], report, card, permit))
    }
}
