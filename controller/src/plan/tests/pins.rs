//! Pinned instances: each has its role, unless a phase would be left to nobody.

use super::*;

/// A fleet as `fleet` reads it, and pins in the same order: P, D, M, or . for none.
fn pinned(roles: &str, pins: &str) -> Vec<(Given, Option<Role>)> {
    let pin = |letter| match letter {
        'P' => Some(Role::Prefill),
        'D' => Some(Role::Decode),
        'M' => Some(Role::Mixed),
        _ => None,
    };
    fleet(roles).into_iter().zip(pins.chars().map(pin)).collect()
}

fn decide_pinned(ratio: Ratio, fleet: &[(Given, Option<Role>)]) -> BTreeMap<InstanceId, Decision> {
    let candidates: Vec<_> = fleet
        .iter()
        .map(|(given, pin)| Candidate {
            spec: &given.spec,
            role: given.role,
            serving: given.serving,
            pin: pin.map(|role| (role, "alice")),
        })
        .collect();
    let decisions = plan(Policy::Ratio(ratio), &candidates);
    decisions.into_iter().map(|(id, decision)| (id.clone(), decision)).collect()
}

fn roles(decisions: &BTreeMap<InstanceId, Decision>) -> BTreeMap<InstanceId, Role> {
    decisions.iter().map(|(id, decision)| (id.clone(), decision.role)).collect()
}

#[test]
fn the_pinned_have_their_roles_and_the_others_make_up_the_ratio() {
    for (held, pins, expected) in [
        ("----", "D...", "dppd"),
        ("ppdd", "D..P", "dpdp"),
        ("pd", "DP", "dp"),
        // More are pinned to prefill than the ratio wants.
        ("pddd", "PPP.", "pppd"),
        // Somebody has to decode: who does so already, of those who may.
        ("pdpp", "PPPP", "pdpp"),
        ("pppp", "PPPP", "pppd"),
        // One that is mixed serves both phases, so the others may be of one kind.
        ("pd", "M.", "md"),
        ("pdd", "MDD", "mdd"),
        ("pd", "MM", "mm"),
        // Alone it serves both phases, whatever it is pinned to.
        ("p", "D", "m"),
    ] {
        let decided = roles(&decide_pinned(ratio(1, 1), &pinned(held, pins)));
        assert_eq!(letters(&decided), expected, "{held} with {pins}");
    }
}

#[test]
fn a_pin_says_who_wanted_it_and_when_it_gave_way() {
    let reason = |held, pins, of: &str| {
        let decisions = decide_pinned(ratio(1, 1), &pinned(held, pins));
        decisions[&InstanceId::new(of).expect("a good id")].reason.clone()
    };
    assert_eq!(reason("--", "D.", "i00"), "pinned to decode by alice");
    assert_eq!(reason("pp", "PP", "i01"), "pinned to prefill by alice, but nobody else could be decode");
    assert!(reason("p", "D", "i00").ends_with("; pinned to decode by alice, once there is another"));
}

fn any_pins() -> impl Strategy<Value = Vec<Option<Role>>> {
    let pin = prop_oneof![
        4 => Just(None),
        2 => Just(Some(Role::Prefill)),
        2 => Just(Some(Role::Decode)),
        1 => Just(Some(Role::Mixed)),
    ];
    proptest::collection::vec(pin, 24)
}

proptest! {
    #[test]
    fn pins_hold_unless_a_phase_would_be_left_to_nobody((policy, fleet) in any_fleet(), pins in any_pins()) {
        let fleet: Vec<_> = fleet.into_iter().zip(pins).collect();
        let plan = roles(&decide_pinned(policy, &fleet));
        prop_assert_eq!(plan.len(), fleet.len());
        let serving: Vec<Role> = plan.values().copied().filter(|role| *role != Role::None).collect();
        let served = |phase| serving.iter().any(|role| *role == phase || *role == Role::Mixed);
        prop_assert!(served(Role::Prefill) && served(Role::Decode));
        let broken = fleet.iter().filter(|(given, pin)| {
            let role = plan[&given.spec.id];
            pin.is_some_and(|pin| pin != role) && role != Role::None
        });
        prop_assert!(broken.count() <= 1, "{}", letters(&plan));

        let settled: Vec<_> = fleet.iter().map(|(given, pin)| {
            (Given { role: plan.get(&given.spec.id).copied(), serving: true, ..given.clone() }, *pin)
        }).collect();
        prop_assert_eq!(&roles(&decide_pinned(policy, &settled)), &plan, "planned again, nothing changes");
    }
}
