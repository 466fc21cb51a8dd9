//! Tables for the planning rules, and a property: whatever happens in whatever order, no block is lost or shared, and
//! every leg ends exactly once.

use std::{collections::HashSet, time::Duration};

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, LegId, RequestId, TransferId};
use proptest::prelude::*;

use super::*;
use crate::engine::{
    sampler::SamplingParams,
    sequence::{FinishReason, LegEnd, NewSequence, StopRule, StreamId},
};

const BLOCK: u32 = 4;

fn scheduler(blocks: u32) -> Scheduler {
    let limits = Limits {
        max_batch_tokens: 16,
        max_sequences: 4,
        max_waiting: 8,
        context_tokens: 64,
        block_tokens: BLOCK,
        prefix_cache: true,
    };
    Scheduler::new(limits, blocks, BlockHash::root("test", ""))
}

fn prefill() -> Work {
    Work::Prefill(Outbound {
        transfer: TransferId::from_bytes([7; 16]),
        receiver: InstanceId::new("d").expect("a name"),
        receiver_incarnation: Incarnation(1),
        endpoint: "127.0.0.1:1".into(),
    })
}

fn decode() -> Work {
    Work::Decode(Inbound {
        transfer: TransferId::from_bytes([7; 16]),
        sender: InstanceId::new("p").expect("a name"),
        sender_incarnation: Incarnation(1),
    })
}

fn sequence(id: u64, prompt: u32, max_tokens: u32, work: Work) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        address: Address { stream: StreamId(id % 2), leg: LegId(id) },
        request: RequestId::adopt("test"),
        prompt: (0..prompt).map(|position| position + 1000 * id as u32).collect(),
        sampling: SamplingParams::GREEDY,
        stop: StopRule { max_tokens, stop_tokens: vec![99] },
        deadline: None,
        work,
        permit: None,
        span: tracing::Span::none(),
    }
}

/// Runs one step; every sampled token is `token`.
fn step(scheduler: &mut Scheduler, token: u32) -> Vec<(u64, u32, u32)> {
    let plan = scheduler.schedule();
    for chunk in &plan {
        scheduler.computed(chunk, chunk.logits.then_some(token));
    }
    plan.iter().map(|chunk| (chunk.id.0, chunk.start, chunk.tokens)).collect()
}

fn ends(scheduler: &mut Scheduler) -> Vec<(u64, LegEnd)> {
    let outputs = scheduler.take_outputs().into_iter();
    outputs.filter_map(|(_, update)| Some((update.leg.0, update.end?))).collect()
}

#[test]
fn decodes_come_first_and_chunks_end_at_block_borders() {
    let mut scheduler = scheduler(100);
    scheduler.add(sequence(1, 5, 10, Work::Whole));
    assert_eq!(step(&mut scheduler, 1), [(1, 0, 5)]);
    scheduler.add(sequence(2, 30, 10, Work::Whole));
    scheduler.add(sequence(3, 3, 10, Work::Whole));
    // 15 tokens are left for prompts: the long one takes 12, the short one the other 3.
    assert_eq!(step(&mut scheduler, 1), [(1, 5, 1), (2, 0, 12), (3, 0, 3)]);
    assert_eq!(step(&mut scheduler, 1), [(1, 6, 1), (3, 3, 1), (2, 12, 12)]);
    assert_eq!(step(&mut scheduler, 1), [(1, 7, 1), (3, 4, 1), (2, 24, 6)]);
    assert_eq!(step(&mut scheduler, 1), [(1, 8, 1), (2, 30, 1), (3, 5, 1)]);
}

#[test]
fn a_completion_ends_by_stop_token_length_or_context() {
    let mut scheduler = scheduler(100);
    for (id, prompt, max_tokens) in [(1, 4, 1), (2, 4, 9), (3, 63, 9)] {
        scheduler.add(sequence(id, prompt, max_tokens, Work::Whole));
    }
    scheduler.schedule().iter().for_each(|chunk| scheduler.computed(chunk, chunk.logits.then_some(5)));
    while !step(&mut scheduler, 99).is_empty() {}
    let finished = |reason, prompt_tokens, completion_tokens| LegEnd::Finished {
        reason,
        prompt_tokens,
        cached_tokens: 0,
        completion_tokens,
    };
    let mut ends = ends(&mut scheduler);
    ends.sort_by_key(|end| end.0);
    assert_eq!(
        ends,
        [
            (1, finished(FinishReason::Length, 4, 1)),
            (2, finished(FinishReason::Stop, 4, 2)),
            (3, finished(FinishReason::Stop, 63, 1)),
        ]
    );
    scheduler.add(sequence(4, 63, 9, Work::Whole));
    while !step(&mut scheduler, 5).is_empty() {}
    assert_eq!(self::ends(&mut scheduler), [(4, finished(FinishReason::Length, 63, 1))]);
    assert_eq!(scheduler.occupancy().blocks_free, 100);
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut scheduler = scheduler(3);
    let cases = [
        (sequence(1, 13, 1, Work::Whole), ErrorCode::KvExhausted),
        (sequence(2, 12, 1, decode()), ErrorCode::KvExhausted),
        (sequence(3, 13, 1, prefill()), ErrorCode::KvExhausted),
        (sequence(4, 64, 1, Work::Whole), ErrorCode::ContextLengthExceeded),
    ];
    for (new, code) in cases {
        let id = new.id.0;
        scheduler.add(new);
        match &ends(&mut scheduler)[..] {
            [(leg, LegEnd::Failed(error))] => assert_eq!((*leg, error.code), (id, code)),
            other => panic!("{id}: {other:?}"),
        }
    }
    for new in [sequence(5, 10, 3, Work::Whole), sequence(6, 11, 1, decode()), sequence(7, 12, 9, prefill())]
    {
        scheduler.add(new);
    }
    assert_eq!(ends(&mut scheduler), []);
}

#[test]
fn a_completion_without_a_limit_ends_where_the_pool_does() {
    for work in [Work::Whole, decode()] {
        let mut scheduler = scheduler(3);
        scheduler.add(sequence(1, 10, u32::MAX, work));
        scheduler.schedule().iter().for_each(|chunk| scheduler.computed(chunk, chunk.logits.then_some(5)));
        scheduler.offered(SequenceId(1), Ok(()));
        step(&mut scheduler, 5);
        if scheduler.occupancy().receiving == 1 {
            scheduler.received(SequenceId(1), 5);
        }
        while !step(&mut scheduler, 5).is_empty() {}
        // Twelve tokens are held, and the last one is not.
        let end = LegEnd::Finished {
            reason: FinishReason::Length,
            prompt_tokens: 10,
            cached_tokens: 0,
            completion_tokens: 3,
        };
        assert_eq!(ends(&mut scheduler), [(1, end)]);
        assert_eq!(scheduler.occupancy().counts.preemptions, 0);
    }
}

#[test]
fn the_queue_is_bounded() {
    let mut scheduler = scheduler(100);
    (0..9).for_each(|id| scheduler.add(sequence(id, 4, 4, Work::Whole)));
    match &ends(&mut scheduler)[..] {
        [(8, LegEnd::Failed(error))] => assert_eq!(error.code, ErrorCode::QueueFull),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_youngest_is_preempted_and_computed_again() {
    let mut scheduler = scheduler(5);
    scheduler.add(sequence(1, 7, 12, Work::Whole));
    scheduler.add(sequence(2, 7, 5, Work::Whole));
    assert_eq!(step(&mut scheduler, 1), [(1, 0, 7), (2, 0, 7)]);
    assert_eq!(step(&mut scheduler, 1), [(1, 7, 1), (2, 7, 1)]);
    // Both need a third block, one is free.
    assert_eq!(step(&mut scheduler, 1), [(1, 8, 1)]);
    assert_eq!(scheduler.occupancy().counts.preemptions, 1);
    let mut recomputed = 0;
    loop {
        let plan = step(&mut scheduler, 1);
        recomputed +=
            plan.iter().filter(|(id, start, tokens)| (*id, *start) == (2, 0) && *tokens > 1).count();
        if plan.is_empty() {
            break;
        }
    }
    assert_eq!(recomputed, 1);
    assert_eq!(ends(&mut scheduler).len(), 2);
    assert_eq!(scheduler.occupancy().blocks_free, 5);
}

#[test]
fn a_decode_leg_without_an_offer_holds_nothing_but_its_place() {
    let mut scheduler = scheduler(8);
    (0..8).for_each(|id| scheduler.add(sequence(id, 4, 4, decode())));
    scheduler.add(sequence(8, 4, 4, Work::Whole));
    assert!(matches!(&ends(&mut scheduler)[..], [(8, LegEnd::Failed(e))] if e.code == ErrorCode::QueueFull));
    assert_eq!((scheduler.occupancy().waiting, scheduler.occupancy().blocks_free), (8, 8));
    scheduler.take_effects();
    scheduler.cancel(SequenceId(0));
    assert!(matches!(
        &scheduler.take_effects()[..],
        [Effect::Unwatch { id: SequenceId(0) }, Effect::Refuse { .. }]
    ));
    // What is behind them in time is served before them.
    scheduler.add(sequence(9, 4, 1, Work::Whole));
    assert_eq!(step(&mut scheduler, 1), [(9, 0, 4)]);
    let late = ApiError::new(ErrorCode::HandoffFailed, "late");
    scheduler.offered(SequenceId(1), Err(late.clone()));
    scheduler.offered(SequenceId(0), Ok(()));
    scheduler.offered(SequenceId(3), Ok(()));
    let ends = ends(&mut scheduler);
    assert!(ends.contains(&(1, LegEnd::Failed(late))), "{ends:?}");
    step(&mut scheduler, 1);
    let expected =
        scheduler.take_effects().into_iter().filter(|effect| matches!(effect, Effect::Expect { .. }));
    assert_eq!(expected.count(), 1);
    assert_eq!(scheduler.occupancy().receiving, 1);
}

#[test]
fn a_prefill_leg_hands_on_and_keeps_its_blocks_until_released() {
    let mut scheduler = scheduler(8);
    scheduler.add(sequence(1, 20, 9, prefill()));
    assert_eq!(step(&mut scheduler, 3), [(1, 0, 16)]);
    assert!(matches!(&scheduler.take_effects()[..], [Effect::Offer { blocks, .. }] if blocks.len() == 5));
    assert_eq!(step(&mut scheduler, 3), [(1, 16, 4)]);
    assert_eq!(scheduler.take_effects(), [Effect::Seal { id: SequenceId(1), first_token: 3 }]);
    assert_eq!(step(&mut scheduler, 3), []);
    assert_eq!(scheduler.occupancy().blocks_free, 3);
    scheduler.transfer_ended(SequenceId(1), Ok(()));
    assert_eq!(scheduler.occupancy().blocks_free, 8);
    assert!(matches!(
        ends(&mut scheduler)[..],
        [(1, LegEnd::Finished { reason: FinishReason::HandedOff, completion_tokens: 1, .. })]
    ));
}

#[test]
fn a_prefill_leg_whose_first_token_is_the_last_closes_its_transfer() {
    let mut scheduler = scheduler(8);
    scheduler.add(sequence(1, 8, 1, prefill()));
    step(&mut scheduler, 3);
    assert!(matches!(&scheduler.take_effects()[..], [Effect::Offer { .. }, Effect::Close { .. }]));
    assert!(matches!(ends(&mut scheduler)[..], [(1, LegEnd::Finished { reason: FinishReason::Length, .. })]));
    assert_eq!(scheduler.occupancy().blocks_free, 6, "freed before the fence");
    scheduler.transfer_ended(SequenceId(1), Err(ApiError::new(ErrorCode::Cancelled, "closed")));
    assert_eq!(scheduler.occupancy().blocks_free, 8);
    assert_eq!(ends(&mut scheduler), []);
}

#[test]
fn a_decode_leg_reserves_receives_and_goes_on_from_the_first_token() {
    let mut scheduler = scheduler(8);
    scheduler.add(sequence(1, 8, 3, decode()));
    assert_eq!(step(&mut scheduler, 3), []);
    assert!(matches!(&scheduler.take_effects()[..], [Effect::Watch { .. }]));
    assert_eq!(scheduler.occupancy().blocks_free, 8, "it holds blocks before its prefill does");
    scheduler.offered(SequenceId(1), Ok(()));
    assert_eq!(step(&mut scheduler, 3), []);
    assert!(matches!(&scheduler.take_effects()[..], [Effect::Expect { blocks, .. }] if blocks.len() == 3));
    scheduler.received(SequenceId(1), 42);
    assert_eq!(step(&mut scheduler, 3), [(1, 8, 1)]);
    assert_eq!(step(&mut scheduler, 4), [(1, 9, 1)]);
    let outputs = scheduler.take_outputs();
    let tokens: Vec<_> =
        outputs.iter().map(|(_, update)| (update.first_position, &update.tokens[..])).collect();
    assert_eq!(tokens, [(1, &[3][..]), (2, &[4][..]), (3, &[][..])]);
    assert_eq!(scheduler.occupancy().blocks_free, 8);
}

#[test]
fn the_deadline_ends_a_sequence_in_any_state() {
    let mut scheduler = scheduler(8);
    let now = Instant::now();
    for (id, work) in [(1, Work::Whole), (2, prefill()), (3, decode())] {
        let deadline = Some(now + Duration::from_secs(id));
        scheduler.add(NewSequence { deadline, ..sequence(id, 7, 9, work) });
    }
    scheduler.offered(SequenceId(3), Ok(()));
    scheduler
        .add(NewSequence { deadline: Some(now + Duration::from_secs(2)), ..sequence(4, 7, 9, decode()) });
    step(&mut scheduler, 1);
    assert_eq!(scheduler.next_deadline(), Some(now + Duration::from_secs(1)));
    scheduler.expire(now + Duration::from_secs(3));
    let ends = ends(&mut scheduler);
    assert_eq!(ends.len(), 4);
    assert!(
        ends.iter().all(|(_, end)| matches!(end, LegEnd::Failed(e) if e.code == ErrorCode::DeadlineExceeded))
    );
    assert_eq!(scheduler.next_deadline(), None);
    assert_eq!(scheduler.occupancy().leaving, 2);
}

/// What may happen between two steps.
#[derive(Debug, Clone)]
enum Happening {
    Add { prompt: u32, max_tokens: u32, kind: u8 },
    Cancel(usize),
    CancelStream(u64),
    TransferEnds { which: usize, well: bool },
    Offered { which: usize, well: bool },
    Fails(usize),
    Step { token: u32 },
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (1u32..40, 1u32..30, 0u8..3)
            .prop_map(|(prompt, max_tokens, kind)| Happening::Add { prompt, max_tokens, kind }),
        1 => (0usize..100).prop_map(Happening::Cancel),
        1 => (0u64..2).prop_map(Happening::CancelStream),
        3 => (0usize..100, prop::bool::weighted(0.8))
            .prop_map(|(which, well)| Happening::TransferEnds { which, well }),
        3 => (0usize..100, prop::bool::weighted(0.8)).prop_map(|(which, well)| Happening::Offered { which, well }),
        1 => (0usize..100).prop_map(Happening::Fails),
        12 => prop_oneof![20 => Just(1u32), 1 => Just(99u32)].prop_map(|token| Happening::Step { token }),
    ]
}

/// Plays the outside world: transfers that are open, legs that were added, what each was told.
#[derive(Default)]
struct World {
    added: Vec<u64>,
    open: Vec<(SequenceId, bool /* incoming */)>,
    watched: Vec<SequenceId>,
    sealed: HashSet<SequenceId>,
    told: HashMap<u64, (u32, bool /* ended */)>,
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
                    self.watched.retain(|&other| other != id || id.0 % 2 == 0);
                }
                Effect::Refuse { .. } => {}
                Effect::Seal { id, .. } => assert!(self.sealed.insert(id), "sealed twice"),
                Effect::Close { id } => {
                    assert!(self.open.iter().any(|(open, _)| *open == id), "closed, not open")
                }
            }
        }
        for (_, update) in scheduler.take_outputs() {
            let told = self.told.entry(update.leg.0).or_insert((update.first_position, false));
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

    fn end_transfer(&mut self, scheduler: &mut Scheduler, which: usize, well: bool) {
        if self.open.is_empty() {
            return;
        }
        let (id, incoming) = self.open.remove(which % self.open.len());
        match (well, incoming) {
            (true, true) => scheduler.received(id, 1),
            (true, false) if self.sealed.contains(&id) => scheduler.transfer_ended(id, Ok(())),
            _ => scheduler.transfer_ended(id, Err(ApiError::new(ErrorCode::HandoffFailed, "broken"))),
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
    assert!(scheduler.running.is_sorted_by_key(|id| scheduler.sequences[id].arrival));
}

/// A block stands in two lists only if it is final in both, and then it holds the same in both.
fn check_shared(scheduler: &Scheduler) {
    let mut contents: HashMap<BlockId, Option<Vec<u32>>> = HashMap::new();
    for sequence in scheduler.sequences.values() {
        for (index, &block) in (0..).zip(sequence.blocks.as_slice()) {
            let end = (index as usize + 1) * BLOCK as usize;
            let content = (index < sequence.sealed).then(|| sequence.tokens[..end].to_vec());
            let shared = contents.insert(block, content.clone());
            assert!(
                shared.is_none_or(|other| other.is_some() && other == content),
                "{sequence:?}: block {index}"
            );
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
                scheduler.computed(chunk, chunk.logits.then_some(token));
            }
            world.absorb(scheduler);
            check_invariants(scheduler);
            !plan.is_empty()
        };
        for happening in happenings {
            let pick = |which: usize, world: &World| world.added.get(which % world.added.len().max(1)).copied();
            match happening {
                Happening::Add { prompt, max_tokens, kind } => {
                    let id = world.added.len() as u64;
                    let work = [Work::Whole, prefill(), decode()][usize::from(kind)].clone();
                    world.added.push(id);
                    // Two families of prompts that begin alike.
                    let tokens = (0..prompt).map(|position| position + 1000 * (prompt % 2)).collect();
                    scheduler.add(NewSequence { prompt: tokens, ..sequence(id, prompt, max_tokens, work) });
                }
                Happening::Cancel(which) => pick(which, &world).into_iter().for_each(|id| scheduler.cancel(SequenceId(id))),
                Happening::Fails(which) => pick(which, &world)
                    .into_iter()
                    .for_each(|id| scheduler.fail(SequenceId(id), ApiError::new(ErrorCode::Internal, "broken"))),
                Happening::CancelStream(stream) => scheduler.cancel_stream(StreamId(stream)),
                Happening::TransferEnds { which, well } => world.end_transfer(&mut scheduler, which, well),
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
                world.end_transfer(&mut scheduler, 0, true);
                world.absorb(&mut scheduler);
            }
        }
        prop_assert_eq!(scheduler.sequences.len(), 0, "stuck: {:?}", scheduler);
        prop_assert_eq!(scheduler.blocks.room(), blocks);
        for id in &world.added {
            prop_assert!(world.told.get(id).is_some_and(|told| told.1), "leg {} never ended", id);
        }
    }
}
