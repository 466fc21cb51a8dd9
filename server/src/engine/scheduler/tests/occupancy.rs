//! What is told of how full the scheduler is.

use super::*;

#[test]
fn what_the_cache_has_of_a_waiting_prompt_is_not_queued() {
    let mut scheduler = scheduler(100);
    let queued = |scheduler: &Scheduler| scheduler.occupancy().queued_prefill_tokens;
    let prompt = sequence(1, 13, 1, Work::Whole).asked.prompt;
    let again = |id| sequence(id, 13, 1, Work::Whole).asking(|asked| asked.prompt = prompt.clone());
    scheduler.add(again(1));
    assert_eq!(queued(&scheduler), 12, "all but the token that is always computed");
    step(&mut scheduler, 5);
    scheduler.add(again(2));
    assert_eq!(queued(&scheduler), 0, "its three full blocks are cached");
    scheduler.add(again(3).asking(|asked| asked.prompt.extend([7; 8])));
    assert_eq!(queued(&scheduler), 8);
    scheduler.add(sequence(4, 13, 1, Work::Whole));
    assert_eq!(queued(&scheduler), 8 + 12);
    step(&mut scheduler, 5);
    let left: u64 = scheduler.sequences.values().map(|sequence| u64::from(sequence.remaining()) - 1).sum();
    assert_eq!(queued(&scheduler), left, "who runs has what it was found to have");
}

#[test]
fn a_preempted_sequence_is_queued_less_what_the_cache_still_has_of_it() {
    let mut scheduler = scheduler(7);
    scheduler.add(sequence(1, 7, 12, Work::Whole));
    scheduler.add(sequence(2, 11, 9, Work::Whole));
    while scheduler.occupancy().counts.preemptions == 0 {
        assert!(!step(&mut scheduler, 1).is_empty(), "nobody is preempted");
    }
    let waiting = &scheduler.sequences[&SequenceId(2)];
    let (state, found, remaining) = (waiting.state, waiting.found, waiting.remaining());
    assert_eq!(state, State::Waiting);
    assert!(found >= 2 * BLOCK, "{found} of {remaining}");
    assert_eq!(scheduler.occupancy().queued_prefill_tokens, u64::from(remaining - found - 1));
}

#[test]
fn a_prompt_of_several_choices_counts_as_many_sequences_from_the_start() {
    let mut scheduler = scheduler(100);
    let told = |scheduler: &Scheduler| {
        let occupancy = scheduler.occupancy();
        (occupancy.running, occupancy.waiting)
    };
    scheduler.add(sequence(10, 20, 5, Work::Whole).asking(|asked| asked.choices = 3));
    assert_eq!(told(&scheduler), (0, 3));
    assert_eq!(step(&mut scheduler, 1), [(10, 0, 16)]);
    assert_eq!(told(&scheduler), (3, 0), "its prompt is half computed");
    step(&mut scheduler, 1);
    assert_eq!(told(&scheduler), (3, 0), "each is a sequence now");
    scheduler.cancel_choices(SequenceId(10), 1..2);
    assert_eq!(told(&scheduler), (2, 0));
    scheduler.add(sequence(20, 4, 5, decode()).asking(|asked| asked.choices = 4));
    assert_eq!(told(&scheduler), (2, 4), "it waits for its cache");
    scheduler.add(sequence(30, 4, 5, prefill()).asking(|asked| asked.choices = 2));
    assert_eq!(told(&scheduler), (2, 5), "its choices part on decode");
}
