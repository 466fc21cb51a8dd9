//! Legs of prefill and of decode, and the cache between them.

use super::*;

#[test]
fn a_decode_leg_without_an_offer_holds_nothing_but_its_place() {
    let mut scheduler = scheduler(8);
    (0..8).for_each(|id| scheduler.add(sequence(id, 4, 4, decode())));
    scheduler.add(sequence(8, 4, 4, Work::Whole));
    assert!(matches!(&ends(&mut scheduler)[..], [(8, LegEnd::Failed(e))] if e.code == ErrorCode::QueueFull));
    assert_eq!((scheduler.occupancy().waiting, scheduler.occupancy().blocks_free), (8, 8));
    assert_eq!(
        scheduler.occupancy().counts.accepted,
        Accepted::default(),
        "it was taken on where it prefills"
    );
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
    assert!(
        matches!(&scheduler.take_effects()[..], [Effect::Offer { offer, .. }] if offer.blocks.len() == 5)
    );
    assert_eq!(step(&mut scheduler, 3), [(1, 16, 4)]);
    assert_eq!(scheduler.take_effects(), [Effect::Seal { id: SequenceId(1), first_tokens: 3.into() }]);
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
    assert!(
        matches!(&scheduler.take_effects()[..], [Effect::Expect { expect, .. }] if expect.blocks.len() == 3)
    );
    scheduler.received(SequenceId(1), &[42]);
    assert_eq!(step(&mut scheduler, 3), [(1, 8, 1)]);
    assert_eq!(step(&mut scheduler, 4), [(1, 9, 1)]);
    let outputs = scheduler.take_outputs();
    let tokens: Vec<_> =
        outputs.iter().map(|(_, update)| (update.first_position, &update.tokens[..])).collect();
    assert_eq!(tokens, [(1, &[3][..]), (2, &[4][..]), (3, &[][..])]);
    assert_eq!(scheduler.occupancy().blocks_free, 8);
}
