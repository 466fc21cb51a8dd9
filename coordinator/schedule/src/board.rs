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

use baton_proto::{Incarnation, InstanceId, LegId};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{
    Ask, NoPlace, Placement, Prompt, Receipt, Seat, Side,
    caches::{Caches, Feed, Held},
    index::Ticket,
    ledger::{Ledger, Work},
    place,
};
use crate::fleet::{Change, Duty, Fleet, Load, Spec};

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
        Self::with(absent_grace, 256 << 20)
    }

    /// The same; which instances have what cached is remembered in at most so many bytes.
    pub fn with(absent_grace: Duration, index_bytes: usize) -> Arc<Self> {
        let state = State { fleet: Fleet::new(absent_grace), ledger: Ledger::default() };
        Arc::new(Self {
            caches: Caches::new(index_bytes),
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
        self.changed(|state| state.fleet.down(id, now));
    }

    /// No leg is on any stream to the instance, and none is dispatched before the next one stands.
    pub fn detached(&self, id: &InstanceId) {
        self.state.lock().ledger.detached(id);
    }

    pub fn duty(&self, id: &InstanceId, duty: Duty) {
        self.changed(|state| state.fleet.duty(id, duty));
    }

    pub fn load(&self, id: &InstanceId, load: Load) {
        let state = &mut *self.state.lock();
        state.fleet.load(id, load);
        state.ledger.reported(id, load.seen_leg);
    }

    /// What an instance has said of its legs, in the order in which it did, and before the load that came after it.
    pub fn told(&self, id: &InstanceId, news: &[LegNews]) {
        let ledger = &mut self.state.lock().ledger;
        for news in news {
            match *news {
                LegNews::Prefilled(leg) => ledger.prefilled(id, leg),
                LegNews::ChoiceEnded(leg) => ledger.choice_ended(id, leg),
            }
        }
    }

    /// How many instances are known.
    pub fn fleet_size(&self) -> usize {
        self.state.lock().fleet.size()
    }

    /// For what an instance says of its cache.
    pub fn feed(&self, id: &InstanceId) -> Feed {
        let state = self.state.lock();
        self.caches.feed(id.clone(), state.fleet.revision(id).unwrap_or_default())
    }

    /// Whether a request could be placed now.
    pub fn can_serve(&self, revision: &str) -> Result<(), NoPlace> {
        let (held, state) = (Held::default(), self.state.lock());
        let ask = Ask { prompt_tokens: 1, held, max_tokens: 2, choices: 1, revision, avoid: &[], turn: 0 };
        place(&state.fleet, &state.ledger, &ask, Instant::now()).map(drop)
    }

    /// Chooses where a request goes and books its work there at once. Of those to `avoid` the last are taken
    /// first, if nobody else is there.
    pub fn place<'a>(
        self: &Arc<Self>,
        prompt: impl Into<Prompt<'a>>,
        (max_tokens, choices): (u32, u32),
        revision: &str,
        avoid: &[InstanceId],
    ) -> Result<Booking, NoPlace> {
        let turn = self.turns.fetch_add(1, Ordering::Relaxed);
        let Prompt { tokens: prompt_tokens, chains } = prompt.into();
        let mut caches = self.caches.lock();
        let held = caches.look(chains, Instant::now());
        let ask = Ask { prompt_tokens, held, max_tokens, choices, revision, avoid, turn };
        let state = &mut *self.state.lock();
        let find = |ask: &Ask<'_>| place(&state.fleet, &state.ledger, ask, Instant::now());
        let mut left = avoid;
        let (placement, receipt) = loop {
            match (find(&Ask { avoid: left, ..ask }), left) {
                (Err(_), [fewer @ .., _]) => left = fewer,
                (found, _) => break found?,
            }
        };
        let entry = |seat: &Seat, prefill_tokens, sequences: u32| {
            let work = Work { prefill_tokens, sequences: sequences.into(), blocks: seat.blocks };
            Part { instance: seat.instance.clone(), work, leg: None }
        };
        let (prefill, decode) = match &placement {
            Placement::Alone(seat) => (entry(seat, seat.uncached_tokens, choices), None),
            Placement::Apart { prefill, decode } => {
                (entry(prefill, prefill.uncached_tokens, 1), Some(entry(decode, 0, choices)))
            }
        };
        let mut expect = |part: &Part| caches.expect(&part.instance, chains);
        let expected = [expect(&prefill), decode.as_ref().and_then(expect)];
        for part in [Some(&prefill), decode.as_ref()].into_iter().flatten() {
            state.ledger.credit(&part.instance, part.work);
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

/// Of what an instance says of a leg, what the ledger is to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegNews {
    /// Its prompt is computed.
    Prefilled(LegId),
    /// One of its choices has ended.
    ChoiceEnded(LegId),
}

/// What is booked on one instance.
struct Part {
    instance: InstanceId,
    work: Work,
    /// Under which number it was dispatched.
    leg: Option<LegId>,
}

/// Work on the ledger. Links take it off as instances say that it is done; what is left on drop is not wanted any more.
pub struct Credit {
    board: Arc<Board>,
    /// On the instance that prefills, or does everything.
    prefill: Part,
    decode: Option<Part>,
    /// That prefill, and decode, will have the prompt.
    expected: [Option<Ticket>; 2],
}

impl Credit {
    fn part(&mut self, side: Side) -> &mut Part {
        match (side, &mut self.decode) {
            (Side::Decode, Some(decode)) => decode,
            _ => &mut self.prefill,
        }
    }

    /// Who has one of the legs.
    pub fn instance(&self, side: Side) -> &InstanceId {
        match (side, &self.decode) {
            (Side::Decode, Some(decode)) => &decode.instance,
            _ => &self.prefill.instance,
        }
    }

    /// A leg of so many choices is about to be sent, under a number above that of all before it.
    pub fn dispatched(&mut self, side: Side, leg: LegId, choices: u32) {
        let board = self.board.clone();
        let part = self.part(side);
        part.leg = Some(leg);
        board.state.lock().ledger.dispatched(&part.instance, leg, part.work, choices);
    }

    /// The prompt has been computed: prefill will say soon that it has it.
    pub fn prefilled(&mut self) {
        self.settle(0);
    }

    /// Prefill has handed over: decode will say soon that it has the prompt.
    pub fn handed_off(&mut self) {
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
        let ledger = &mut self.board.state.lock().ledger;
        for part in [Some(&self.prefill), self.decode.as_ref()].into_iter().flatten() {
            match part.leg {
                Some(leg) => ledger.cancelled(&part.instance, leg),
                None => ledger.release(&part.instance, part.work),
            }
        }
    }
}
