//! A property: whatever happens in whatever order, no block is lost, none is written that others hold, everything is done
//! by rank, and every choice of every leg ends exactly once.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// Of one leg; each takes an id.
const CHOICES_MOST: u32 = 3;

/// What may happen between two steps.
#[derive(Debug, Clone)]
enum Happening {
    Add { prompt: u32, max_tokens: u32, kind: u8, priority: i32, choices: u32 },
    Cancel(usize, Option<u32>),
    CancelStream(u64),
    TransferEnds { which: usize, with: Option<ErrorCode> },
    Offered { which: usize, well: bool },
    Fails(usize),
    Step { token: u32 },
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (1u32..40, 1u32..30, 0u8..4, -1..2, prop_oneof![2 => Just(1u32), 1 => 2u32..=CHOICES_MOST])
            .prop_map(|(prompt, max_tokens, kind, priority, choices)| {
                Happening::Add { prompt, max_tokens, kind, priority, choices }
            }),
        2 => (0usize..100, prop::option::of(0..CHOICES_MOST))
            .prop_map(|(which, choice)| Happening::Cancel(which, choice)),
        1 => (0u64..2).prop_map(Happening::CancelStream),
        3 => (0usize..100, prop::option::weighted(0.3, prop_oneof![Just(ErrorCode::HandoffFailed), Just(ErrorCode::KvDamaged)]))
            .prop_map(|(which, with)| Happening::TransferEnds { which, with }),
        3 => (0usize..100, prop::bool::weighted(0.8)).prop_map(|(which, well)| Happening::Offered { which, well }),
        1 => (0usize..100).prop_map(Happening::Fails),
        12 => prop_oneof![20 => Just(1u32), 1 => Just(99u32)].prop_map(|token| Happening::Step { token }),
    ]
}

/// Plays the outside world: transfers that are open, legs that were added, what each was told.
#[derive(Default)]
struct World {
    /// With its choices.
    added: Vec<(u64, u32)>,
    open: Vec<(SequenceId, bool /* incoming */)>,
    watched: Vec<SequenceId>,
    sealed: HashSet<SequenceId>,
    /// By leg and choice.
    told: HashMap<(u64, u32), (u32, bool /* ended */)>,
}

impl World {
    fn absorb(&mut self, scheduler: &mut Scheduler) {
        for effect in scheduler.take_effects() {
            match effect {
                Effect::Offer { id, .. } => self.open.push((id, false)),
                Effect::Expect { id, .. } => self.open.push((id, true)),
                Effect::Watch { id, .. } => self.watched.push(id),
                Effect::Unwatch { id } => {
                    // Its offer may be on its way to the engine already: that must do no harm.
                    self.watched.retain(|&other| other != id || (id.0 / 8).is_multiple_of(2));
                }
                Effect::Refuse { .. } => {}
                Effect::Seal { id, .. } => assert!(self.sealed.insert(id), "sealed twice"),
                Effect::Close { id, .. } => {
                    assert!(self.open.iter().any(|(open, _)| *open == id), "closed, not open")
                }
            }
        }
        for (_, update) in scheduler.take_outputs() {
            let told =
                self.told.entry((update.leg.0, update.choice)).or_insert((update.first_position, false));
            assert!(!told.1, "leg {} was told more after its end", update.leg);
            assert_eq!(told.0, update.first_position, "leg {} has a gap or a repetition", update.leg);
            told.0 += update.tokens.len() as u32;
            told.1 = update.end.is_some();
        }
    }

    fn offer(&mut self, scheduler: &mut Scheduler, which: usize, well: bool) {
        if !self.watched.is_empty() {
            let id = self.watched.remove(which % self.watched.len());
            let late = || ApiError::new(ErrorCode::HandoffFailed, "late");
            scheduler.offered(id, if well { Ok(()) } else { Err(late()) });
        }
    }

    /// Well, or with an error of this code.
    fn end_transfer(&mut self, scheduler: &mut Scheduler, which: usize, with: Option<ErrorCode>) {
        if self.open.is_empty() {
            return;
        }
        let (id, incoming) = self.open.remove(which % self.open.len());
        match (with, incoming) {
            (None, true) => {
                let choices =
                    self.added.iter().find(|(leg, _)| *leg == id.0).map_or(1, |(_, choices)| *choices);
                scheduler.received(id, &vec![1; choices as usize]);
            }
            (None, false) if self.sealed.contains(&id) => scheduler.transfer_ended(id, Ok(())),
            _ => {
                let code = with.unwrap_or(ErrorCode::HandoffFailed);
                scheduler.transfer_ended(id, Err(ApiError::new(code, "broken")));
            }
        }
    }
}

fn check_invariants(scheduler: &Scheduler) {
    let held: Vec<BlockId> =
        scheduler.sequences.values().flat_map(|s| s.blocks.as_slice().iter().copied()).collect();
    let distinct: HashSet<BlockId> = held.iter().copied().collect();
    assert_eq!(distinct.len() as u32 + scheduler.blocks.room(), scheduler.blocks.total(), "a block is lost");
    check_shared(scheduler);
    for sequence in scheduler.sequences.values() {
        let id = &sequence.id;
        assert_eq!(scheduler.running.contains(id), sequence.state == State::Running, "{sequence:?}");
        assert_eq!(scheduler.waiting.contains(id), sequence.state == State::Waiting, "{sequence:?}");
        assert!(
            !matches!(sequence.state, State::Announced | State::Waiting) || sequence.blocks.count() == 0,
            "{sequence:?} waits with blocks"
        );
    }
    let count = |state| scheduler.sequences.values().filter(|s| s.state == state).count() as u32;
    assert_eq!(count(State::Receiving), scheduler.receiving);
    assert_eq!(count(State::Announced), scheduler.announced);
    assert!(scheduler.running.is_sorted_by_key(|id| scheduler.sequences[id].rank));
    assert!(scheduler.waiting.iter().is_sorted_by_key(|id| scheduler.sequences[id].rank));
}

/// A block stands in two lists only if it holds the same in both, as far as it is filled.
fn check_shared(scheduler: &Scheduler) {
    let mut contents: HashMap<BlockId, Vec<u32>> = HashMap::new();
    for sequence in scheduler.sequences.values() {
        for (index, &block) in (0..).zip(sequence.blocks.as_slice()) {
            let end =
                ((index + 1) * BLOCK).min(if index < sequence.sealed { u32::MAX } else { sequence.computed });
            let content = sequence.tokens[..end as usize].to_vec();
            let shared = contents.insert(block, content.clone());
            assert!(shared.is_none_or(|other| other == content), "{sequence:?}: block {index}");
        }
    }
}

fn check_plan(scheduler: &Scheduler, plan: &[Chunk]) {
    let limits = &scheduler.limits;
    assert!(plan.iter().map(|chunk| chunk.tokens).sum::<u32>() <= limits.max_batch_tokens);
    let distinct: HashSet<SequenceId> = plan.iter().map(|chunk| chunk.id).collect();
    assert_eq!(distinct.len(), plan.len(), "planned twice in one step");
    for chunk in plan {
        let sequence = &scheduler.sequences[&chunk.id];
        let end = chunk.start + chunk.tokens;
        assert_eq!((sequence.state, sequence.computed), (State::Running, chunk.start));
        assert!(chunk.start >= sequence.sealed * BLOCK, "{sequence:?} writes into a block that is final");
        for index in chunk.start / BLOCK..end.div_ceil(BLOCK) {
            let block = sequence.blocks.as_slice()[index as usize];
            let holders =
                scheduler.sequences.values().filter(|other| other.blocks.as_slice().contains(&block));
            assert_eq!(holders.count(), 1, "{sequence:?} writes into a block that others hold");
        }
        assert!(chunk.tokens > 0 && end <= sequence.tokens.len() as u32);
        assert!(end <= sequence.blocks.count() * BLOCK, "{sequence:?} has no room for {end} tokens");
        assert_eq!(chunk.logits, end == sequence.tokens.len() as u32);
        assert!(chunk.logits || end.is_multiple_of(BLOCK), "a chunk ends within a block");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn nothing_leaks_and_everything_ends(happenings in prop::collection::vec(happening(), 1..150), blocks in 8u32..40) {
        let mut scheduler = scheduler(blocks);
        let mut world = World::default();
        let run = |scheduler: &mut Scheduler, world: &mut World, token| {
            let plan = scheduler.schedule();
            check_plan(scheduler, &plan);
            for chunk in &plan {
                computed(scheduler, chunk, token);
            }
            world.absorb(scheduler);
            check_invariants(scheduler);
            !plan.is_empty()
        };
        for happening in happenings {
            let pick = |which: usize, world: &World| {
                world.added.get(which % world.added.len().max(1)).map(|(id, _)| SequenceId(*id))
            };
            match happening {
                Happening::Add { prompt, max_tokens, kind, priority, choices } => {
                    let id = 8 * world.added.len() as u64;
                    let work = [Work::Whole, prefill(), decode(), hands_on()][usize::from(kind)].clone();
                    world.added.push((id, choices));
                    // Two families of prompts that begin alike.
                    let tokens = (0..prompt).map(|position| position + 1000 * (prompt % 2)).collect();
                    // Some come with tokens that were generated elsewhere.
                    let carried = if choices == 1 { (prompt % 7).min(max_tokens - 1) } else { 0 };
                    let generated = vec![1; carried as usize];
                    let address = Address { stream: StreamId(id / 8 % 2), leg: LegId(id) };
                    let new = sequence(id, prompt, max_tokens, work).asking(|asked| {
                        (asked.prompt, asked.generated) = (tokens, generated);
                        (asked.priority, asked.choices) = (priority, choices);
                    });
                    scheduler.add(NewSequence { address, ..new });
                }
                Happening::Cancel(which, choice) => {
                    let choices = choice.map_or(0..CHOICES_MOST, |choice| choice..choice + 1);
                    pick(which, &world).into_iter().for_each(|id| scheduler.cancel_choices(id, choices.clone()));
                }
                Happening::Fails(which) => pick(which, &world)
                    .into_iter()
                    .for_each(|id| scheduler.fail(id, ApiError::new(ErrorCode::Internal, "broken"))),
                Happening::CancelStream(stream) => scheduler.cancel_stream(StreamId(stream)),
                Happening::TransferEnds { which, with } => world.end_transfer(&mut scheduler, which, with),
                Happening::Offered { which, well } => world.offer(&mut scheduler, which, well),
                Happening::Step { token } => {
                    run(&mut scheduler, &mut world, token);
                }
            }
            world.absorb(&mut scheduler);
            check_invariants(&scheduler);
        }
        // From here on everything goes well: all of it must end by itself.
        for _ in 0..20_000 {
            if !run(&mut scheduler, &mut world, 1) {
                if world.open.is_empty() && world.watched.is_empty() {
                    break;
                }
                world.offer(&mut scheduler, 0, true);
                world.end_transfer(&mut scheduler, 0, None);
                world.absorb(&mut scheduler);
            }
        }
        prop_assert_eq!(scheduler.sequences.len(), 0, "stuck: {:?}", scheduler);
        prop_assert_eq!(scheduler.blocks.room(), blocks);
        for &(id, choices) in &world.added {
            for choice in 0..choices {
                let told = world.told.get(&(id, choice));
                prop_assert!(told.is_some_and(|told| told.1), "choice {} of leg {} never ended", choice, id);
            }
        }
    }
}
