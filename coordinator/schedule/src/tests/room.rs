//! Instances where as many wait as may.

use std::num::NonZeroU32;

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
        let board = board::Board::new(Duration::from_secs(1), Settings { policy, ..Settings::APART });
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
            assert_eq!(booking.credit.pair().prefill.as_str(), "b", "{policy:?}");
        }
    }

    let (wanted, board) =
        (Wanted::new(100, 8, "r1"), board::Board::new(Duration::from_secs(1), Settings::APART));
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
    let next = receipt.runner_up.expect("there is another");
    assert_eq!((next.prefill.as_str(), next.decode.as_str()), ("q", "d"));
    assert!(next.cost_micros > receipt.cost_micros && receipt.cost_micros >= receipt.handoff_micros);

    // What has been sent there since counts at once, until it has told its load again.
    let board = board::Board::new(Duration::from_secs(1), Settings::APART);
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
    // It counts requests, however many answers one wants.
    drop(held.pop());
    let _several = board.book(&Wanted { choices: 4, ..wanted }).expect("there is room");
    let _last = board.book(&wanted).expect("there is room for another");
    assert_eq!(board.book(&wanted).err(), Some(NoPlace::Busy));
}

#[test]
fn who_decodes_as_many_as_it_may_is_waited_for() {
    let none = Ledger::default();
    let steps = Load { decode_step_micros: 50_000, ..Load::default() };
    let of = |sequences, most: Option<u32>| Load {
        sequences,
        sequences_most: most.and_then(NonZeroU32::new),
        ..steps
    };
    let fleet = |d0, d1| {
        let (p, d) = ((spec("p"), Role::Prefill, Load::default()), |id, load| (spec(id), Role::Decode, load));
        fleet_of(vec![d("d0", d0), d("d1", d1), p])
    };
    let among = |among| Ask { wanted: Wanted { among, ..Wanted::new(100, 64, "r1") }, ..ask(100) };
    let roomy = |fleet: &Fleet| chosen(fleet, &none, &among(Among::Roomy));
    // An answer takes some steps of at least 50 ms, and 4,000 behind 64 wait for 62 answers.
    let busy = fleet(of(4_064, Some(64)), of(4_064, Some(64)));
    assert_eq!(roomy(&busy), Err(NoPlace::Busy));
    assert!(chosen(&busy, &none, &among(Among::All)).is_ok(), "there is nobody else");
    assert!(chosen(&busy, &none, &among(Among::Waiting)).is_ok(), "it waits there");
    let shut = |waiting_room| Load { waiting_room: Some(waiting_room), ..of(4_064, Some(64)) };
    assert!(chosen(&fleet(shut(0), shut(1)), &none, &among(Among::Waiting)).is_ok());
    assert_eq!(chosen(&fleet(shut(0), shut(0)), &none, &among(Among::Waiting)), Err(NoPlace::Busy));
    assert!(
        roomy(&fleet(of(4_064, None), of(4_064, None))).is_ok(),
        "one of an earlier version does not say"
    );
    assert!(roomy(&fleet(of(4_064, Some(4_064)), of(4_064, Some(4_064)))).is_ok(), "a place is free soon");
    assert!(roomy(&fleet(of(4_064, Some(64)), of(63, Some(64)))).is_ok(), "a place is free");
    // A step is of those that are decoded, however many wait.
    let tpot = |sequences, most| {
        let load = Load { decode_step_micros: 0, ..of(sequences, most) };
        let d = [(spec("d"), Role::Decode, load), (spec("p"), Role::Prefill, Load::default())];
        let receipt = placed(&fleet_of(d.to_vec()), &none, &ask(100)).expect("a place").1;
        receipt.cheapest.iter().map(|scored| scored.tpot_micros).max()
    };
    assert_eq!(tpot(4_064, Some(64)), tpot(64, Some(64)));
    assert!(tpot(64, Some(64)) > tpot(8, Some(64)));
    // It is others' answers that are waited for, however short its own is.
    let short = Ask { wanted: Wanted { among: Among::Roomy, ..Wanted::new(100, 2, "r1") }, ..ask(100) };
    assert_eq!(chosen(&busy, &none, &short), Err(NoPlace::Busy));
    // Nobody waits for more than those that are there.
    let all = |choices| {
        let wanted = Wanted { choices, among: Among::Roomy, ..Wanted::new(100, 1 << 20, "r1") };
        Ask { expected_tokens: 1 << 20, wanted, ..ask(100) }
    };
    let of_64 = |sequences| fleet(of(sequences, Some(64)), of(sequences, Some(64)));
    assert!(chosen(&of_64(0), &none, &all(64)).is_ok());
    assert_eq!(chosen(&of_64(64), &none, &all(64)), Err(NoPlace::Busy));
    // And whoever never decodes so many at a time is given none of it.
    assert_eq!(chosen(&of_64(0), &none, &all(65)), Err(NoPlace::TooManyChoices(65)));
    let larger = fleet(of(0, Some(64)), of(9, Some(128)));
    assert_eq!(chosen(&larger, &none, &all(65)), Ok(vec!["p".to_owned(), "d1".to_owned()]));
}
