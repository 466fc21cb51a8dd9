//! Tables for the planning rules; `histories` holds the property.

use std::{sync::LazyLock, time::Duration};

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, LegId, RequestId, TransferId};

use super::{occupancy::Accepted, *};
use crate::engine::{
    sampler::SamplingParams,
    sequence::{Asked, FinishReason, LegEnd, NewSequence, Sampled, StopRule, StreamId},
};

mod admission;
mod choices;
mod handed_on;
mod handoffs;
mod histories;
mod occupancy;
mod quarantine;

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
    prefill_to(false)
}

/// To hand on what is cached, and nothing else.
fn hands_on() -> Work {
    prefill_to(true)
}

fn prefill_to(hand_on: bool) -> Work {
    Work::Prefill(Outbound {
        transfer: TransferId::from_bytes([7; 16]),
        receiver: InstanceId::new("d").expect("a name"),
        receiver_incarnation: Incarnation(1),
        endpoint: "127.0.0.1:1".into(),
        hand_on,
    })
}

fn decode() -> Work {
    Work::Decode(Inbound {
        transfer: TransferId::from_bytes([7; 16]),
        sender: InstanceId::new("p").expect("a name"),
        sender_incarnation: Incarnation(1),
    })
}

/// When all want their first token that do not say otherwise.
static WANTED: LazyLock<Instant> = LazyLock::new(Instant::now);

fn sequence(id: u64, prompt: u32, max_tokens: u32, work: Work) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        address: Address { stream: StreamId(id % 2), leg: LegId(id) },
        asked: Asked {
            request: RequestId::adopt("test"),
            choices: 1,
            prompt: (0..prompt).map(|position| position + 1000 * id as u32).collect(),
            generated: Vec::new(),
            sampling: SamplingParams::GREEDY,
            stop: StopRule { max_tokens, stop_tokens: vec![99] },
            top_logprobs: None,
            priority: 0,
            work,
            tokens_at_a_time: 1,
        },
        wanted: *WANTED,
        deadline: None,
        permit: None,
        span: tracing::Span::none(),
    }
}

impl NewSequence {
    fn asking(mut self, change: impl FnOnce(&mut Asked)) -> Self {
        change(&mut self.asked);
        self
    }
}

/// The same token for each choice.
fn sampled(scheduler: &Scheduler, chunk: &Chunk, token: u32) -> Vec<Sampled> {
    let of = |choice| Sampled { choice, token, logprobs: None };
    let choices = scheduler.sequences[&chunk.id].sampled_choices();
    choices.into_iter().filter(|_| chunk.logits).map(of).collect()
}

fn computed(scheduler: &mut Scheduler, chunk: &Chunk, token: u32) {
    let sampled = sampled(scheduler, chunk, token);
    scheduler.computed(chunk, sampled);
}

/// Runs one step; every sampled token is `token`.
fn step(scheduler: &mut Scheduler, token: u32) -> Vec<(u64, u32, u32)> {
    let plan = scheduler.schedule();
    for chunk in &plan {
        computed(scheduler, chunk, token);
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
    step(&mut scheduler, 5);
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
        step(&mut scheduler, 5);
        scheduler.offered(SequenceId(1), Ok(()));
        step(&mut scheduler, 5);
        if scheduler.occupancy().receiving == 1 {
            scheduler.received(SequenceId(1), &[5]);
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
    let Accepted { requests, prompt_tokens, choices } = scheduler.occupancy().counts.accepted;
    assert_eq!((requests, prompt_tokens, choices), (8, 32, 8), "who is turned away is not taken on");
    let mut scheduler = self::scheduler(100);
    scheduler.add(sequence(9, 4, 4, Work::Whole).asking(|asked| asked.generated = vec![1, 2]));
    assert_eq!(scheduler.occupancy().counts.accepted, Accepted::default(), "who goes on came before");
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

#[test]
fn of_one_priority_whoever_is_wanted_sooner_is_served_first() {
    let mut scheduler = scheduler(4);
    let within = |id, seconds| {
        let wanted = *WANTED + Duration::from_secs(seconds);
        NewSequence { wanted, ..sequence(id, 7, 1, Work::Whole) }
    };
    scheduler.add(within(1, 0));
    assert_eq!(step(&mut scheduler, 1), [(1, 0, 7)]);
    for (id, seconds) in [(2, 30), (3, 10), (4, 10)] {
        scheduler.add(within(id, seconds));
    }
    scheduler.add(within(5, 60).asking(|asked| asked.priority = -1));
    assert_eq!(scheduler.waiting, [5, 3, 4, 2].map(SequenceId));
}

#[test]
fn rank_decides_who_is_admitted_and_who_is_preempted() {
    let mut scheduler = scheduler(6);
    let with = |id, priority| sequence(id, 7, 9, Work::Whole).asking(|asked| asked.priority = priority);
    scheduler.add(with(1, 5));
    assert_eq!(step(&mut scheduler, 1), [(1, 0, 7)]);
    // Two wait, and the later one is more urgent; both are more urgent than the one that runs.
    scheduler.add(with(2, 0));
    scheduler.add(with(3, -1));
    assert_eq!(step(&mut scheduler, 1), [(1, 7, 1), (3, 0, 7)]);
    assert_eq!(scheduler.waiting, [SequenceId(2)]);
    // Each needs a third block, and there are two.
    assert_eq!(step(&mut scheduler, 1), [(3, 7, 1), (1, 8, 1)]);
    assert_eq!(step(&mut scheduler, 1), [(3, 8, 1), (1, 9, 1)]);
    let mut ended = Vec::new();
    while !step(&mut scheduler, 1).is_empty() {
        ended.extend(ends(&mut scheduler).into_iter().map(|(id, _)| id));
    }
    assert_eq!(ended, [3, 2, 1]);
    assert!(scheduler.occupancy().counts.preemptions > 0);
}

#[test]
fn a_preempted_sequence_goes_on_from_what_is_still_cached() {
    let mut scheduler = scheduler(7);
    scheduler.add(sequence(1, 7, 12, Work::Whole));
    scheduler.add(sequence(2, 11, 9, Work::Whole));
    let mut again = Vec::new();
    loop {
        let preempted = scheduler.occupancy().counts.preemptions > 0;
        let plan = step(&mut scheduler, 1);
        if plan.is_empty() {
            break;
        }
        again.extend(plan.into_iter().filter(|(id, _, tokens)| preempted && *id == 2 && *tokens > 1));
    }
    let (counts, ended) = (scheduler.occupancy().counts, ends(&mut scheduler));
    assert_eq!((counts.preemptions, again.len(), ended.len()), (1, 1, 2));
    let (_, start, _) = again[0];
    assert!(start > 0, "all of it was computed again");
    assert_eq!((counts.prefix_hit_tokens, counts.prefix_miss_tokens), (0, 18), "prompts count once");
    for (_, end) in ended {
        assert!(matches!(end, LegEnd::Finished { cached_tokens: 0, .. }), "{end:?}");
    }
}

/// (leg's choice, first position, tokens, whether it has ended), as told since the last call.
fn told(scheduler: &mut Scheduler) -> Vec<(u32, u32, Vec<u32>, bool)> {
    let outputs = scheduler.take_outputs().into_iter();
    outputs.map(|(_, u)| (u.choice, u.first_position, u.tokens, u.end.is_some())).collect()
}

#[test]
fn tokens_that_nobody_reads_yet_are_told_many_at_a_time() {
    let mut scheduler = scheduler(20);
    let in_threes =
        |id, max_tokens| sequence(id, 4, max_tokens, Work::Whole).asking(|asked| asked.tokens_at_a_time = 3);
    scheduler.add(in_threes(1, 6));
    (1..=6).for_each(|token| assert_eq!(step(&mut scheduler, token).len(), 1));
    let expected = [(0, 0, vec![1], false), (0, 1, vec![2, 3, 4], false), (0, 4, vec![5, 6], true)];
    assert_eq!(told(&mut scheduler), expected);
    // What ends it early is told with what there is.
    scheduler.add(in_threes(2, 6));
    (1..=3).for_each(|token| assert_eq!(step(&mut scheduler, token).len(), 1));
    scheduler.cancel(SequenceId(2));
    assert_eq!(told(&mut scheduler), [(0, 0, vec![1], false), (0, 1, vec![2, 3], true)]);
    // Each of several choices for itself.
    scheduler.add(in_threes(3, 3).asking(|asked| asked.choices = 2));
    while !step(&mut scheduler, 5).is_empty() {}
    let mut choices = told(&mut scheduler);
    choices.sort_by_key(|told| told.0);
    let of = |choice| [(choice, 0, vec![5], false), (choice, 1, vec![5, 5], true)];
    assert_eq!(choices, [of(0), of(1)].concat());
}
