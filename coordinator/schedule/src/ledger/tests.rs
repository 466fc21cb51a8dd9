//! Tables, and the invariant of the ledger over any interleaving of what coordinators and an instance do, with frames
//! that are any time on their way.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// Far more blocks than any case needs.
const BLOCKS: u32 = 1 << 20;

fn id() -> InstanceId {
    InstanceId::new("a").expect("a good id")
}

fn work(prefill_tokens: u64, sequences: u64, blocks: u64) -> Work {
    Work { prefill_tokens, prefill_pairs: 3 * prefill_tokens, requests: sequences, sequences, blocks }
}

fn load(queued_prefill_tokens: u64, sequences: u32, kv_blocks_free: u32) -> Load {
    Load { queued_prefill_tokens, sequences, kv_blocks_total: 100, kv_blocks_free, ..Load::default() }
}

/// Books and dispatches.
fn send(ledger: &mut Ledger, leg: u64, work: Work) {
    ledger.credit(&id(), work);
    ledger.dispatched(&id(), LegId(leg), work, 1);
}

fn stands(ledger: &Ledger, load: &Load) -> (u64, u64, Option<u64>) {
    let standing = ledger.standing(&id(), load);
    (standing.queued_prefill_tokens, standing.sequences, standing.blocks_free)
}

#[test]
fn work_counts_from_the_instant_it_is_placed() {
    let mut ledger = Ledger::default();
    ledger.credit(&id(), work(50, 1, 4));
    assert_eq!(stands(&ledger, &load(200, 3, 60)), (250, 4, Some(56)));
    ledger.release(&id(), work(50, 1, 4));
    assert_eq!(stands(&ledger, &load(200, 3, 60)), (200, 3, Some(60)));
    assert!(ledger.accounts.is_empty());
}

#[test]
fn a_report_that_was_made_before_a_leg_was_seen_does_not_count_it_however_late_it_comes() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(50, 1, 4));
    send(&mut ledger, 2, work(30, 1, 2));
    ledger.reported(&id(), Some(LegId(1)));
    assert_eq!(stands(&ledger, &load(50, 1, 96)), (80, 2, Some(94)));
    ledger.reported(&id(), Some(LegId(2)));
    assert_eq!(stands(&ledger, &load(80, 2, 94)), (80, 2, Some(94)));
    ledger.prefilled(&id(), LegId(1), u64::MAX);
    ledger.choice_ended(&id(), LegId(2));
    assert_eq!(stands(&ledger, &load(80, 2, 94)), (0, 1, Some(96)));
}

#[test]
fn of_a_half_computed_prompt_the_rest_is_queued() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(1000, 1, 4));
    ledger.reported(&id(), Some(LegId(1)));
    assert_eq!(stands(&ledger, &load(400, 1, 96)).0, 400);
    ledger.prefilled(&id(), LegId(1), u64::MAX);
    assert_eq!(stands(&ledger, &load(400, 1, 96)).0, 0, "never below nothing");
}

#[test]
fn a_prompt_that_was_half_computed_takes_nothing_of_those_behind_it() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(30_000, 1, 4));
    send(&mut ledger, 2, work(9_000, 1, 4));
    ledger.reported(&id(), Some(LegId(2)));
    let report = load(9_512, 2, 92);
    assert_eq!(stands(&ledger, &report).0, 9_512);
    // So much can have been computed since.
    ledger.prefilled(&id(), LegId(1), 600);
    assert_eq!(stands(&ledger, &report).0, 8_912);
    ledger.prefilled(&id(), LegId(2), 5_000);
    assert_eq!(stands(&ledger, &report).0, 4_512, "of both together");
    ledger.reported(&id(), Some(LegId(2)));
    assert_eq!(stands(&ledger, &load(0, 2, 92)).0, 0);
}

#[test]
fn a_cancelled_leg_is_off_at_once_and_reports_count_it_until_the_instance_has_ended_it() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(50, 1, 4));
    ledger.cancelled(&id(), LegId(1));
    assert_eq!((stands(&ledger, &load(0, 0, 100)), ledger.own(&id())), ((0, 0, Some(100)), Work::default()));
    // Made after the dispatch had come and before the cancel had.
    ledger.reported(&id(), Some(LegId(1)));
    assert_eq!(stands(&ledger, &load(50, 1, 96)), (0, 0, Some(100)));
    ledger.prefilled(&id(), LegId(1), u64::MAX);
    ledger.reported(&id(), Some(LegId(1)));
    assert_eq!(stands(&ledger, &load(7, 2, 90)), (7, 1, Some(94)));
    ledger.choice_ended(&id(), LegId(1));
    assert_eq!(stands(&ledger, &load(7, 2, 90)), (7, 1, Some(94)), "this report still counts it");
    ledger.reported(&id(), Some(LegId(1)));
    assert_eq!(stands(&ledger, &load(7, 1, 94)), (7, 1, Some(94)));
    assert!(ledger.accounts.is_empty());
}

#[test]
fn a_leg_is_over_with_its_last_choice() {
    let mut ledger = Ledger::default();
    ledger.credit(&id(), work(50, 3, 4));
    ledger.dispatched(&id(), LegId(4), work(50, 3, 4), 3);
    ledger.reported(&id(), Some(LegId(4)));
    (0..2).for_each(|_| ledger.choice_ended(&id(), LegId(4)));
    assert_eq!(stands(&ledger, &load(50, 3, 96)), (50, 3, Some(96)));
    ledger.choice_ended(&id(), LegId(4));
    assert_eq!(stands(&ledger, &load(50, 3, 96)), (0, 0, Some(100)));
}

#[test]
fn blocks_that_are_promised_and_not_held_yet_are_not_free() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(0, 1, 40));
    ledger.reported(&id(), Some(LegId(1)));
    assert_eq!(stands(&ledger, &load(0, 1, 100)).2, Some(60));
    assert_eq!(stands(&ledger, &load(0, 1, 50)).2, Some(50), "they may be among those in use");
}

#[test]
fn who_does_not_say_what_it_includes_is_taken_to_include_what_was_dispatched() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(50, 1, 4));
    send(&mut ledger, 2, work(20, 1, 2));
    ledger.cancelled(&id(), LegId(2));
    ledger.credit(&id(), work(9, 1, 1));
    ledger.reported(&id(), None);
    assert_eq!(stands(&ledger, &load(250, 4, 56)), (259, 5, Some(55)));
    ledger.choice_ended(&id(), LegId(1));
    ledger.choice_ended(&id(), LegId(2));
    assert_eq!(stands(&ledger, &load(250, 4, 56)), (209, 4, Some(59)));
}

#[test]
fn a_number_beyond_what_was_dispatched_says_nothing_of_what_will_be() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(50, 1, 4));
    ledger.reported(&id(), Some(LegId(u64::MAX)));
    send(&mut ledger, 2, work(30, 1, 2));
    assert_eq!(stands(&ledger, &load(50, 1, 96)), (80, 2, Some(94)));
}

#[test]
fn legs_end_with_their_stream_and_what_is_not_dispatched_does_not() {
    let mut ledger = Ledger::default();
    send(&mut ledger, 1, work(50, 1, 4));
    send(&mut ledger, 2, work(5, 1, 1));
    ledger.cancelled(&id(), LegId(1));
    ledger.reported(&id(), Some(LegId(1)));
    ledger.credit(&id(), work(9, 1, 1));
    ledger.detached(&id());
    assert_eq!((stands(&ledger, &load(0, 0, 100)), ledger.own(&id())), ((9, 1, Some(99)), work(9, 1, 1)));
    ledger.cancelled(&id(), LegId(2));
    ledger.release(&id(), work(9, 1, 1));
    assert!(ledger.accounts.is_empty());
}

#[test]
fn an_instance_that_never_confirms_is_not_remembered_for_ever() {
    let mut ledger = Ledger::default();
    for leg in 1..=2 * CANCELLED_MOST as u64 {
        send(&mut ledger, leg, work(1, 1, 1));
        ledger.cancelled(&id(), LegId(leg));
    }
    let account = &ledger.accounts[&id()];
    assert_eq!((account.legs.len(), account.cancelled.len()), (CANCELLED_MOST, CANCELLED_MOST));
}

/// What travels to the instance, and back.
#[derive(Debug)]
enum Asked {
    Dispatch { leg: LegId, work: Work, choices: u32 },
    Cancel(LegId),
}

#[derive(Debug)]
enum Said {
    Prefilled(LegId),
    ChoiceEnded(LegId),
    /// With what of it is others' work.
    Load(Load, Work),
}

/// A leg as the instance has it.
#[derive(Debug)]
struct Held {
    coordinator: usize,
    leg: LegId,
    work: Work,
    choices: u32,
}

#[derive(Default)]
struct Coordinator {
    ledger: Ledger,
    next_leg: u64,
    /// Its own work, by the simplest means: legs neither cancelled nor heard to have ended.
    own: BTreeMap<LegId, (Work, u32)>,
    /// The report in hand, and what of it is others' work.
    load: Load,
    others: Work,
    to_instance: VecDeque<Asked>,
    from_instance: VecDeque<Said>,
    /// What the instance has seen of its legs.
    seen: LegId,
}

#[derive(Default)]
struct World {
    coordinators: [Coordinator; 3],
    held: Vec<Held>,
}

#[derive(Debug, Clone)]
enum Happening {
    Dispatch {
        prompt: u64,
        choices: u32,
        blocks: u64,
    },
    Cancel(usize),
    /// The next frame comes to the instance, or from it.
    Arrive,
    Hear,
    /// The instance computes a prompt, ends a choice, reports.
    Prefill(usize),
    End(usize),
    Report,
    Break,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (1u64..1000, 1u32..4, 1u64..50)
            .prop_map(|(prompt, choices, blocks)| Happening::Dispatch { prompt, choices, blocks }),
        2 => any::<usize>().prop_map(Happening::Cancel),
        5 => Just(Happening::Arrive),
        8 => Just(Happening::Hear),
        2 => any::<usize>().prop_map(Happening::Prefill),
        3 => any::<usize>().prop_map(Happening::End),
        4 => Just(Happening::Report),
        1 => prop::bool::weighted(0.2).prop_map(|breaks| if breaks { Happening::Break } else { Happening::Report }),
    ]
}

fn total(of: impl Iterator<Item = Work>) -> Work {
    of.fold(Work::default(), |mut sum, work| {
        sum.add(work);
        sum
    })
}

impl World {
    /// Something happens to a coordinator, its stream or one of its legs.
    fn happen(&mut self, at: usize, happening: Happening) {
        match happening {
            Happening::Dispatch { prompt, choices, blocks } => {
                self.dispatch(at, work(prompt, choices.into(), blocks), choices)
            }
            Happening::Cancel(which) => {
                let coordinator = &mut self.coordinators[at];
                let count = coordinator.own.len().max(1);
                if let Some(leg) = coordinator.own.keys().nth(which % count).copied() {
                    coordinator.own.remove(&leg);
                    coordinator.ledger.cancelled(&id(), leg);
                    coordinator.to_instance.push_back(Asked::Cancel(leg));
                }
            }
            Happening::Arrive => self.arrive(at),
            Happening::Hear => self.hear(at),
            Happening::Prefill(which) => {
                let count = self.held.len().max(1);
                if let Some(held) = self.held.get_mut(which % count)
                    && std::mem::take(&mut held.work.prefill_tokens) > 0
                {
                    held.work.prefill_pairs = 0;
                    let said = Said::Prefilled(held.leg);
                    self.coordinators[held.coordinator].from_instance.push_back(said);
                }
            }
            Happening::End(which) => {
                let at = which % self.held.len().max(1);
                if at < self.held.len() {
                    self.end(at);
                }
            }
            Happening::Report => {
                let of = |own: bool| self.held.iter().filter(move |held| own == (held.coordinator == at));
                let others = total(of(false).map(|held| held.work));
                let mut all = others;
                all.add(total(of(true).map(|held| held.work)));
                let load = Load {
                    sequences: all.sequences as u32,
                    queued_prefill_tokens: all.prefill_tokens,
                    queued_prefill_pairs: all.prefill_pairs,
                    kv_blocks_total: BLOCKS,
                    kv_blocks_free: BLOCKS - all.blocks as u32,
                    seen_leg: Some(self.coordinators[at].seen),
                    ..Load::default()
                };
                self.coordinators[at].from_instance.push_back(Said::Load(load, others));
            }
            Happening::Break => {
                self.held.retain(|held| held.coordinator != at);
                let Coordinator { ledger, next_leg, .. } = std::mem::take(&mut self.coordinators[at]);
                let coordinator = Coordinator { ledger, next_leg, ..Coordinator::default() };
                self.coordinators[at] = coordinator;
                self.coordinators[at].ledger.detached(&id());
            }
        }
    }

    fn dispatch(&mut self, at: usize, work: Work, choices: u32) {
        let coordinator = &mut self.coordinators[at];
        coordinator.next_leg += 1;
        let leg = LegId(coordinator.next_leg);
        coordinator.ledger.credit(&id(), work);
        coordinator.ledger.dispatched(&id(), leg, work, choices);
        coordinator.own.insert(leg, (work, choices));
        coordinator.to_instance.push_back(Asked::Dispatch { leg, work, choices });
    }

    fn arrive(&mut self, at: usize) {
        match self.coordinators[at].to_instance.pop_front() {
            Some(Asked::Dispatch { leg, work, choices }) => {
                self.held.push(Held { coordinator: at, leg, work, choices });
                self.coordinators[at].seen = leg;
            }
            Some(Asked::Cancel(leg)) => {
                while let Some(held) =
                    self.held.iter().position(|held| (held.coordinator, held.leg) == (at, leg))
                {
                    self.end(held);
                }
            }
            None => {}
        }
    }

    /// The instance ends a choice of a leg.
    fn end(&mut self, at: usize) {
        let held = &mut self.held[at];
        held.choices -= 1;
        self.coordinators[held.coordinator].from_instance.push_back(Said::ChoiceEnded(held.leg));
        if held.choices == 0 {
            self.held.swap_remove(at);
        }
    }

    fn hear(&mut self, at: usize) {
        let coordinator = &mut self.coordinators[at];
        match coordinator.from_instance.pop_front() {
            Some(Said::Prefilled(leg)) => {
                coordinator.ledger.prefilled(&id(), leg, u64::MAX);
                if let Some((own, _)) = coordinator.own.get_mut(&leg) {
                    (own.prefill_tokens, own.prefill_pairs) = (0, 0);
                }
            }
            Some(Said::ChoiceEnded(leg)) => {
                coordinator.ledger.choice_ended(&id(), leg);
                if let Some((_, choices)) = coordinator.own.get_mut(&leg) {
                    *choices -= 1;
                    if *choices == 0 {
                        coordinator.own.remove(&leg);
                    }
                }
            }
            Some(Said::Load(load, others)) => {
                coordinator.ledger.reported(&id(), load.seen_leg);
                (coordinator.load, coordinator.others) = (load, others);
            }
            None => {}
        }
    }

    /// Everything that is on its way comes, and then the instance reports to all.
    fn settle(&mut self) {
        for at in 0..self.coordinators.len() {
            while !self.coordinators[at].to_instance.is_empty() {
                self.arrive(at);
            }
        }
        for at in 0..self.coordinators.len() {
            self.happen(at, Happening::Report);
            while !self.coordinators[at].from_instance.is_empty() {
                self.hear(at);
            }
        }
    }
}

/// What an instance is estimated to have to do.
fn estimate(coordinator: &Coordinator) -> Work {
    let standing = coordinator.ledger.standing(&id(), &coordinator.load);
    let blocks = standing
        .blocks_free
        .map_or_else(|| coordinator.ledger.own(&id()).blocks, |free| u64::from(BLOCKS) - free);
    let prefill_pairs = standing.queued_prefill_pairs;
    Work { prefill_pairs, ..work(standing.queued_prefill_tokens, standing.sequences, blocks) }
}

proptest! {
    /// At all times: others' work as of the report in hand, and the own work as it is now.
    #[test]
    fn the_estimate_is_others_work_as_reported_and_the_own_as_it_is(
        happenings in prop::collection::vec((0usize..3, happening()), 1..200),
    ) {
        let mut world = World::default();
        for (at, happening) in happenings {
            world.happen(at, happening.clone());
            for coordinator in &world.coordinators {
                let own = total(coordinator.own.values().map(|(work, _)| *work));
                prop_assert_eq!(coordinator.ledger.own(&id()), own);
                let mut expected = coordinator.others;
                expected.add(own);
                prop_assert_eq!(estimate(coordinator), expected, "after {:?} of {}", happening, at);
            }
        }
        // With nothing on its way all of them have the truth.
        world.settle();
        let truth = total(world.held.iter().map(|held| held.work));
        for coordinator in &world.coordinators {
            prop_assert_eq!(estimate(coordinator), truth);
        }
        // And nothing is left of what is over.
        while !world.held.is_empty() {
            world.end(0);
        }
        world.settle();
        for coordinator in &world.coordinators {
            prop_assert!(coordinator.ledger.accounts.is_empty());
        }
    }
}
