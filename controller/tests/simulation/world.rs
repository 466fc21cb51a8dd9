//! The world of one seed: virtual time, a queue of what is going to happen, and who it happens to.
//!
//! Everything random comes from one generator, and whatever is due at the same time happens in the order it was put
//! off in: a seed is a history.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use baton_controller::{ControllerConfig, fleet::SessionId};
use baton_registry::{Operation, StoreError};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::Instant;

use crate::{
    checks::{Counts, Findings, Roles, converged},
    controller::{Clock, Controller, Said},
    faults::{Fault, Weather},
    instance::{Heard, Process},
    store::{Answer, Ask, Keeper, Request, millis},
    times,
};

pub(crate) const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// How long a try on the store may take.
const TRY_MS: u64 = 2000;

#[derive(Debug, Clone)]
pub(crate) enum Happening {
    Arrives(u64),
    Answers(u64, Option<StoreError>),
    Wake(usize),
    ToController(u64, Said),
    ToInstance(u64, Heard),
    Timer(u64, Timer),
    Fault,
    Mend(Fault),
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Timer {
    Call,
    Unanswered(u64),
    Beat,
    GoOn,
    TakenOn,
}

/// Where a controller sits; it may be down or paused.
pub(crate) struct Seat {
    pub(crate) controller: Option<Controller>,
    pub(crate) paused_at: Option<u64>,
    pub(crate) life: u64,
    wake_at: u64,
}

/// A connection.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) process: u64,
    pub(crate) seat: usize,
    life: u64,
    /// Nothing comes through any more.
    pub(crate) cut: bool,
    /// When the last message of each direction arrives: they do not overtake each other.
    arrivals: [u64; 2],
}

/// A call of the store, under way.
struct Pending {
    seat: usize,
    life: u64,
    author: Option<u64>,
    request: Request,
    /// How long its answer takes; none = it is lost.
    back: Option<u64>,
    result: Option<Result<Answer, StoreError>>,
}

pub(crate) struct World {
    pub(crate) random: StdRng,
    /// For what matters to health alone: times and wall clocks.
    of_health: StdRng,
    pub(crate) config: Arc<ControllerConfig>,
    pub(crate) now: u64,
    last: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    pub(crate) keeper: Keeper,
    pub(crate) weather: Weather,
    requests: BTreeMap<u64, Pending>,
    pub(crate) seats: Vec<Seat>,
    pub(crate) lines: BTreeMap<u64, Line>,
    pub(crate) processes: BTreeMap<u64, Process>,
    pub(crate) incarnation: u64,
    pub(crate) findings: Findings,
    /// What happened, if somebody wants to read it.
    pub(crate) log: Option<Vec<String>>,
    zero: Instant,
}

impl World {
    pub(crate) fn new(seed: u64, log: bool) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut of_health = StdRng::seed_from_u64(!seed);
        let config = Arc::new(ControllerConfig {
            health: times::health(&mut of_health),
            ..times::config(&mut random)
        });
        let weather = Weather::new(&mut random);
        let seats = random.random_range(2..=3);
        let mut world = Self {
            random,
            of_health,
            config,
            now: 0,
            last: 0,
            queue: BTreeMap::new(),
            keeper: Keeper::default(),
            weather,
            requests: BTreeMap::new(),
            seats: Vec::new(),
            lines: BTreeMap::new(),
            processes: BTreeMap::new(),
            incarnation: 1000,
            findings: Findings::default(),
            log: log.then(Vec::new),
            zero: Instant::now() + Duration::from_secs(1_000_000),
        };
        for seat in 0..seats {
            world.seats.push(Seat { controller: None, paused_at: None, life: 0, wake_at: 0 });
            world.seat(seat);
        }
        world.begin();
        world
    }

    /// Runs the whole history: faults, then calm, then nothing to do.
    pub(crate) fn run(&mut self) -> Result<Counts, String> {
        let stormy = self.random.random_range(20_000..90_000);
        self.until(stormy)?;
        self.note(|| "faults end".into());
        self.mend_everything();
        let roles = &self.config.roles;
        let move_in_turn = roles.drain + roles.switch_grace + roles.moves_period;
        let moves = millis(move_in_turn) * NAMES.len() as u64;
        let known = roles.lost_grace + roles.load_grace + self.config.sessions.lease;
        let health = &self.config.health;
        let bound = 60_000 + millis(known + health.quarantine_most + health.probation) + moves;
        let mut calm_since = None;
        // Whoever is to be started again is, by then.
        self.until(self.now + 11_000)?;
        while self.now < stormy + bound {
            self.until(self.now + 500)?;
            match converged(self) {
                Ok(()) => drop(calm_since.get_or_insert(self.now)),
                Err(_) => calm_since = None,
            }
            if calm_since.is_some_and(|since| self.now >= since + 5_000) {
                break;
            }
        }
        converged(self).map_err(|what| format!("after {bound} ms without faults, {what}"))?;
        self.findings.counts.calm_ms = self.now - stormy;
        self.note(|| "all is as it should be".into());
        let before = self.keeper.changes();
        self.until(self.now + 20_000)?;
        self.keeper.expire(self.now);
        let after = self.keeper.changes();
        if before != after {
            return Err(format!("nothing happens, yet the store goes from {before:?} to {after:?}"));
        }
        converged(self).map_err(|what| format!("nothing happens, yet {what}"))?;
        Ok(self.findings.counts)
    }

    fn until(&mut self, end: u64) -> Result<(), String> {
        while let Some(entry) = self.queue.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((at, _), happening) = entry.remove_entry();
            self.now = at;
            self.findings.counts.steps += 1;
            if !matches!(happening, Happening::Wake(_) | Happening::Arrives(_)) {
                self.note(|| format!("{happening:?}"));
            }
            self.happen(happening);
            if let Some(violation) = self.findings.violation.take() {
                return Err(violation);
            }
        }
        self.now = end;
        Ok(())
    }

    pub(crate) fn later(&mut self, after: u64, happening: Happening) {
        self.last += 1;
        self.queue.insert((self.now + after, self.last), happening);
    }

    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:>7} ms  {}", self.now, what()));
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Arrives(number) => self.arrives(number),
            Happening::Answers(number, error) => self.answers(number, error),
            Happening::Wake(seat) => {
                if self.seats[seat].wake_at == self.now {
                    self.step(seat);
                }
            }
            Happening::ToController(line, said) => self.bring(line, said),
            Happening::ToInstance(line, heard) => self.hear(line, heard),
            Happening::Timer(process, timer) => self.timer(process, timer),
            Happening::Fault => self.fault(),
            Happening::Mend(fault) => self.mend(fault),
        }
    }

    // Controllers.

    /// Starts a controller, with a clock of its own.
    pub(crate) fn seat(&mut self, seat: usize) {
        let ahead = Duration::from_millis(self.random.random_range(0..1_000_000));
        let speed = self.random.random_range(800..=1250);
        // Some wall clocks are wrong by up to an hour.
        let random = &mut self.of_health;
        let skew = if random.random_bool(0.3) { random.random_range(0..7_200_000) } else { 3_600_000 };
        let clock = Clock { zero: self.zero + ahead, speed, wall_millis: 1_700_000_000_000 + skew };
        let controller = Controller::new(seat, self.config.clone(), clock, self.now);
        let it = &mut self.seats[seat];
        (it.controller, it.paused_at, it.life) = (Some(controller), None, it.life + 1);
        self.wake(seat, self.now + 1);
    }

    fn wake(&mut self, seat: usize, at: u64) {
        if at < u64::MAX && self.seats[seat].wake_at != at {
            self.seats[seat].wake_at = at;
            self.later(at - self.now, Happening::Wake(seat));
        }
    }

    /// Lets a controller do what it can do now.
    pub(crate) fn step(&mut self, seat: usize) {
        let it = &mut self.seats[seat];
        let (Some(controller), None) = (&mut it.controller, it.paused_at) else { return };
        self.keeper.expire(self.now);
        let before = controller.epoch();
        let decided =
            self.log.is_some().then(|| controller.leading().map(|leading| Roles::of(&leading.mind)));
        let out = controller.step(self.now, &self.keeper, &mut self.findings);
        let (after, wake) = (controller.epoch(), controller.wake());
        let decided =
            decided.flatten().zip(controller.leading()).map(|(roles, leading)| roles.since(&leading.mind));
        if let Some(decided) = decided.filter(|decided| !decided.is_empty()) {
            self.note(|| format!("c{seat} has {}", decided.join(", ")));
        }
        if before != after {
            self.findings.counts.terms += u64::from(after.is_some());
            self.note(|| format!("c{seat} led as {before:?} and leads as {after:?}"));
        }
        self.send_requests(seat);
        for out in out {
            self.carry_out(seat, out);
        }
        self.wake(seat, wake.max(self.now + 1));
    }

    pub(crate) fn send_requests(&mut self, seat: usize) {
        let it = &self.seats[seat];
        let Some(controller) = &it.controller else { return };
        let (life, author) = (it.life, controller.epoch());
        for request in controller.client.take() {
            self.last += 1;
            let number = self.last;
            let txn = matches!(request.ask, Ask::Txn(_));
            let fate = self.weather.fate(self.now, seat, txn, &mut self.random);
            let too_late = fate.there.zip(fate.back).is_none_or(|(there, back)| there + back > TRY_MS);
            if let Some(there) = fate.there {
                self.later(there, Happening::Arrives(number));
            }
            let back = fate.back.filter(|_| !too_late);
            if back.is_none() {
                let lost = fate.there.is_some() && txn || fate.doubtful;
                let error = if lost { StoreError::Unknown("lost".into()) } else { not_done() };
                self.findings.counts.lost_answers += u64::from(lost);
                self.later(fate.error_after.unwrap_or(TRY_MS), Happening::Answers(number, Some(error)));
            }
            self.requests.insert(number, Pending { seat, life, author, request, back, result: None });
        }
    }

    fn arrives(&mut self, number: u64) {
        let lag = self.random.random_range(0..500);
        // It may have been answered, with an error, before it has arrived.
        let Some(pending) = self.requests.get_mut(&number) else { return };
        match self.keeper.carry_out(&pending.request.ask, pending.author, (self.now, lag)) {
            Err(violation) => self.findings.violated(violation),
            Ok(result) => {
                if let (Some(_), Ok(Answer::Outcome(outcome))) = (pending.author, &result) {
                    self.findings.counts.fenced += u64::from(!outcome.succeeded);
                }
                let (seat, said) = (pending.seat, told(&pending.request.ask, &result));
                pending.result = Some(result);
                let back = pending.back;
                self.note(|| format!("c{seat}'s {said}"));
                if let Some(back) = back {
                    self.later(back, Happening::Answers(number, None));
                }
            }
        }
    }

    fn answers(&mut self, number: u64, error: Option<StoreError>) {
        let Some(pending) = self.requests.get_mut(&number) else { return };
        let result = match error {
            Some(error) => Err(error),
            None => pending.result.take().expect("it has arrived"),
        };
        let (seat, life) = (pending.seat, pending.life);
        let (unused, _) = tokio::sync::oneshot::channel();
        // Whoever asked may have gone. What has not arrived yet still will.
        std::mem::replace(&mut pending.request.answer, unused).send(result).ok();
        if self.seats[seat].life == life {
            self.step(seat);
        }
    }

    // Connections.

    pub(crate) fn connect(&mut self, process: u64, seat: usize) -> u64 {
        self.last += 1;
        let line = Line { process, seat, life: self.seats[seat].life, cut: false, arrivals: [self.now; 2] };
        self.lines.insert(self.last, line);
        self.last
    }

    pub(crate) fn send(&mut self, line: u64, happening: Happening) {
        let direction = usize::from(matches!(happening, Happening::ToInstance(..)));
        let delay = self.weather.delay(self.now, &mut self.random);
        let Some(it) = self.lines.get_mut(&line) else { return };
        let at = (self.now + delay).max(it.arrivals[direction]);
        it.arrivals[direction] = at;
        self.later(at - self.now, happening);
    }

    fn bring(&mut self, line: u64, said: Said) {
        let Some(it) = self.lines.get(&line) else { return };
        // That it is cut is noticed in spite of the cut.
        let lost = it.cut && !matches!(said, Said::Closed);
        let (number, life) = (it.seat, it.life);
        let seat = &mut self.seats[number];
        match &mut seat.controller {
            Some(controller) if seat.life == life && !lost => {
                controller.inbox.push_back((SessionId(line), said));
                self.step(number);
            }
            Some(_) if lost => {}
            _ => self.send(line, Happening::ToInstance(line, Heard::End)),
        }
    }

    // What is asked by the checks.

    pub(crate) fn ratio(&self) -> (usize, usize) {
        (self.config.roles.prefill as usize, self.config.roles.decode as usize)
    }

    /// Controllers that believe to lead.
    pub(crate) fn leaders(&self) -> impl Iterator<Item = &Controller> {
        let controllers = self.seats.iter().filter_map(|seat| seat.controller.as_ref());
        controllers.filter(|controller| controller.epoch().is_some())
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = &Process> {
        self.processes.values().filter(|process| process.alive)
    }

    pub(crate) fn name(&self, process: &Process) -> &'static str {
        NAMES[process.name]
    }

    pub(crate) fn process_at(&self, session: SessionId) -> Option<&Process> {
        let process = self.processes.get(&self.lines.get(&session.0)?.process)?;
        (process.alive && process.line == Some((session.0, true))).then_some(process)
    }
}

/// A call and its result, for the log.
fn told(ask: &Ask, result: &Result<Answer, StoreError>) -> String {
    let key = |operation: &Operation| match operation {
        Operation::Put { key, .. } => format!("put {key}"),
        other => format!("{other:?}"),
    };
    match (ask, result) {
        (Ask::Txn(txn), Ok(Answer::Outcome(outcome))) => {
            let keys: Vec<_> = txn.operations.iter().map(key).collect();
            format!(
                "{} {} at {}",
                keys.join(", "),
                if outcome.succeeded { "made" } else { "not made" },
                outcome.revision
            )
        }
        (_, Ok(_)) => format!("{ask:?}"),
        (_, Err(error)) => format!("{ask:?} fails: {error}"),
    }
}

fn not_done() -> StoreError {
    StoreError::Unavailable("out of reach".into())
}
