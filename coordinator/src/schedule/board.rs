//! The fleet and the ledger behind one lock, held for microseconds, never across an await.
//!
//! Written by the fleet's keeper, the links and the guards of placed work; read by whoever places a request.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_proto::{Incarnation, InstanceId};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{
    Ask, NoPlace, Placement, Prompt, Receipt, Seat, Side,
    caches::{Caches, Feed, Held},
    index::Ticket,
    ledger::{Ledger, Work},
    place,
};
use crate::{
    config::PlacementConfig,
    fleet::{Change, Duty, Fleet, Load, Spec},
};

/// How long a prompt that has been computed may take to be among what its instance says that it has.
const TOLD_WITHIN: Duration = Duration::from_secs(1);

struct State {
    fleet: Fleet,
    ledger: Ledger,
}

/// What placement is decided from.
pub struct Board {
    /// Locked before `state`, where both are.
    pub caches: Arc<Caches>,
    state: Mutex<State>,
    turns: AtomicU64,
    /// Counts changes of who is usable.
    version: watch::Sender<u64>,
}

impl Board {
    /// `absent_grace`: see [`Fleet::new`].
    pub fn new(absent_grace: Duration) -> Arc<Self> {
        Self::with(absent_grace, &PlacementConfig::default())
    }

    /// The same, as it is configured.
    pub fn with(absent_grace: Duration, config: &PlacementConfig) -> Arc<Self> {
        let state = State { fleet: Fleet::new(absent_grace), ledger: Ledger::default() };
        Arc::new(Self {
            caches: Caches::new(config.index_bytes),
            state: Mutex::new(state),
            turns: AtomicU64::new(0),
            version: watch::Sender::new(0),
        })
    }

    /// Wakes on every change of who is usable.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn changed<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.version.send_modify(|version| *version += 1);
        result
    }

    /// The store's present list of instances.
    pub fn list(&self, specs: &[Spec], now: Instant) -> Vec<Change> {
        self.changed(|state| state.fleet.list(specs, now))
    }

    /// Instances to forget.
    pub fn sweep(&self, now: Instant) -> Vec<Change> {
        self.state.lock().fleet.sweep(now)
    }

    pub fn up(&self, id: &InstanceId, incarnation: Incarnation, duty: Duty) {
        self.changed(|state| state.fleet.up(id, incarnation, duty));
    }

    pub fn down(&self, id: &InstanceId, now: Instant) {
        self.changed(|state| {
            state.fleet.down(id, now);
            state.ledger.forget_report(id);
        });
    }

    pub fn duty(&self, id: &InstanceId, duty: Duty) {
        self.changed(|state| state.fleet.duty(id, duty));
    }

    pub fn load(&self, id: &InstanceId, load: Load) {
        let state = &mut *self.state.lock();
        state.fleet.load(id, load);
        state.ledger.reported(id);
    }

    /// For what an instance says of its cache.
    pub fn feed(&self, id: &InstanceId) -> Feed {
        let state = self.state.lock();
        self.caches.feed(id.clone(), state.fleet.revision(id).unwrap_or_default())
    }

    /// Whether a request could be placed now.
    pub fn can_serve(&self, revision: &str) -> Result<(), NoPlace> {
        let (held, state) = (Held::default(), self.state.lock());
        let ask = Ask { prompt_tokens: 1, held, max_tokens: 2, choices: 1, revision, avoid: None, turn: 0 };
        place(&state.fleet, &state.ledger, &ask, Instant::now()).map(drop)
    }

    /// Chooses where a request goes and books its work there at once. `avoid` is taken if nobody else is there.
    pub fn place<'a>(
        self: &Arc<Self>,
        prompt: impl Into<Prompt<'a>>,
        (max_tokens, choices): (u32, u32),
        revision: &str,
        avoid: Option<&InstanceId>,
    ) -> Result<Booking, NoPlace> {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        let Prompt { tokens: prompt_tokens, chains } = prompt.into();
        let mut caches = self.caches.lock();
        let held = caches.look(chains, Instant::now());
        let ask = Ask { prompt_tokens, held, max_tokens, choices, revision, avoid, turn };
        let state = &mut *self.state.lock();
        let find = |ask: &Ask<'_>| place(&state.fleet, &state.ledger, ask, Instant::now());
        let (placement, receipt) = match find(&ask) {
            Err(_) if avoid.is_some() => find(&Ask { avoid: None, ..ask })?,
            found => found?,
        };
        let entry = |seat: &Seat, prefill_tokens, sequences: u32| {
            let work = Work { prefill_tokens, sequences: sequences.into(), blocks: seat.blocks };
            (seat.instance.clone(), work)
        };
        let (prefill, decode) = match &placement {
            Placement::Alone(seat) => (entry(seat, seat.uncached_tokens, choices), None),
            Placement::Apart { prefill, decode } => {
                (entry(prefill, prefill.uncached_tokens, 1), Some(entry(decode, 0, choices)))
            }
        };
        let mut expect = |(instance, _): &(InstanceId, Work)| caches.expect(instance, chains);
        let expected = [expect(&prefill), decode.as_ref().and_then(expect)];
        for (instance, work) in [Some(&prefill), decode.as_ref()].into_iter().flatten() {
            state.ledger.credit(instance, *work);
        }
        let credit = Credit { board: self.clone(), prefill, decode, expected };
        Ok(Booking { placement, receipt, credit })
    }

    /// All known instances and this coordinator's work on each; tests see by it that nothing is left behind.
    pub fn own_work(&self) -> Vec<(InstanceId, Work)> {
        let state = self.state.lock();
        let own = |id: &InstanceId| (id.clone(), state.ledger.own(id));
        state.fleet.all().map(|instance| own(&instance.spec.id)).collect()
    }
}

/// A placement whose work is on the ledger.
pub struct Booking {
    pub placement: Placement,
    pub receipt: Receipt,
    pub credit: Credit,
}

/// Work on the ledger; taken off as it is done, and all of it on drop.
pub struct Credit {
    board: Arc<Board>,
    /// The instance that prefills, or does everything.
    prefill: (InstanceId, Work),
    decode: Option<(InstanceId, Work)>,
    /// That prefill, and decode, will have the prompt.
    expected: [Option<Ticket>; 2],
}

impl Credit {
    /// Who has one of the legs.
    pub fn instance(&self, side: Side) -> &InstanceId {
        match (side, &self.decode) {
            (Side::Decode, Some((decode, _))) => decode,
            _ => &self.prefill.0,
        }
    }

    /// The prompt has been computed.
    pub fn prefilled(&mut self) {
        let tokens = std::mem::take(&mut self.prefill.1.prefill_tokens);
        if tokens > 0 {
            let done = Work { prefill_tokens: tokens, ..Work::default() };
            self.board.state.lock().ledger.release(&self.prefill.0, done);
        }
        self.settle(0);
    }

    /// Prefill has handed over: nothing of the request is left there.
    pub fn handed_off(&mut self) {
        if self.decode.is_some() {
            let done = std::mem::take(&mut self.prefill.1);
            self.board.state.lock().ledger.release(&self.prefill.0, done);
        }
        self.settle(1);
    }

    fn settle(&mut self, side: usize) {
        if let Some(ticket) = self.expected[side].take() {
            self.board.caches.settle(ticket, Instant::now() + TOLD_WITHIN);
        }
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        (0..self.expected.len()).for_each(|side| self.settle(side));
        let state = &mut *self.board.state.lock();
        for (instance, work) in [Some(&self.prefill), self.decode.as_ref()].into_iter().flatten() {
            state.ledger.release(instance, *work);
        }
    }
}
