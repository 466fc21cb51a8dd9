//! The path of a request through the stages: Received -> Prepared -> Admitted, with its places booked -> Streaming.
//!
//! Called by [`crate::http`] with what arrived; answers with a [`Streaming`] or one error. Each stage consumes the one
//! before it, so that nothing can be skipped and everything a request holds is given back wherever it is dropped.

use std::sync::Arc;

use baton_process::telemetry::TraceContext;
use baton_proto::ApiError;
use baton_schedule::NoPlace;
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::{
    admit::{Admission, Body, Gate, Spot, Ticket, WaitTerms},
    carry::Attempts,
    config::{CarryConfig, LimitsConfig},
    dispatch::Assignment,
    fleet::CancelReason,
    keys::{Call, Caller, Keys, Tenant},
    metrics::Metrics,
    models::{Model, Models},
    place::{Booked, Placer},
    prepare::{
        Ahead, Endpoint, Prepared, PreparedPrompt, RequestLimits, asked_model, asked_priority, parse, prepare,
    },
    report::Report,
    requests::{CardGuard, Placing, Roster, Stage},
    retry_budget::Share,
    stream::{Holdings, Lane, Overdue, Reading, Streaming},
};

/// Bodies up to this size are prepared on the spot; tokenising larger ones would hold up everybody else's tokens.
const PREPARE_INLINE_BYTES: usize = 2 << 10;

/// Bodies that are read ahead at a time; each takes up to 128 KiB for it, and a millisecond or two between others' turns.
pub const AHEAD_MOST: usize = 16;

/// Everything the stages need.
pub struct Service {
    pub keys: Arc<Keys>,
    pub models: Arc<Models>,
    pub limits: LimitsConfig,
    pub gate: Gate,
    pub placer: Arc<Placer>,
    pub carry: CarryConfig,
    pub roster: Arc<Roster>,
    pub overdue: Arc<Overdue>,
    /// Room for bodies that are read ahead.
    pub ahead: Arc<Semaphore>,
    pub metrics: Arc<Metrics>,
}

/// A request whose body has been read.
pub struct Received {
    pub call: Call,
    pub endpoint: Endpoint,
    pub body: Body,
    /// W3C trace context for instances; empty = none.
    pub trace: TraceContext,
    pub card: CardGuard,
}

/// A request whose model is known, and what became of the rest.
struct Addressed {
    model: Arc<Model>,
    /// With a place in the model's line.
    prepared: Result<(Prepared, Spot), ApiError>,
    ticket: Ticket,
}

struct Admitted {
    tenant: Tenant,
    model: Arc<Model>,
    prepared: Prepared,
    trace: TraceContext,
    holds: Holdings,
}

impl Service {
    /// Takes a request on, within what its caller may, and lets it into the house.
    pub fn enter(&self, caller: &Caller, now: Instant) -> Result<(Call, Ticket), ApiError> {
        let call = caller.call(now)?;
        // Before it is known what it asks for.
        let ticket = self.gate.enter(|| self.models.drain(), || self.may_outrank(&call.tenant()))?;
        Ok((call, ticket))
    }

    /// Whether anybody waits, for any model, who may give way to a request of this tenant's.
    pub fn may_outrank(&self, tenant: &Tenant) -> bool {
        self.models.have_behind(&tenant.rank(0))
    }

    /// Takes a request to where its answer streams.
    pub async fn serve(
        self: &Arc<Self>,
        received: Received,
        mut report: Report,
    ) -> Result<Streaming, ApiError> {
        let Received { mut call, endpoint, body, trace, card } = received;
        let tenant = call.tenant();
        let result = async {
            report.enters("tokenise");
            let Addressed { model, prepared, mut ticket } = self.prepare(&tenant, endpoint, body).await?;
            report.enters("queue");
            report.of_model(&model.counts);
            let (prepared, spot) = prepared?;
            self.gate.hold(&mut ticket, &prepared, &tenant)?;
            call.admit(&prepared, Instant::now())?;
            let (name, prompt_tokens) = (model.served.name.clone(), prepared.prompt_tokens());
            card.set(Stage::Queued { model: name, prompt_tokens });
            let first = prepared.prompts.first().map_or(0, PreparedPrompt::prompt_tokens);
            let ttft = self.placer.board.ttft_target(first);
            report.targets(ttft, self.placer.board.tpot_target());
            let terms = WaitTerms {
                request: &card.card().request,
                tenant: &tenant,
                arrived: card.card().arrived,
                deadline: self.deadline(&card),
            };
            let admission = model.line.admit(&self.placer, ticket, spot, prepared, terms).await?;
            Ok((model, admission))
        }
        .await;
        let (model, admission) = result.inspect_err(|error| report.failed(error))?;
        let Admission { permit, prepared, bookings, waited } = admission;
        report.enters("dispatch");
        report.admitted(prepared.prompt_tokens());
        let placing = |booked: &Booked| Placing::new(&booked.booking, None, waited);
        bookings.iter().for_each(|booked| card.placed(placing(booked)));
        let holds = Holdings { report, call, card, permit };
        self.dispatch(Admitted { tenant, model, prepared, trace, holds }, bookings)
    }

    /// Whether any request for a model could be served now.
    pub fn can_serve(&self, model: &Model) -> Result<(), NoPlace> {
        self.placer.board.can_serve(&model.served.revision)
    }

    /// Who tokenises a long body, of which so much has come, while the rest does: if it is known which model it asks, and
    /// nothing for a line that is full.
    pub fn ahead(&self, begun: &[u8]) -> Option<(Ahead, OwnedSemaphorePermit)> {
        let named = || self.models.asked(Some(&asked_model(begun)?)).ok();
        let model = self.models.only().or_else(named).filter(|model| !model.line.is_full())?;
        // What has no room is tokenised when it is whole.
        let room = self.ahead.clone().try_acquire_owned().ok()?;
        Some((Ahead::new(model.served.text.clone()), room))
    }

    /// Work on a large body goes on after its client has left: its room in the house is taken until that is done, and its
    /// memory with it. Nothing is tokenised for a line that is full.
    async fn prepare(&self, tenant: &Tenant, endpoint: Endpoint, body: Body) -> Result<Addressed, ApiError> {
        let limits = RequestLimits {
            max_completion_tokens: self.limits.max_completion_tokens,
            max_choices: self.limits.max_choices,
        };
        let (seed, asking) = (rand::random(), tenant.clone());
        let (models, bytes, board) = (self.models.clone(), body.len(), self.placer.board.clone());
        let work = move || {
            let request = parse(&body)?;
            let model = models.asked(request.model.as_deref())?.clone();
            let spot = asked_priority(&request).and_then(|asked| model.line.enter(&asking.rank(asked)));
            let prepared = spot.and_then(|spot| {
                let prepared = prepare(&model.served, endpoint, &request, limits, seed)?;
                // Here, where there is a core for it; whoever places the prompts finds it done.
                let name = |prompt: &PreparedPrompt| {
                    drop(board.caches.name(&model.served.revision, &prompt.chains, &[]))
                };
                prepared.prompts.iter().for_each(name);
                Ok((prepared, spot))
            });
            Ok(Addressed { model, prepared, ticket: body.done() })
        };
        if bytes <= PREPARE_INLINE_BYTES {
            return work();
        }
        let turn = self.gate.turn(bytes, tenant).await?;
        let in_turn = move || {
            let addressed = work();
            drop(turn);
            addressed
        };
        tokio::task::spawn_blocking(in_turn).await.unwrap_or_else(|error| {
            tracing::error!(%error, "preparing a request panicked");
            Err(ApiError::new(baton_proto::ErrorCode::Internal, "the request could not be prepared"))
        })
    }

    /// By when a request must have been answered.
    fn deadline(&self, card: &CardGuard) -> Instant {
        card.card().arrived + self.limits.request_timeout
    }

    /// `bookings`: one for each prompt.
    fn dispatch(&self, mut admitted: Admitted, bookings: Vec<Booked>) -> Result<Streaming, ApiError> {
        let mut lanes = SmallVec::new();
        admitted.model.retry_budget.lock().request();
        let share = Arc::default();
        for (prompt, booked) in admitted.prepared.prompts.iter().zip(bookings) {
            match self.lane(&admitted, &share, prompt, booked) {
                Ok(lane) => lanes.push(lane),
                Err(error) => {
                    admitted.holds.report.failed(&error);
                    lanes.drain(..).for_each(|lane: Lane| lane.give_up(CancelReason::RequestFailed));
                    return Err(error);
                }
            }
        }
        let Admitted { model, prepared, mut holds, .. } = admitted;
        holds.report.enters("first_token");
        holds.report.dispatched(prepared.prompt_tokens());
        holds.call.dispatched(prepared.prompt_tokens());
        Ok(Streaming::new(model, prepared.shape, lanes, holds))
    }

    /// Sends one prompt on its way. `share`: the request's of the retry budget.
    fn lane(
        &self,
        admitted: &Admitted,
        share: &Arc<Mutex<Share>>,
        prompt: &PreparedPrompt,
        booked: Booked,
    ) -> Result<Lane, ApiError> {
        let Admitted { tenant, model, prepared, trace, holds } = admitted;
        let card = &holds.card;
        let assignment = Assignment {
            request: card.card().request.clone(),
            trace: trace.clone(),
            prompt: prompt.clone(),
            generated: Arc::default(),
            priority: tenant.priority(prepared.priority),
            wanted: card.card().arrived + self.placer.board.ttft_target(prompt.prompt_tokens()),
            deadline: self.deadline(card),
            // A stop string is to be found before many a token is generated in vain.
            in_batches: !prepared.shape.stream && prepared.stops.are_none(),
        };
        let attempts =
            Attempts::new(self.placer.clone(), self.carry, model.clone(), share.clone(), assignment);
        let started = self.placer.start(booked, attempts.assignment().clone());
        let reading = |_| {
            let reader = model.served.text.reader(&prepared.stops);
            Reading::new(reader, attempts.assignment(), prepared.stops.included)
        };
        let readings = (0..prompt.sampling.choices).map(reading).collect();
        Lane::new(started, attempts, readings)
    }
}
