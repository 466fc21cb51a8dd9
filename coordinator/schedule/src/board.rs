//! The fleet and the ledger behind one lock, held for microseconds, never across an await.
//!
//! Written by the fleet's keeper, the streams to instances and the guards of placed work ([`booking`]); read by whoever books a
//! place.

mod booking;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_proto::{Incarnation, InstanceId};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, futures::Notified, watch},
    time::Instant,
};

use crate::{
    Ask, Assignee, NoPlace, Placement, Prompt, Receipt, Settings, Wanted,
    caches::{Caches, Feed, Held, Subject},
    choose::choose,
    fleet::{Change, Duty, Fleet, Load, Spec},
    ledger::{Ledger, Work},
    predict::{Lengths, Speeds},
    view::View,
};
use booking::Part;
pub use booking::{Booking, Credit, LegNews, Way};

/// Instances take longer times to the first token for this.
const TTFT_TARGET_MOST: Duration = Duration::from_secs(3600);

struct State {
    fleet: Fleet,
    ledger: Ledger,
    speeds: Speeds,
    lengths: Lengths,
    view: View,
}

impl State {
    fn listed(&mut self, now: Instant) {
        self.view.listed(&self.fleet, &self.ledger, &self.speeds, now);
    }

    fn renew(&mut self, id: &InstanceId, now: Instant) {
        self.view.renew(id, &self.fleet, &self.ledger, &self.speeds, now);
    }

    fn take_load(&mut self, id: &InstanceId, load: Load, now: Instant) {
        self.fleet.load(id, load);
        self.ledger.reported(id, load.seen_leg);
        self.view.reported(id, now);
        if let Some(instance) = self.fleet.get(id) {
            self.speeds.reported(&instance.spec, &load, now);
        }
        self.renew(id, now);
    }
}

/// What placement is decided from.
pub struct Board {
    settings: Settings,
    /// Locked before `state`, where both are.
    pub caches: Arc<Caches>,
    state: Mutex<State>,
    /// Counts requests to be placed.
    asked: AtomicU64,
    /// Counts changes of who is usable.
    version: watch::Sender<u64>,
    /// Told when somebody may have room.
    freed: Notify,
}

impl Board {
    /// `absent_grace`: see [`Fleet::new`].
    pub fn new(absent_grace: Duration, settings: Settings) -> Arc<Self> {
        let state = State {
            fleet: Fleet::new(absent_grace),
            ledger: Ledger::default(),
            speeds: Speeds::default(),
            lengths: Lengths::default(),
            view: View::default(),
        };
        Arc::new(Self {
            settings,
            caches: Caches::new(settings.index_bytes, settings.index_every_tokens),
            state: Mutex::new(state),
            asked: AtomicU64::new((u64::from(settings.seed) << 24) + 1),
            version: watch::Sender::new(0),
            freed: Notify::new(),
        })
    }

    /// Wakes on every change of who is usable.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Completes the next time that some instance may have gained room.
    pub fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    fn tell(&self) {
        self.version.send_modify(|version| *version += 1);
        self.freed.notify_waiters();
    }

    /// The store's present list of instances.
    pub fn list(&self, specs: &[Spec], now: Instant) -> Vec<Change> {
        let (changes, other) = {
            let state = &mut *self.state.lock();
            let (changes, other) = state.fleet.list(specs, now);
            if other {
                state.listed(now);
            }
            (changes, other)
        };
        if other {
            self.tell();
        }
        changes
    }

    /// Instances to forget.
    pub fn sweep(&self, now: Instant) -> Vec<Change> {
        let state = &mut *self.state.lock();
        let changes = state.fleet.sweep(now);
        for change in &changes {
            if let Change::Forget(id) = change {
                state.speeds.forget(id);
            }
        }
        if !changes.is_empty() {
            state.listed(now);
        }
        changes
    }

    /// The stream to an instance stands, and it has not told its load: it is taken to have nothing to do.
    pub fn up(&self, id: &InstanceId, incarnation: Incarnation, duty: Duty) {
        let state = &mut *self.state.lock();
        state.fleet.up(id, incarnation, duty);
        state.renew(id, Instant::now());
        self.tell();
    }

    /// The stream to an instance stands, and this is its load: whoever waited finds it as busy as it is.
    pub fn up_with(&self, id: &InstanceId, incarnation: Incarnation, duty: Duty, load: Load) {
        let state = &mut *self.state.lock();
        state.fleet.up(id, incarnation, duty);
        state.take_load(id, load, Instant::now());
        self.tell();
    }

    pub fn down(&self, id: &InstanceId, now: Instant) {
        let state = &mut *self.state.lock();
        if state.fleet.down(id, now) {
            state.renew(id, now);
            self.tell();
        }
    }

    /// Whether the instance behind a stream that stands does not get on: it is given nothing while it does not.
    pub fn set_stuck(&self, id: &InstanceId, is: bool) {
        let state = &mut *self.state.lock();
        if state.fleet.set_stuck(id, is) {
            state.renew(id, Instant::now());
            self.tell();
        }
    }

    /// No leg is on any stream to the instance, and none is dispatched before the next one stands.
    pub fn detached(&self, id: &InstanceId) {
        let state = &mut *self.state.lock();
        state.ledger.detached(id);
        state.renew(id, Instant::now());
    }

    pub fn duty(&self, id: &InstanceId, duty: Duty) {
        let state = &mut *self.state.lock();
        if state.fleet.changed(id, duty) {
            state.renew(id, Instant::now());
            self.tell();
        }
    }

    pub fn load(&self, id: &InstanceId, load: Load) {
        self.state.lock().take_load(id, load, Instant::now());
        self.freed.notify_waiters();
    }

    /// What an instance has said of its legs, in the order in which it did, and before the load that came after it.
    pub fn take_news(&self, id: &InstanceId, news: &[LegNews]) {
        let state = &mut *self.state.lock();
        let most = state.view.row(id).map_or(u64::MAX, |row| row.computed_most(Instant::now()));
        for news in news {
            match *news {
                LegNews::Prefilled(leg) => state.ledger.prefilled(id, leg, most),
                LegNews::ChoiceEnded(leg) => state.ledger.choice_ended(id, leg),
            }
        }
        state.renew(id, Instant::now());
        self.freed.notify_waiters();
    }

    /// Tokens that an answer is expected to have.
    pub fn expected_tokens(&self, revision: &str) -> u32 {
        self.state.lock().lengths.tokens(revision)
    }

    /// How long the first token of such a prompt may take.
    pub fn ttft_target(&self, prompt_tokens: u32) -> Duration {
        self.settings.targets.ttft(prompt_tokens).min(TTFT_TARGET_MOST)
    }

    /// How long each further token may take, on average.
    pub fn tpot_target(&self) -> Duration {
        self.settings.targets.tpot
    }

    /// How long an answer that has so many tokens, and may have `most`, is expected to take yet on an instance. Who has
    /// come further than others is as far from the end as they were: lengths have long tails.
    pub fn left(&self, id: &InstanceId, tokens: u32, most: u32) -> Duration {
        let state = self.state.lock();
        let Some(row) = state.view.row(id) else { return Duration::ZERO };
        let expected = state.lengths.tokens(&row.spec.revision).min(most.saturating_sub(tokens));
        let step = row.speed.step_micros(row.standing.batch() as f64, row.context_tokens());
        Duration::from_secs_f64((step.max(0.0) * f64::from(expected) / 1e6).min(1e6))
    }

    /// How long the prompts are expected to take that wait on an instance, or are being computed.
    pub fn queue(&self, id: &InstanceId) -> Duration {
        let state = self.state.lock();
        let micros = state.view.row(id).map_or(0.0, |row| row.queue_micros);
        Duration::from_secs_f64((micros.max(0.0) / 1e6).min(1e6))
    }

    /// How many instances are known.
    pub fn fleet_size(&self) -> usize {
        self.state.lock().fleet.size()
    }

    /// For what an instance says of its cache.
    pub fn feed(&self, id: &InstanceId) -> Feed {
        self.caches.feed(self.subject(id))
    }

    /// Whose cache it is that an instance tells of.
    pub fn subject(&self, id: &InstanceId) -> Subject {
        let state = self.state.lock();
        let instance = state.view.row(id).map_or(0, |row| row.number);
        Subject { instance, revision: state.fleet.revision(id).unwrap_or_default().into() }
    }

    /// Whether a request could be placed now.
    pub fn can_serve(&self, revision: &str) -> Result<(), NoPlace> {
        let ask =
            Ask { wanted: Wanted::new(1, 2, revision), held: Held::default(), expected_tokens: 1, nth: 0 };
        choose(&self.state.lock().view, &ask, &self.settings, Instant::now()).map(drop)
    }

    /// A new request for a model has come.
    pub fn arrived(&self, revision: &str) {
        self.state.lock().view.arrived(revision, Instant::now());
    }

    /// Where a request would go, were it placed now.
    pub fn look(&self, wanted: &Wanted<'_>) -> Result<(Placement, Receipt), NoPlace> {
        let (nth, now) = (self.asked.load(Ordering::Relaxed), Instant::now());
        let mut caches = self.caches.lock();
        let held = caches.look(wanted.prompt.chains, now);
        self.choose(&self.state.lock(), held, wanted, nth, now)
    }

    /// Where nobody else could fill a role, those to avoid are considered after all, one by one, the last first. Who could take
    /// nothing is none of these.
    fn choose(
        &self,
        state: &State,
        held: Held<'_>,
        wanted: &Wanted<'_>,
        nth: u64,
        now: Instant,
    ) -> Result<(Placement, Receipt), NoPlace> {
        let expected_tokens = state.lengths.tokens(wanted.revision);
        let mut left = wanted.avoid.to_vec();
        left.retain(|id| state.view.row(id).is_some_and(|row| row.is_usable(now)));
        loop {
            let wanted = Wanted { avoid: &left, ..*wanted };
            match choose(&state.view, &Ask { wanted, held, expected_tokens, nth }, &self.settings, now) {
                Err(error) if !left.is_empty() && state.view.give_up(&mut left, error) => {}
                settled => return settled,
            }
        }
    }

    /// Chooses where a request goes and books its work there at once.
    pub fn book(self: &Arc<Self>, wanted: &Wanted<'_>) -> Result<Booking, NoPlace> {
        let (nth, now) = (self.asked.fetch_add(1, Ordering::Relaxed), Instant::now());
        let Wanted { prompt: Prompt { chains, .. }, choices, among, .. } = *wanted;
        let mut caches = self.caches.lock();
        let held = caches.look(chains, now);
        let state = &mut *self.state.lock();
        let (placement, receipt) = self.choose(state, held, wanted, nth, now)?;
        let part = |assignee: &Assignee, computes: bool, sequences: u32| {
            let (prefill_tokens, prefill_pairs) =
                if computes { (assignee.uncached_tokens, assignee.uncached_pairs) } else { (0, 0) };
            let blocks = assignee.blocks;
            let sequences = sequences.into();
            let work = Work { prefill_tokens, prefill_pairs, requests: 1, sequences, blocks };
            Part { instance: assignee.instance.clone(), work, leg: None, expected: None }
        };
        let way = match &placement {
            Placement::Alone(alone) => {
                Way::Alone(state.view.row(&alone.instance).and_then(|row| row.role).unwrap_or_default())
            }
            Placement::Apart { .. } if among.handed_on_by().is_some() => Way::HandedOn,
            Placement::Apart { .. } => Way::Apart,
        };
        let (mut prefill, mut decode) = match &placement {
            Placement::Alone(assignee) => (part(assignee, true, choices), None),
            Placement::Apart { prefill, decode } => {
                (part(prefill, true, 1), Some(part(decode, false, choices)))
            }
        };
        for part in [Some(&mut prefill), decode.as_mut()].into_iter().flatten() {
            part.expected = state.view.row(&part.instance).and_then(|row| caches.expect(row.number, chains));
            state.ledger.credit(&part.instance, part.work);
            state.view.chosen(&part.instance, nth);
            state.renew(&part.instance, now);
        }
        let decode_waits = matches!(&placement, Placement::Apart { decode, .. } if decode.waits);
        let credit = Credit { board: self.clone(), prefill, decode, decode_waits };
        Ok(Booking { placement, receipt, credit, way })
    }

    /// All known instances and this coordinator's work on each; tests see by it that nothing is left behind.
    pub fn own_work(&self) -> Vec<(InstanceId, Work)> {
        let state = self.state.lock();
        let own = |id: &InstanceId| (id.clone(), state.ledger.own(id));
        state.fleet.models().flat_map(|(_, alike)| alike.keys()).map(own).collect()
    }
}

#[cfg(test)]
mod tests;
