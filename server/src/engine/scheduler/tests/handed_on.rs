//! Legs that are to hand on what is cached here, and nothing else.

use super::*;

/// To hand on what sequence `of` has: its prompt, and what was generated.
fn handing_on(id: u64, of: &NewSequence, generated: &[u32]) -> NewSequence {
    sequence(id, 1, 60, hands_on()).asking(|asked| {
        (asked.prompt, asked.generated) = (of.asked.prompt.clone(), generated.to_vec());
    })
}

fn refused(scheduler: &mut Scheduler, id: u64) -> bool {
    match &ends(scheduler)[..] {
        [] => false,
        [(leg, LegEnd::Failed(error))] if *leg == id => error.code == ErrorCode::Unavailable,
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_shares_the_blocks_of_what_still_runs_and_computes_the_last_of_them_alone() {
    for generated in 1..12 {
        let mut scheduler = scheduler(20);
        let first = sequence(1, 6, 40, Work::Whole);
        scheduler.add(handing_on(9, &first, &[]));
        assert!(refused(&mut scheduler, 9), "nobody has computed it");
        assert_eq!(scheduler.occupancy().counts.accepted, Accepted::default());
        scheduler.add(sequence(1, 6, 40, Work::Whole));
        (0..generated).for_each(|_| drop(step(&mut scheduler, 5)));
        let shared = (6 + generated - 1) / BLOCK * BLOCK;
        scheduler.add(handing_on(2, &first, &vec![5; generated as usize]));
        scheduler.cancel(SequenceId(1));
        ends(&mut scheduler);
        assert_eq!(step(&mut scheduler, 5), [(2, shared, 6 + generated - shared)], "after {generated}");
        let effects = scheduler.take_effects();
        assert!(
            matches!(&effects[..], [Effect::Offer { offer, .. }, Effect::Seal { .. }] if offer.cached == shared / BLOCK)
        );
        scheduler.transfer_ended(SequenceId(2), Ok(()));
        assert_eq!(scheduler.occupancy().blocks_free, 20);
    }
}

#[test]
fn what_is_evicted_while_it_waits_is_refused_then() {
    let mut scheduler = scheduler(7);
    let first = sequence(1, 12, 1, Work::Whole);
    scheduler.add(sequence(1, 12, 1, Work::Whole));
    step(&mut scheduler, 5);
    (2..6).for_each(|id| scheduler.add(sequence(id, 1, 40, Work::Whole)));
    step(&mut scheduler, 5);
    ends(&mut scheduler);
    scheduler.add(handing_on(9, &first, &[5]));
    step(&mut scheduler, 5);
    assert!(!refused(&mut scheduler, 9), "it waits for a seat");
    while scheduler.blocks.evictions() == 0 {
        step(&mut scheduler, 5);
    }
    assert!(!refused(&mut scheduler, 9));
    (2..6).for_each(|id| scheduler.cancel(SequenceId(id)));
    ends(&mut scheduler);
    // Two of its three blocks are there, and five tokens of it are not.
    assert_eq!(step(&mut scheduler, 5), []);
    assert!(refused(&mut scheduler, 9));
    assert_eq!(scheduler.take_effects(), []);
    assert_eq!(scheduler.occupancy().blocks_free, 7);
}
