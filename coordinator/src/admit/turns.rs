//! Turns at a core, for bodies that are worked on off the threads that serve: as many at a time as there are cores.
//!
//! Who waits is served as in a model's line ([`baton_schedule::queue`]): by the band of its key, tenants by weight, counted in
//! bytes, and then as they came. Long work takes half of the cores at most, so that short work never waits for it alone; where
//! both wait they take turns.

use std::{convert::Infallible, sync::Arc, time::Duration};

use baton_proto::ApiError;
use baton_schedule::queue::{Queue, Rank, Ticket, Wish};
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{Counted, Refusal};
use crate::metrics::Refusals;

/// Bodies from this size on are long work.
pub(super) const LONG_WORK_BYTES: usize = 256 << 10;

/// See the module.
pub(super) struct Turns {
    state: Mutex<State>,
    /// How long one waits at most.
    patience: Duration,
    refusals: Refusals,
    /// Those that wait, among those of all models that do.
    waiting: [Gauge; 2],
}

/// How long a body's work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Length {
    Short,
    Long,
}

struct State {
    /// Cores that nobody works at, and of these those that long work may take.
    free: usize,
    free_for_long: usize,
    short: Queue<oneshot::Sender<Turn>>,
    long: Queue<oneshot::Sender<Turn>>,
    /// Whose turn it was last, where both waited.
    last: Length,
}

/// A turn at a core: a body may be worked on. Goes where the work goes, as that does not end with its client.
pub struct Turn {
    turns: Arc<Turns>,
    length: Length,
}

impl State {
    fn takes(&self, length: Length) -> bool {
        self.free > 0 && (length == Length::Short || self.free_for_long > 0)
    }

    fn queue(&mut self, length: Length) -> &mut Queue<oneshot::Sender<Turn>> {
        match length {
            Length::Short => &mut self.short,
            Length::Long => &mut self.long,
        }
    }

    fn take(&mut self, length: Length) {
        self.free -= 1;
        self.free_for_long -= usize::from(length == Length::Long);
    }

    /// Whose turn it is; `None`: nobody waits whom there is a core for.
    fn next(&mut self) -> Option<Length> {
        let waits = |length: Length| match length {
            Length::Short => !self.short.is_empty(),
            Length::Long => !self.long.is_empty(),
        };
        let order = match self.last {
            Length::Short => [Length::Long, Length::Short],
            Length::Long => [Length::Short, Length::Long],
        };
        order.into_iter().find(|&length| waits(length) && self.takes(length))
    }
}

impl Turns {
    /// At so many cores; at least at two.
    pub(super) fn new(
        cores: usize,
        patience: Duration,
        refusals: &Refusals,
        waiting: [Gauge; 2],
    ) -> Arc<Self> {
        let (free, free_for_long) = (cores.max(2), (cores / 2).max(1));
        let (short, long, last) = (Queue::default(), Queue::default(), Length::Long);
        let state = Mutex::new(State { free, free_for_long, short, long, last });
        Arc::new(Self { state, patience, refusals: refusals.clone(), waiting })
    }

    /// Waits for a turn to work on so many bytes.
    pub(super) async fn turn(self: &Arc<Self>, bytes: usize, rank: Rank) -> Result<Turn, ApiError> {
        let length = if bytes >= LONG_WORK_BYTES { Length::Long } else { Length::Short };
        let now = Instant::now();
        let (ticket, mine) = {
            let state = &mut *self.state.lock();
            if state.takes(length) && state.queue(length).is_empty() {
                state.take(length);
                return Ok(self.begin(length));
            }
            let (turn, mine) = oneshot::channel();
            let wish = Wish { rank, wanted: now + self.patience, work: bytes as f64 };
            (state.queue(length).push(wish, turn, now), mine)
        };
        let _waiting = Waiting { turns: self, length, ticket, _counted: Counted::new(&self.waiting) };
        match timeout_at(now + self.patience, mine).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => {
                Err(Refusal::Wait.refuse("the request waited too long to be served", None, &self.refusals))
            }
        }
    }

    fn begin(self: &Arc<Self>, length: Length) -> Turn {
        Turn { turns: self.clone(), length }
    }

    /// Gives free cores to those who wait.
    fn serve(self: &Arc<Self>) {
        let mut given = Vec::new();
        {
            let (state, now) = (&mut *self.state.lock(), Instant::now());
            while let Some(length) = state.next() {
                let at_once = |_: &_, _| Some(Ok::<_, Infallible>(()));
                let Some((waiter, Ok(()))) = state.queue(length).next(now, at_once) else { break };
                state.take(length);
                state.last = length;
                given.push((waiter, length));
            }
        }
        for (waiter, length) in given {
            // One that has left in this very moment gives it back.
            drop(waiter.send(self.begin(length)));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut state = self.turns.state.lock();
            state.free += 1;
            state.free_for_long += usize::from(self.length == Length::Long);
        }
        self.turns.serve();
    }
}

/// Takes one out of its queue when it does not wait any longer.
struct Waiting<'a> {
    turns: &'a Turns,
    length: Length,
    ticket: Ticket,
    _counted: Counted<2>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Dropped when nothing is locked any more.
        let _left = self.turns.state.lock().queue(self.length).remove(&self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::{Band, ErrorCode};
    use futures::{FutureExt, future::BoxFuture, poll};
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::{keys::Tenant, metrics::Metrics};

    fn turns() -> (Arc<Turns>, Arc<Metrics>) {
        let metrics = Metrics::register(&mut Registry::default());
        let waiting = [metrics.queued.clone(), metrics.queued_of_any_model()];
        (Turns::new(2, Duration::from_secs(5), &metrics.refusals, waiting), metrics)
    }

    fn of(name: &str, band: Band) -> Rank {
        Tenant { name: name.into(), band, ..Tenant::default() }.rank(0)
    }

    #[tokio::test(start_paused = true)]
    async fn long_work_leaves_a_core_to_short_work() {
        let (turns, metrics) = turns();
        let turn = |bytes| turns.turn(bytes, of("a", Band::Standard));
        let long = turn(LONG_WORK_BYTES).await.expect("a core");
        let mut next_long = Box::pin(turn(LONG_WORK_BYTES));
        assert!(poll!(&mut next_long).is_pending());
        let short = turn(4 << 10).await.expect("the other core");
        let (mut first, mut second) = (Box::pin(turn(4 << 10)), Box::pin(turn(4 << 10)));
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        assert_eq!(metrics.queued.get(), 3);
        // Who leaves the line loses nothing and takes nothing along.
        drop(first);
        drop(short);
        let second = second.await.expect("the core given back");
        assert!(poll!(&mut next_long).is_pending());
        drop(long);
        let next_long = next_long.await.expect("the core given back");
        assert_eq!(metrics.queued.get(), 0);
        let Err(error) = turn(4 << 10).await else { panic!("no core was free") };
        assert_eq!(error.code, ErrorCode::QueueFull);
        drop((second, next_long));
        turn(4 << 10).await.expect("a core");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_sends_much_stands_in_nobody_elses_way() {
        let (turns, _) = turns();
        let ask = |name: &'static str, band| -> BoxFuture<'_, Result<Turn, ApiError>> {
            turns.turn(8 << 10, of(name, band)).boxed()
        };
        let held = [ask("much", Band::Standard).await, ask("much", Band::Standard).await];
        let mut waiting: Vec<_> = (0..20).map(|_| ("much", ask("much", Band::Standard))).collect();
        waiting.push(("little", ask("little", Band::Standard)));
        waiting.push(("first", ask("first", Band::Interactive)));
        for (_, one) in &mut waiting {
            assert!(poll!(one).is_pending());
        }
        drop(held);
        let mut order = Vec::new();
        while !waiting.is_empty() {
            let mut served = Vec::new();
            for at in (0..waiting.len()).rev() {
                if let std::task::Poll::Ready(turn) = poll!(&mut waiting[at].1) {
                    served.push((waiting.remove(at).0, turn.expect("a core")));
                }
            }
            assert!(!served.is_empty() && served.len() <= 2, "a core for each");
            order.extend(served.iter().map(|(name, _)| *name));
        }
        assert!(order[..2].contains(&"first"), "{order:?}");
        assert!(order[..4].contains(&"little"), "{order:?}");
    }
}
