//! The replay itself: a queue of events in the order of their time, and what each of them brings about.
//!
//! A request arrives and is placed; its prompt waits, is computed, and gives the first token; its cache travels, layer by
//! layer while the prompt is computed, and lands, but for what decode has of it; decode gives the rest. Or decode does all
//! of it. Instances report every so often, each at its own moment, and are heard a little later, as is what their caches
//! gain and lose.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

use baton_schedule::Settings;

use super::{
    cache::Changes,
    chooser::{Choice, Chooser, Place, Report, Sight},
    decode::Decode,
    machine::{Draws, Machine, Target},
    prefill::{Computed, Prefill},
    trace::Trace,
};

/// A fleet and how a trace is replayed over it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Setup {
    /// Of the coordinator's own placement.
    pub(crate) settings: Settings,
    /// So many of them place, each what comes to it.
    pub(crate) coordinators: usize,
    /// How often each instance reports.
    pub(crate) report_micros: u64,
    pub(crate) prefills: usize,
    pub(crate) decodes: usize,
    /// Blocks of 512 tokens that a prefill instance keeps.
    pub(crate) cache_blocks: usize,
    /// How many times as fast as they came requests come.
    pub(crate) speed: f64,
    /// Requests come up to this much late, each as chance has it.
    pub(crate) spread_micros: u64,
    pub(crate) seed: u64,
    pub(crate) machine: Machine,
}

/// How long a report is on its way.
const REPORT_TAKES_MICROS: u64 = 2_000;

/// What became of a request. Times are of the simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) arrived_micros: u64,
    pub(crate) first_micros: u64,
    pub(crate) last_micros: u64,
    /// Prompt tokens that whoever computed the prompt had cached.
    pub(crate) found_tokens: u32,
    /// How often it ended: once, unless the simulation is wrong.
    pub(crate) ends: u32,
    /// `None`: decode computed the prompt itself.
    pub(crate) prefill: Option<usize>,
    pub(crate) decode: usize,
}

/// What came of it all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// In the order of the trace.
    pub(crate) answers: Vec<Answer>,
    /// Time that each prefill instance computed.
    pub(crate) prefill_busy_micros: Vec<u64>,
    /// Time between the first and the last arrival.
    pub(crate) span_micros: u64,
}

#[derive(Debug)]
enum Event {
    Arrives(usize),
    Prefilled(usize),
    Landed(usize),
    Decoded(usize),
    Reports(Place),
    Heard(Place, Report),
    Cached(Place, Changes),
}

struct Due {
    at_micros: u64,
    /// Of events at one time the one that was foreseen first comes first.
    order: u64,
    event: Event,
}

impl Due {
    fn key(&self) -> (u64, u64) {
        (self.at_micros, self.order)
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Due {}

struct Simulation<'a> {
    trace: &'a Trace,
    machine: Machine,
    report_micros: u64,
    chooser: &'a mut dyn Chooser,
    due: BinaryHeap<Reverse<Due>>,
    foreseen: u64,
    now_micros: u64,
    prefills: Vec<Prefill>,
    decodes: Vec<Decode>,
    /// Caches on their way to each decode instance.
    arriving: Vec<u32>,
    answers: Vec<Answer>,
    /// Requests that have not ended.
    open: usize,
}

/// Replays a trace until every request has its answer.
pub(crate) fn run(trace: &Trace, setup: &Setup, chooser: &mut dyn Chooser) -> Outcome {
    let mut draws = Draws::new(setup.seed);
    let arrivals: Vec<u64> =
        trace.requests.iter().map(|request| arrival(request.at_micros, setup, &mut draws)).collect();
    let answer = |arrived_micros: &u64| Answer {
        arrived_micros: *arrived_micros,
        first_micros: 0,
        last_micros: 0,
        found_tokens: 0,
        ends: 0,
        prefill: None,
        decode: 0,
    };
    let machine = setup.machine;
    let prefill = |index: usize| {
        let slowness = machine.slowness(index, setup.prefills, setup.seed);
        Prefill::new(machine, slowness, draws.clone().next() ^ index as u64, setup.cache_blocks)
    };
    let decode = |index: usize| {
        let slowness = machine.slowness(index, setup.decodes, setup.seed + 3);
        Decode::new(machine, slowness, draws.clone().next() ^ ((1 + index as u64) << 32))
    };
    let mut simulation = Simulation {
        trace,
        machine,
        report_micros: setup.report_micros,
        chooser,
        due: BinaryHeap::new(),
        foreseen: 0,
        now_micros: 0,
        prefills: (0..setup.prefills).map(prefill).collect(),
        decodes: (0..setup.decodes).map(decode).collect(),
        arriving: vec![0; setup.decodes],
        answers: arrivals.iter().map(answer).collect(),
        open: arrivals.len(),
    };
    let places = (0..setup.prefills).map(Place::Prefill).chain((0..setup.decodes).map(Place::Decode));
    for place in places {
        let first = draws.next() % setup.report_micros;
        simulation.foresee(first, Event::Reports(place));
    }
    for (index, at_micros) in arrivals.iter().enumerate() {
        simulation.foresee(*at_micros, Event::Arrives(index));
    }
    simulation.go();
    let (first, last) = (arrivals.iter().min().copied(), arrivals.iter().max().copied());
    Outcome {
        answers: simulation.answers,
        prefill_busy_micros: simulation.prefills.iter().map(|prefill| prefill.busy_micros).collect(),
        span_micros: last.unwrap_or(0) - first.unwrap_or(0),
    }
}

fn arrival(at_micros: u64, setup: &Setup, draws: &mut Draws) -> u64 {
    let late = draws.unit() * setup.spread_micros as f64;
    ((at_micros as f64 + late) / setup.speed) as u64
}

impl Simulation<'_> {
    fn foresee(&mut self, at_micros: u64, event: Event) {
        self.foreseen += 1;
        self.due.push(Reverse(Due { at_micros, order: self.foreseen, event }));
    }

    fn go(&mut self) {
        while self.open > 0
            && let Some(Reverse(due)) = self.due.pop()
        {
            self.now_micros = due.at_micros;
            match due.event {
                Event::Arrives(index) => self.arrives(index),
                Event::Prefilled(prefill) => self.prefilled(prefill),
                Event::Landed(index) => self.landed(index),
                Event::Decoded(decode) => self.decoded(decode),
                Event::Reports(place) => self.reports(place),
                Event::Heard(place, report) => self.chooser.heard(place, &report, self.now_micros),
                Event::Cached(place, changes) => self.chooser.cached(place, &changes, self.now_micros),
            }
            while let Some((index, choice)) = self.chooser.bind(self.now_micros) {
                self.sent(index, choice);
            }
        }
    }

    fn arrives(&mut self, index: usize) {
        let request = &self.trace.requests[index];
        let sight = Sight { now_micros: self.now_micros, index, request, prefills: &self.prefills };
        if let Some(choice) = self.chooser.choose(&sight) {
            self.sent(index, choice);
        }
    }

    fn sent(&mut self, index: usize, choice: Choice) {
        let request = &self.trace.requests[index];
        self.answers[index].prefill = choice.prefill;
        self.answers[index].decode = choice.decode;
        let due = self.answers[index].arrived_micros + Target::ttft_micros(request) as u64;
        let due = if choice.in_time { due } else { 0 };
        match choice.prefill {
            Some(prefill) => {
                self.decodes[choice.decode].announce();
                self.prefills[prefill].take(index, due);
                self.step_prefill(prefill);
            }
            None => {
                self.decodes[choice.decode].take(index, due);
                self.step_decode(choice.decode);
            }
        }
    }

    fn step_prefill(&mut self, prefill: usize) {
        if let Some(micros) = self.prefills[prefill].step(&self.trace.requests, self.now_micros) {
            self.foresee(self.now_micros + micros, Event::Prefilled(prefill));
        }
        let changes = self.prefills[prefill].cache.changes();
        self.tell(Place::Prefill(prefill), changes);
    }

    fn tell(&mut self, place: Place, changes: Changes) {
        if changes != Changes::default() {
            self.foresee(self.now_micros + REPORT_TAKES_MICROS, Event::Cached(place, changes));
        }
    }

    fn step_decode(&mut self, decode: usize) {
        if let Some(micros) = self.decodes[decode].step(&self.trace.requests) {
            self.foresee(self.now_micros + micros, Event::Decoded(decode));
        }
        let changes = self.decodes[decode].cache.changes();
        self.tell(Place::Decode(decode), changes);
    }

    fn prefilled(&mut self, prefill: usize) {
        for computed in self.prefills[prefill].stepped(&self.trace.requests) {
            self.begun(&computed);
            let Computed { index, began_micros, .. } = computed;
            if self.trace.requests[index].output_tokens == 1 {
                self.decodes[self.answers[index].decode].land(None);
                self.end(index);
            } else {
                self.send(index, began_micros);
            }
        }
        self.step_prefill(prefill);
    }

    /// The first token is there.
    fn begun(&mut self, computed: &Computed) {
        let answer = &mut self.answers[computed.index];
        answer.first_micros = self.now_micros;
        answer.found_tokens = computed.found_tokens;
        self.chooser.prefilled(computed.index, self.now_micros);
    }

    /// What prefill has computed, or found, and decode has not, has been on its way since it began; whoever else sends
    /// there shares the way.
    fn send(&mut self, index: usize, began_micros: u64) {
        let decode = self.answers[index].decode;
        let request = &self.trace.requests[index];
        let lacking = request.prompt_tokens - self.decodes[decode].held_tokens(request);
        let alone = self.machine.transfer_token_micros * f64::from(lacking);
        let sent = began_micros + (alone * f64::from(1 + self.arriving[decode])) as u64;
        self.arriving[decode] += 1;
        let landed = sent.max(self.now_micros) + self.machine.handoff_micros;
        self.foresee(landed, Event::Landed(index));
    }

    fn landed(&mut self, index: usize) {
        let decode = self.answers[index].decode;
        self.arriving[decode] -= 1;
        self.chooser.handed_off(index, self.now_micros);
        self.decodes[decode].land(Some(index));
        self.step_decode(decode);
    }

    fn decoded(&mut self, decode: usize) {
        let (computed, ended) = self.decodes[decode].stepped(&self.trace.requests);
        computed.iter().for_each(|computed| self.begun(computed));
        ended.into_iter().for_each(|index| self.end(index));
        self.step_decode(decode);
    }

    fn end(&mut self, index: usize) {
        self.answers[index].last_micros = self.now_micros;
        self.answers[index].ends += 1;
        self.open -= 1;
        self.chooser.finished(index, self.trace.requests[index].output_tokens, self.now_micros);
    }

    fn reports(&mut self, place: Place) {
        let requests = &self.trace.requests;
        let report = match place {
            Place::Prefill(prefill) => self.prefills[prefill].report(requests),
            Place::Decode(decode) => self.decodes[decode].report(requests),
        };
        self.foresee(self.now_micros + REPORT_TAKES_MICROS, Event::Heard(place, report));
        self.foresee(self.now_micros + self.report_micros, Event::Reports(place));
    }
}
