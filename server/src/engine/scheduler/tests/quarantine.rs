//! Damage and logits that are not numbers: what is found afterwards, and what becomes of those who share the prompt.

use std::collections::HashSet;

use super::*;
use crate::engine::blocks::CacheChange;

/// A prompt of `shared` tokens that many begin with, then five of its own.
fn story(id: u64, shared: u32, work: Work) -> NewSequence {
    let prompt = (0..shared).chain((0..5).map(|i| 1000 * id as u32 + i)).collect();
    sequence(id, 1, 12, work).asking(|asked| asked.prompt = prompt)
}

fn damaged() -> Result<(), ApiError> {
    Err(ApiError::new(ErrorCode::KvDamaged, "a block arrived damaged"))
}

/// What of a prompt can be found.
fn found(scheduler: &mut Scheduler, prompt: NewSequence) -> u32 {
    let mut sequence = Sequence::new(prompt, 0, 64, 400);
    scheduler.blocks.find(usable_hashes(&mut sequence, scheduler.root, &scheduler.limits)).blocks
}

fn failed(scheduler: &mut Scheduler) -> Vec<(u64, ErrorCode)> {
    let failed = |(leg, end)| match end {
        LegEnd::Failed(error) => Some((leg, error.code)),
        LegEnd::Finished { .. } => None,
    };
    let mut failed: Vec<_> = ends(scheduler).into_iter().filter_map(failed).collect();
    failed.sort_by_key(|failed| failed.0);
    failed
}

fn closed(scheduler: &mut Scheduler) -> Vec<u64> {
    let effects = scheduler.take_effects().into_iter();
    let closed = effects.filter_map(|effect| match effect {
        Effect::Close { id, needed } => Some((id.0, needed)),
        _ => None,
    });
    let mut closed: Vec<_> = closed.inspect(|(_, needed)| assert!(needed)).map(|(id, _)| id).collect();
    closed.sort_unstable();
    closed
}

/// Starts a decode leg's reception.
fn receive(scheduler: &mut Scheduler, new: NewSequence) {
    let id = new.id;
    scheduler.add(new);
    scheduler.offered(id, Ok(()));
    scheduler.schedule();
}

#[test]
fn what_others_computed_behind_a_damaged_prompt_is_not_found_once_it_was_computed_again() {
    let mut scheduler = scheduler(100);
    for id in [1, 2] {
        scheduler.add(story(id, 12, Work::Whole));
        while !step(&mut scheduler, 7).is_empty() {}
    }
    assert_eq!(found(&mut scheduler, story(2, 12, Work::Whole)), 4, "three shared blocks and one of its own");
    receive(&mut scheduler, story(3, 12, decode()));
    scheduler.transfer_ended(SequenceId(3), damaged());
    assert_eq!(failed(&mut scheduler), [(3, ErrorCode::KvDamaged)]);
    let mut told = HashSet::new();
    for change in scheduler.take_cache_changes() {
        assert!(match change {
            CacheChange::Stored(hash) => told.insert(hash),
            CacheChange::Evicted(hash) => told.remove(&hash),
        });
    }
    assert_eq!((scheduler.occupancy().blocks_cached, told), (0, HashSet::new()), "what readers know");
    scheduler.add(story(4, 12, Work::Whole));
    step(&mut scheduler, 7);
    assert_eq!(found(&mut scheduler, story(2, 12, Work::Whole)), 3);
}

#[test]
fn who_runs_on_a_damaged_prompt_is_computed_again_and_nothing_of_before_is_found() {
    let mut scheduler = scheduler(100);
    scheduler.add(story(1, 12, Work::Whole));
    step(&mut scheduler, 7);
    step(&mut scheduler, 7);
    scheduler.add(story(2, 12, Work::Whole));
    scheduler.add(sequence(9, 6, 12, Work::Whole));
    step(&mut scheduler, 7);
    receive(&mut scheduler, story(3, 12, decode()));
    scheduler.transfer_ended(SequenceId(3), damaged());
    assert_eq!(
        failed(&mut scheduler),
        [(3, ErrorCode::KvDamaged)],
        "who can be computed again does not fail"
    );
    assert_eq!(scheduler.running, [SequenceId(9)]);
    assert_eq!(scheduler.waiting, [SequenceId(1), SequenceId(2)]);
    assert_eq!(scheduler.occupancy().counts.preemptions, 0);
    let plan = step(&mut scheduler, 7);
    assert_eq!(plan[..2], [(9, 6, 1), (1, 0, 12)], "not from its first token");
    while !step(&mut scheduler, 7).is_empty() {}
    let finished = |end: &LegEnd| matches!(end, LegEnd::Finished { completion_tokens: 12, .. });
    let ends = ends(&mut scheduler);
    assert!(ends.len() == 3 && ends.iter().all(|(_, end)| finished(end)), "{ends:?}");
    assert_eq!(found(&mut scheduler, story(2, 12, Work::Whole)), 4);
    assert_eq!(scheduler.occupancy().blocks_free, 100);
}

#[test]
fn caches_of_a_damaged_prompt_that_are_on_their_way_are_given_up_to_be_placed_again() {
    let mut scheduler = scheduler(100);
    scheduler.add(story(1, 8, Work::Whole));
    while !step(&mut scheduler, 7).is_empty() {}
    ends(&mut scheduler);
    // One is handed on, one still computed, one received; one more has nothing to do with them.
    scheduler.add(story(2, 8, prefill()));
    step(&mut scheduler, 7);
    receive(&mut scheduler, story(3, 8, decode()));
    receive(&mut scheduler, sequence(4, 8, 12, decode()));
    scheduler.add(story(6, 8, prefill()));
    step(&mut scheduler, 7);
    scheduler.add(story(5, 40, prefill()));
    step(&mut scheduler, 7);
    let state = |scheduler: &Scheduler, id| scheduler.sequences[&SequenceId(id)].state;
    assert_eq!(
        [2, 3, 5].map(|id| state(&scheduler, id)),
        [State::HandingOff, State::Receiving, State::Running]
    );
    scheduler.take_effects();
    scheduler.transfer_ended(SequenceId(6), damaged());
    let given_up = [2, 3, 5].map(|id| (id, ErrorCode::Unavailable));
    assert_eq!(failed(&mut scheduler), [&given_up[..], &[(6, ErrorCode::KvDamaged)]].concat());
    assert_eq!(closed(&mut scheduler), [2, 3, 5]);
    assert_eq!(state(&scheduler, 4), State::Receiving);
    // What they hold is not reused before the transports have let go of it, and nobody can take it.
    assert_eq!(found(&mut scheduler, story(2, 8, Work::Whole)), 0);
    assert!(scheduler.occupancy().blocks_free < 100 - 10);
    for id in [2, 3, 5] {
        scheduler.transfer_ended(SequenceId(id), Err(ApiError::new(ErrorCode::Cancelled, "closed")));
    }
    scheduler.cancel(SequenceId(4));
    scheduler.transfer_ended(SequenceId(4), Err(ApiError::new(ErrorCode::Cancelled, "closed")));
    assert_eq!((scheduler.occupancy().blocks_free, scheduler.occupancy().blocks_cached), (100, 0));
}

#[test]
fn who_shares_a_prompt_with_logits_that_are_not_numbers_goes_on_and_seals_nothing_more() {
    let mut scheduler = scheduler(100);
    scheduler.add(story(1, 12, Work::Whole));
    step(&mut scheduler, 7);
    step(&mut scheduler, 7);
    scheduler.add(story(2, 12, Work::Whole));
    let plan = scheduler.schedule();
    scheduler.fail_damaged(SequenceId(2), ApiError::new(ErrorCode::Internal, "not numbers"));
    let others = plan.iter().filter(|chunk| chunk.id != SequenceId(2));
    others.for_each(|chunk| computed(&mut scheduler, chunk, 7));
    assert_eq!(failed(&mut scheduler), [(2, ErrorCode::Internal)]);
    assert_eq!(scheduler.running, [SequenceId(1)]);
    while !step(&mut scheduler, 7).is_empty() {}
    assert!(matches!(ends(&mut scheduler)[..], [(1, LegEnd::Finished { completion_tokens: 12, .. })]));
    assert_eq!(scheduler.occupancy().blocks_cached, 0);
}

#[test]
fn a_leg_whose_peer_has_gone_is_placed_again() {
    for work in [prefill(), decode()] {
        let mut scheduler = scheduler(100);
        receive(&mut scheduler, sequence(1, 8, 12, work));
        scheduler
            .transfer_ended(SequenceId(1), Err(ApiError::new(ErrorCode::Cancelled, "the peer's leg ended")));
        assert_eq!(failed(&mut scheduler), [(1, ErrorCode::HandoffFailed)]);
    }
}
