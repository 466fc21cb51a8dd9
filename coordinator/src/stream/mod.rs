//! From tokens in order to text: detokenised as it comes, stopped at stop strings, counted.
//!
//! Made by [`crate::serve`], read by [`crate::http`] as fast as the client reads, and now and then without it. Holds everything
//! the request holds; dropping it (the client has gone) cancels both legs, gives the seat back and takes the work off the
//! ledger. [`reading`] is one choice's text, [`lane`] one prompt with the legs that work at it; [`overdue`] moves, and ends,
//! what nobody reads.

mod lane;
mod overdue;
mod reading;

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use baton_proto::ApiError;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::{
    admit::{Permit, Ticket},
    dispatch::deadline_passed,
    fleet::CancelReason,
    keys::{Call, Tenant},
    models::Model,
    prepare::Shape,
    report::{Report, bug},
    requests::CardGuard,
};

pub use crate::report::Usage;
pub use lane::Lane;
pub use overdue::{Overdue, Unread};
pub use reading::{Delta, Reading, ScoredToken};

/// What reading brought, besides deltas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    More,
    /// Every choice's last delta has been given. Whoever writes it says so by [`Streaming::written`].
    End(Result<Usage, ApiError>),
}

/// What a request holds until it has been answered, beside its legs. Given back in this order: the seat last.
pub struct Holdings {
    pub report: Report,
    pub call: Call,
    pub card: CardGuard,
    pub permit: Permit,
}

/// An answer on its way.
pub struct Streaming {
    pub model: Arc<Model>,
    pub shape: Shape,
    // Legs are cancelled before all else is given back.
    lanes: SmallVec<[Lane; 1]>,
    holds: Holdings,
}

impl Streaming {
    /// A request with as many prompts as `lanes`; choices are counted through all of them.
    pub fn new(model: Arc<Model>, shape: Shape, lanes: SmallVec<[Lane; 1]>, holds: Holdings) -> Self {
        Self { model, shape, lanes, holds }
    }

    /// An empty delta for each choice.
    pub fn deltas(&self) -> Vec<Delta> {
        let choices = self.lanes.iter().map(Lane::choices).sum();
        vec![Delta::default(); choices]
    }

    /// Has the processor fetch what the next step touches; with `deeper`, what could be found once that had come.
    pub fn prefetch(&self, deeper: bool) {
        self.lanes.iter().for_each(|lane| lane.prefetch(deeper));
        if !deeper {
            self.holds.card.card().prefetch();
        }
    }

    /// Waits for anything that is certain, and adds it to the choices' deltas, or for the end. Must not be called after
    /// the end.
    pub fn poll_step(&mut self, context: &mut Context<'_>, deltas: &mut [Delta]) -> Poll<Step> {
        let (mut rest, mut end) = (&mut *deltas, Poll::Ready(Ok(())));
        for lane in &mut self.lanes {
            let (own, others) = rest.split_at_mut(lane.choices());
            rest = others;
            match lane.poll(context, &self.holds.card, own) {
                Poll::Ready(Ok(())) => {}
                Poll::Pending => end = Poll::Pending,
                failed => {
                    end = failed;
                    break;
                }
            }
        }
        // What came before a failure is given to the client, too.
        self.count();
        match end {
            Poll::Ready(Ok(())) => return Poll::Ready(Step::End(Ok(self.usage()))),
            Poll::Ready(Err(error)) => {
                self.holds.report.failed(&error);
                self.give_up(CancelReason::RequestFailed);
                return Poll::Ready(Step::End(Err(error)));
            }
            Poll::Pending => {}
        }
        if deltas.iter().all(Delta::is_empty) { Poll::Pending } else { Poll::Ready(Step::More) }
    }

    /// By when the answer must be there, if any of it is still to come.
    pub fn deadline(&self) -> Option<Instant> {
        self.lanes.iter().map(Lane::deadline).max()
    }

    /// Ends an answer that nobody has read up to its deadline.
    pub fn expire(mut self) {
        // None are left of one whose failure has been told.
        if !self.lanes.is_empty() {
            self.holds.report.failed(&deadline_passed());
        }
        self.give_up(CancelReason::Deadline);
    }

    /// Its room, and what it is asked by, once all of it has been read from here.
    pub fn into_ticket(self) -> Ticket {
        self.holds.permit.into_ticket()
    }

    /// Whose request it is.
    pub fn tenant(&self) -> Tenant {
        self.holds.call.tenant()
    }

    /// All of the answer has been written.
    pub fn written(&mut self, usage: &Usage) {
        let longest = self.lanes.iter().flat_map(Lane::consumed).max().unwrap_or(0);
        self.holds.report.finished(usage, longest);
    }

    /// Ends an answer that met a bug: the error that its client is told, if it can be.
    pub fn broke(mut self) -> ApiError {
        let error = bug();
        self.holds.report.failed(&error);
        self.give_up(CancelReason::Bug);
        error
    }

    /// Ends what is left of it: no more is read.
    fn give_up(&mut self, why: CancelReason) {
        self.lanes.drain(..).for_each(|lane| lane.give_up(why));
    }

    /// Waits for the next step.
    pub async fn step(&mut self, deltas: &mut [Delta]) -> Step {
        std::future::poll_fn(|context| self.poll_step(context, deltas)).await
    }

    /// Waits for the end, and adds all that comes before it to the choices' deltas.
    pub async fn rest(&mut self, deltas: &mut [Delta]) -> Result<Usage, ApiError> {
        // Either way every lane has been polled until it waits, and will wake this task.
        let whole = |context: &mut Context<'_>| match self.poll_step(context, deltas) {
            Poll::Ready(Step::End(end)) => Poll::Ready(end),
            Poll::Ready(Step::More) | Poll::Pending => Poll::Pending,
        };
        std::future::poll_fn(whole).await
    }

    fn count(&mut self) {
        let Holdings { report, call, card, .. } = &mut self.holds;
        let (tokens, before) =
            (self.lanes.iter().flat_map(Lane::consumed).sum(), card.card().completion_tokens());
        if tokens > before {
            call.generated(tokens - before);
            report.tokens(tokens, Instant::now());
            card.set_completion_tokens(tokens);
        }
    }

    fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.lanes.iter().map(Lane::prompt_tokens).sum(),
            completion_tokens: self.lanes.iter().flat_map(Lane::consumed).sum(),
            cached_tokens: self.lanes.iter().map(Lane::cached_tokens).fold(0, u32::saturating_add),
        }
    }
}
