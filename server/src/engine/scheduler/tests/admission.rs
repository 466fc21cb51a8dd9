//! Who is admitted past those that wait for tokens of a step.

use super::*;

/// Adds decode legs whose caches have been offered.
fn offered(scheduler: &mut Scheduler, legs: impl IntoIterator<Item = (u64, u32)>) {
    for (id, prompt) in legs {
        scheduler.add(sequence(id, prompt, 4, decode()));
        scheduler.offered(SequenceId(id), Ok(()));
    }
}

/// Which caches may come since the last call.
fn expected(scheduler: &mut Scheduler) -> Vec<u64> {
    let effects = scheduler.take_effects().into_iter();
    let expects = |effect| match effect {
        Effect::Expect { id, .. } => Some(id.0),
        _ => None,
    };
    effects.filter_map(expects).collect()
}

#[test]
fn a_cache_is_received_while_prompts_take_every_token_of_a_step() {
    for prompt in [32, 28] {
        let mut scheduler = scheduler(100);
        scheduler.add(sequence(1, prompt, 4, Work::Whole));
        scheduler.add(sequence(2, 8, 4, Work::Whole));
        offered(&mut scheduler, [(3, 8)]);
        assert_eq!(step(&mut scheduler, 1), [(1, 0, 16)]);
        assert_eq!((expected(&mut scheduler), &scheduler.waiting), (vec![3], &[SequenceId(2)].into()));
    }
}

#[test]
fn nobody_else_begins_before_the_first_that_waits_for_tokens() {
    let mut scheduler = scheduler(100);
    scheduler.add(sequence(1, 14, 4, Work::Whole));
    scheduler.add(sequence(2, 8, 4, Work::Whole));
    scheduler.add(sequence(3, 2, 4, Work::Whole));
    offered(&mut scheduler, [(4, 8)]);
    // The two tokens that are left are less than a block of the second, and all of the third.
    assert_eq!(step(&mut scheduler, 1), [(1, 0, 14)]);
    assert_eq!(expected(&mut scheduler), [4]);
    assert_eq!(step(&mut scheduler, 1), [(1, 14, 1), (2, 0, 8), (3, 0, 2)]);
}

#[test]
fn those_passed_over_are_left_their_seats() {
    let mut scheduler = scheduler(100);
    scheduler.add(sequence(1, 32, 4, Work::Whole));
    scheduler.add(sequence(2, 8, 4, Work::Whole).asking(|asked| asked.choices = 2));
    offered(&mut scheduler, [(4, 8), (5, 8)]);
    step(&mut scheduler, 1);
    assert_eq!(expected(&mut scheduler), [4], "of four seats one is to spare");
    step(&mut scheduler, 1);
    assert_eq!(step(&mut scheduler, 1), [(1, 32, 1), (2, 0, 8)]);
    assert!(expected(&mut scheduler).is_empty());
}

#[test]
fn those_passed_over_are_left_their_blocks() {
    // Eight are the first prompt's, and one is left for it to grow; of the second's there are three, and one likewise.
    for (blocks, admitted) in [(15, vec![]), (16, vec![3]), (19, vec![3]), (20, vec![3, 4])] {
        let mut scheduler = scheduler(blocks);
        scheduler.add(sequence(1, 31, 4, Work::Whole));
        scheduler.add(sequence(2, 12, 4, Work::Whole));
        offered(&mut scheduler, [(3, 8), (4, 8)]);
        step(&mut scheduler, 1);
        assert_eq!(expected(&mut scheduler), admitted, "of {blocks}");
        step(&mut scheduler, 1);
        assert_eq!(step(&mut scheduler, 1), [(1, 31, 1), (2, 0, 12)], "of {blocks}");
    }
}
