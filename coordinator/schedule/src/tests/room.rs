//! Instances where as many wait as may.

use super::*;

#[test]
fn who_lets_nobody_wait_any_more_is_asked_last() {
    let none = Ledger::default();
    let room = |waiting_room| Load { waiting_room, ..Load::default() };
    let pair = |of_p, of_d| {
        let (p, d) = ((spec("p"), Role::Prefill, room(of_p)), (spec("d"), Role::Decode, room(of_d)));
        fleet_of(vec![
            p,
            d,
            (spec("q"), Role::Prefill, Load { queued_prefill_tokens: 9_000, ..room(Some(1)) }),
        ])
    };
    let through = |id: &str| Ok(vec![id.to_owned(), "d".to_owned()]);
    assert_eq!(chosen(&pair(None, None), &none, &ask(100)), through("p"));
    assert_eq!(chosen(&pair(Some(1), Some(1)), &none, &ask(100)), through("p"));
    assert_eq!(chosen(&pair(Some(0), Some(1)), &none, &ask(100)), through("q"));
    // They would be refused, and take that for what it is.
    assert_eq!(chosen(&pair(Some(1), Some(0)), &none, &ask(100)), through("p"));
    let roomy = |fleet: &Fleet| {
        let wanted = Wanted { among: Among::Roomy, ..Wanted::new(100, 8, "r1") };
        let ask = Ask { wanted, ..ask(100) };
        chosen(fleet, &none, &ask)
    };
    assert_eq!(roomy(&pair(Some(1), Some(1))), through("p"));
    assert_eq!(roomy(&pair(Some(0), Some(1))), through("q"));
    assert_eq!(roomy(&pair(Some(1), Some(0))), Err(NoPlace::Busy));
    // What is lacking is told all the same.
    let only = fleet_of(vec![(spec("p"), Role::Prefill, room(Some(0)))]);
    assert_eq!(roomy(&only), Err(NoPlace::NoDecode));

    for policy in [Policy::PowerOfTwo, Policy::LeastLoad, Policy::RoundRobin] {
        let board = board::Board::with(Duration::from_secs(1), Settings { policy, ..Settings::DEFAULT });
        let all = ["a", "b", "c"].map(spec);
        board.list(&all, Instant::now());
        for of in &all {
            board.up(&of.id, of.incarnation, ready(Role::Mixed));
            let has_room = of.id.as_str() == "b";
            // It has most to do, too.
            let sequences = if has_room { 5 } else { 0 };
            board.load(&of.id, Load { sequences, ..room(Some(if has_room { 1_000 } else { 0 })) });
        }
        for _ in 0..20 {
            let booking = board.book(&Wanted::new(100, 8, "r1")).expect("a place");
            assert_eq!(booking.credit.pair().0.as_str(), "b", "{policy:?}");
        }
    }

    let (wanted, board) =
        (Wanted::new(100, 8, "r1"), board::Board::with(Duration::from_secs(1), Settings::DEFAULT));
    let all = [
        (spec("bad"), Role::Decode, room(None)),
        (spec("d"), Role::Decode, room(None)),
        (spec("full"), Role::Decode, room(Some(0))),
        (spec("p"), Role::Prefill, room(Some(1))),
        (spec("q"), Role::Prefill, Load { queued_prefill_tokens: 9_000, ..room(None) }),
        (spec("small"), Role::Decode, Load { kv_blocks_total: 2, ..room(None) }),
    ];
    board.list(&all.each_ref().map(|(of, ..)| of.clone()), Instant::now());
    for (of, role, load) in all {
        board.up(&of.id, of.incarnation, ready(role));
        board.load(&of.id, load);
    }
    let bad = [spec("bad").id];
    let receipt = board.book(&Wanted { avoid: &bad, ..wanted }).expect("a place").receipt;
    assert_eq!(receipt.left_aside, LeftAside { away: 0, avoided: 1, full: 1, too_small: 1 });
    let (prefill, decode, cost) = receipt.runner_up.expect("there is another");
    assert_eq!((prefill.as_str(), decode.as_str()), ("q", "d"));
    assert!(cost > receipt.cost_micros && receipt.cost_micros >= receipt.handoff_micros);

    // What has been sent there since counts at once, until it has told its load again.
    let board = board::Board::with(Duration::from_secs(1), Settings::DEFAULT);
    let mixed = spec("m");
    board.list(std::slice::from_ref(&mixed), Instant::now());
    board.up(&mixed.id, mixed.incarnation, ready(Role::Mixed));
    board.load(&mixed.id, room(Some(2)));
    let wanted = Wanted { among: Among::Roomy, ..Wanted::new(1, 8, "r1") };
    let mut held: Vec<_> = (0..2).map(|_| board.book(&wanted).expect("there is room")).collect();
    assert_eq!(board.book(&wanted).err(), Some(NoPlace::Busy));
    assert_eq!(board.can_serve("r1"), Ok(()), "it is busy, and there");
    held.pop();
    assert!(board.book(&wanted).is_ok());
}
