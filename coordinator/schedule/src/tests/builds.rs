//! Builds beside each other, as in a rolling upgrade: who is paired with whom.

use super::*;

fn speaks(id: &str, oldest: u32, newest: u32) -> Spec {
    Spec { handoff_protocols: Protocols::between(oldest, newest), ..spec(id) }
}

/// With a rolling upgrade under way: two builds whose caches the other does not understand, and one that speaks with both.
#[test]
fn builds_are_paired_as_far_as_they_understand_each_other() {
    let pair = |prefill: Spec, decode: Spec| {
        let parts = [(prefill, Role::Prefill), (decode, Role::Decode)];
        let fleet = fleet_of(parts.map(|(spec, role)| (spec, role, Load::default())).into());
        chosen(&fleet, &Ledger::default(), &ask(10)).is_ok()
    };
    assert!(pair(speaks("p", 1, 1), speaks("d", 1, 2)));
    assert!(pair(speaks("p", 2, 3), speaks("d", 1, 2)));
    assert!(!pair(speaks("p", 1, 2), speaks("d", 3, 4)));
    // Each with its own, whoever has more room.
    let four = fleet_of(vec![
        (speaks("p1", 1, 1), Role::Prefill, Load::default()),
        (speaks("p2", 2, 2), Role::Prefill, Load { queued_prefill_tokens: 100, ..Load::default() }),
        (speaks("d1", 1, 1), Role::Decode, Load { sequences: 9, ..Load::default() }),
        (speaks("d2", 2, 2), Role::Decode, Load::default()),
    ]);
    let chosen = chosen(&four, &Ledger::default(), &ask(10)).expect("a place");
    assert!([["p1", "d1"], ["p2", "d2"]].contains(&[&*chosen[0], &*chosen[1]]), "{chosen:?}");
    // The one between two with whichever of them is there for it; nobody who comes parts two that understand each other.
    let between = |others: [Spec; 2]| {
        let [first, second] = others.map(|spec| (spec, Role::Decode, Load::default()));
        fleet_of(vec![(speaks("p", 1, 2), Role::Prefill, Load::default()), first, second])
    };
    for unrelated in [speaks("a", 3, 3), speaks("z", 3, 4), speaks("z", 4, 9)] {
        for mate in [speaks("m", 1, 1), speaks("m", 2, 3), speaks("m", 2, 2)] {
            let fleet = between([unrelated.clone(), mate]);
            let chosen = super::chosen(&fleet, &Ledger::default(), &ask(10)).expect("a place");
            assert_eq!(chosen, ["p", "m"]);
        }
    }
}

#[test]
fn who_is_of_several_classes_is_one_candidate() {
    let load = Load::default();
    let four = fleet_of(vec![
        (speaks("p", 1, 3), Role::Prefill, load),
        (speaks("d", 1, 3), Role::Decode, load),
        (speaks("old", 1, 1), Role::Decode, load),
        (speaks("mid", 1, 2), Role::Decode, load),
    ]);
    let (_, receipt) = placed(&four, &Ledger::default(), &ask(10)).expect("a place");
    let mut shown: Vec<_> =
        receipt.cheapest.iter().map(|scored| (scored.instance.to_string(), scored.side)).collect();
    let all = shown.len();
    shown.sort_by_key(|(name, side)| (name.clone(), format!("{side:?}")));
    shown.dedup();
    assert_eq!(shown.len(), all, "{shown:?}");
    // Nobody lacks a partner; both are too small.
    let small = Load { kv_blocks_total: 2, kv_blocks_free: 2, ..Load::default() };
    let two = fleet_of(vec![
        (speaks("p", 1, 1), Role::Prefill, small),
        (speaks("d", 1, 2), Role::Decode, Load::default()),
    ]);
    assert_eq!(chosen(&two, &Ledger::default(), &ask(32)), Err(NoPlace::TooLarge(32)));
}

/// Of two that are drawn the emptier is taken: the fullest never, unless it were drawn twice, as it is of several classes.
#[test]
fn who_is_of_several_classes_is_drawn_once() {
    let busy = Load { sequences: 9, ..Load::default() };
    let idle = |id: &str, version| (speaks(id, version, version), Role::Prefill, Load::default());
    let four =
        fleet_of(vec![(speaks("busy", 1, 3), Role::Prefill, busy), idle("a", 1), idle("b", 2), idle("c", 3)]);
    let view = view(&four, &Ledger::default());
    let settings = Settings { policy: Policy::PowerOfTwo, ..SETTINGS };
    for nth in 0..100 {
        let ask = Ask { nth, ..ask_for(Wanted::new(10, 1, "r1")) };
        let (placement, _) = choose::choose(&view, &ask, &settings, Instant::now()).expect("a place");
        assert!(
            matches!(&placement, Placement::Alone(assignee) if assignee.instance.as_str() != "busy"),
            "{nth}"
        );
    }
}
