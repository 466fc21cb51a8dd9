//! The plan's rules, as a table and as properties over random fleets.

use baton_proto::{GroupName, InstanceId, Protocols};
use baton_registry::testing::instance_spec;
use proptest::prelude::*;

use super::*;

mod pins;

fn spec(name: &str, layout: &str) -> InstanceSpec {
    let mut spec = instance_spec(name, 1);
    spec.kv_layout.fingerprint = layout.into();
    spec
}

fn ratio(prefill: u32, decode: u32) -> Ratio {
    Ratio { prefill, decode }
}

#[derive(Debug, Clone)]
struct Given {
    spec: InstanceSpec,
    role: Option<Role>,
    serving: bool,
}

fn decide(ratio: Ratio, fleet: &[Given]) -> BTreeMap<InstanceId, Role> {
    decide_by(Policy::Ratio(ratio), fleet)
}

fn decide_by(policy: Policy, fleet: &[Given]) -> BTreeMap<InstanceId, Role> {
    let candidates: Vec<_> = fleet
        .iter()
        .map(|g| Candidate { spec: &g.spec, role: g.role, serving: g.serving, pin: None })
        .collect();
    plan(policy, &candidates).into_iter().map(|(id, decision)| (id.clone(), decision.role)).collect()
}

/// A fleet from letters, a to z by name: p, d, m = has that role and serves, capitals = does not serve, - = none.
fn fleet(roles: &str) -> Vec<Given> {
    let given = |(index, letter): (usize, char)| Given {
        spec: spec(&format!("i{index:02}"), "x"),
        role: match letter.to_ascii_lowercase() {
            'p' => Some(Role::Prefill),
            'd' => Some(Role::Decode),
            'm' => Some(Role::Mixed),
            _ => None,
        },
        serving: letter.is_ascii_lowercase(),
    };
    roles.chars().enumerate().map(given).collect()
}

fn letters(plan: &BTreeMap<InstanceId, Role>) -> String {
    plan.values()
        .map(|role| match role {
            Role::Prefill => 'p',
            Role::Decode => 'd',
            Role::Mixed => 'm',
            Role::None => '-',
        })
        .collect()
}

#[test]
fn fleets_and_their_plans() {
    let table = [
        // policy, fleet, plan
        ((1, 1), "-", "m"),
        ((1, 1), "p", "m"),
        ((1, 1), "--", "pd"),
        ((1, 1), "dp", "dp"),
        ((1, 1), "m-", "dp"), // the mixed one decodes on
        ((1, 1), "-m", "pd"),
        ((1, 1), "md", "pd"),
        ((1, 1), "mp", "dp"),
        ((1, 1), "pp", "pd"), // one of two alike has to move
        ((1, 1), "Pp", "dp"), // the one that does not serve yet
        ((1, 1), "---", "pdd"),
        ((1, 1), "ppd", "ppd"), // 1.5 is wanted: two will do
        ((1, 1), "dpd", "dpd"),
        ((1, 1), "ddd", "ddp"),
        ((1, 1), "ppdd-", "ppddd"),
        ((1, 1), "pppd", "ppdd"),
        ((2, 1), "---", "ppd"),
        ((1, 3), "----", "pddd"),
        ((1, 3), "p-dd", "pddd"),
        ((1, 3), "--------", "ppdddddd"),
        ((1, 7), "--", "pd"),
        ((7, 1), "--", "pd"),
        ((2, 2), "ppd", "ppd"),
        ((2, 2), "pdd", "pdd"),
    ];
    for ((prefill, decode), given, expected) in table {
        let plan = decide(ratio(prefill, decode), &fleet(given));
        assert_eq!(letters(&plan), expected, "{prefill}:{decode} {given}");
    }
}

#[test]
fn nobody_is_planned_where_nobody_is() {
    assert!(decide(ratio(1, 1), &[]).is_empty());
}

#[test]
fn who_cannot_join_has_no_role_and_a_reason() {
    let mut fleet = fleet("pd");
    let mut stranger = fleet[0].clone();
    stranger.spec = spec("z", "another");
    stranger.role = None;
    fleet.push(stranger);
    let candidates: Vec<_> = fleet
        .iter()
        .map(|g| Candidate { spec: &g.spec, role: g.role, serving: g.serving, pin: None })
        .collect();
    let plan = plan(Policy::Ratio(ratio(1, 1)), &candidates);
    let decision = &plan[&fleet[2].spec.id];
    assert_eq!(decision.role, Role::None);
    assert_eq!(
        decision.reason,
        "cannot join the group's other instances: its KV layout is another, that of i00 is x"
    );
    assert_eq!(plan[&fleet[0].spec.id].role, Role::Prefill);
    assert_eq!(plan[&fleet[1].spec.id].role, Role::Decode);
}

#[test]
fn each_difference_is_named() {
    let base = spec("a", "x");
    let mut others = vec![("its model is n, that of a is m", base.clone()), ("revision", base.clone())];
    (others[0].1.model.name, others[0].1.model.revision) = ("n".into(), "s".into());
    others[1].1.model.revision = "s".into();
    let mut described = base.clone();
    described.model.architecture = "qwen3".into();
    others.push(("describes the model differently", described));
    others.push(("device type", InstanceSpec { device: "ascend".into(), ..base.clone() }));
    others.push(("device count", InstanceSpec { device_count: 2, ..base.clone() }));
    others.push(("KV layout", spec("a", "y")));
    for (named, other) in others {
        let reason = different_setup(&base, &other).expect(named);
        assert!(reason.contains(named), "{reason}");
        assert!(different_setup(&other, &base).is_some());
    }
    // Other blocks, mapped on their way.
    let mut mapped = base.clone();
    (mapped.kv_layout.fingerprint, mapped.kv_layout.class) = ("z".into(), base.kv_layout.fingerprint.clone());
    assert_eq!(different_setup(&base, &mapped), None);
    assert_eq!(
        different_setup(
            &base,
            &InstanceSpec { group: GroupName::new("g").expect("a good name"), ..base.clone() }
        ),
        None
    );
}

#[test]
fn those_that_call_one_model_differently_pair() {
    let mut fleet = fleet("---");
    fleet[1].spec.model.name = "n".into();
    assert_eq!(letters(&decide(ratio(1, 1), &fleet)), "pdd");
    assert!(compatible(&fleet[0].spec, &fleet[1].spec));
    // Of the same name, and still another model.
    fleet[2].spec.model.revision = "s".into();
    assert_eq!(letters(&decide(ratio(1, 1), &fleet)), "pd-");
}

#[test]
fn those_with_more_or_less_memory_for_the_kv_cache_pair() {
    let base = spec("a", "x");
    let mut smaller = base.clone();
    // Cut to what its KV pool holds.
    smaller.context_tokens = 50;
    assert_eq!(different_setup(&base, &smaller), None);
}

/// `fleet` and, of another build, one with each of these roles.
fn upgraded(fleet: &[Given], newcomers: &[Option<Role>]) -> Vec<Given> {
    let next = |(n, role): (usize, &Option<Role>)| {
        let spec =
            InstanceSpec { handoff_protocols: Protocols::between(2, 2), ..spec(&format!("n{n}"), "x") };
        Given { spec, role: *role, serving: role.is_some() }
    };
    fleet.iter().cloned().chain(newcomers.iter().enumerate().map(next)).collect()
}

#[test]
fn builds_that_do_not_understand_each_other_are_planned_apart() {
    let old = fleet("ppdd");
    for (newcomers, plan) in [
        (&[None][..], "ppddm"),
        (&[None, None], "ppddpd"),
        (&[Some(Role::Mixed), None], "ppddpd"),
        (&[Some(Role::Prefill), Some(Role::Decode), None], "ppddpdd"),
    ] {
        let decided = decide(ratio(1, 1), &upgraded(&old, newcomers));
        for (role, wanted) in
            [(Role::Prefill, 'p'), (Role::Decode, 'd'), (Role::Mixed, 'm'), (Role::None, '-')]
        {
            let wanted = plan.chars().filter(|letter| *letter == wanted).count();
            assert_eq!(count(&decided, role), wanted, "{role:?} of {plan}");
        }
        // The old ones keep what they have.
        assert!(old.iter().all(|given| decided.get(&given.spec.id) == given.role.as_ref()));
    }
}

#[test]
fn builds_that_follow_each_other_are_planned_as_one() {
    let mut fleet = fleet("p");
    let spec = InstanceSpec { handoff_protocols: Protocols::between(1, 2), ..spec("next", "x") };
    fleet.push(Given { spec, role: None, serving: false });
    assert_eq!(letters(&decide(ratio(1, 1), &fleet)), "pd");
}

/// The oldest and the newest do not understand each other, and both speak with the one between.
#[test]
fn of_three_builds_everyone_has_somebody_to_hand_caches_to() {
    let speaks = |(name, oldest, newest): (&str, u32, u32)| Given {
        spec: InstanceSpec { handoff_protocols: Protocols::between(oldest, newest), ..spec(name, "x") },
        role: None,
        serving: false,
    };
    let fleet = [("a", 1, 1), ("b", 1, 2), ("c", 2, 2), ("d", 2, 2)].map(speaks);
    assert_eq!(letters(&decide(ratio(1, 1), &fleet)), "pdpd");
    assert_eq!(letters(&decide(ratio(1, 1), &fleet[..3])), "pdm");
}

/// Four that prefill can compute the prompts of half of the requests, and not of all.
#[test]
fn builds_planned_apart_share_what_is_asked_for() {
    let measured = auto::Measured {
        demand: auto::Demand { requests_per_second: 16.0, prompt_tokens: 3000.0, completion_tokens: 100.0 },
        speed: auto::Speed {
            prefill_tokens_per_second: 12_000.0,
            step_base: 0.009,
            step_per_sequence: 0.000_15,
            sequences: 1000.0,
            kv_tokens: 400_000.0,
        },
        targets: auto::Targets {
            ttft: std::time::Duration::from_millis(800),
            tpot: std::time::Duration::from_millis(40),
        },
        caution: auto::Caution::default(),
    };
    let policy = Policy::Measured(measured, ratio(1, 1));
    let (prefill, decode) = (Some(Role::Prefill), Some(Role::Decode));
    let next = [prefill, prefill, prefill, prefill, decode, decode, decode, decode];
    let both = upgraded(&fleet("ppppdddd"), &next);
    assert_eq!(letters(&decide_by(policy, &both)), "ppppddddppppdddd");
    assert_ne!(
        letters(&decide_by(policy, &fleet("ppppdddd"))),
        "ppppdddd",
        "alone it has to do with all of it"
    );
}

#[test]
fn what_is_planned_apart_says_so() {
    let fleet = upgraded(&fleet("p"), &[None]);
    let candidate = |given: &'_ Given| (given.spec.clone(), given.role);
    let specs: Vec<_> = fleet.iter().map(candidate).collect();
    let candidates: Vec<_> = specs
        .iter()
        .map(|(spec, role)| Candidate { spec, role: *role, serving: role.is_some(), pin: None })
        .collect();
    let decisions = plan(Policy::Ratio(ratio(1, 1)), &candidates);
    let reason = &decisions[&specs[1].0.id].reason;
    assert!(
        reason.ends_with("; its build is planned apart, with version 2 of the handoff protocol"),
        "{reason}"
    );
}

#[test]
fn those_who_serve_outweigh_newcomers() {
    let mut fleet = fleet("pd");
    for name in ["a", "b", "c"] {
        fleet.push(Given { spec: spec(name, "new"), role: None, serving: false });
    }
    let plan = decide(ratio(1, 1), &fleet);
    assert_eq!(letters(&plan), "---pd");
}

#[test]
fn one_that_serves_outweighs_two_that_do_not() {
    let mut fleet = fleet("p");
    for (name, role) in [("b", Some(Role::Decode)), ("c", None)] {
        fleet.push(Given { spec: spec(name, "new"), role, serving: false });
    }
    let plan = decide(ratio(1, 1), &fleet);
    assert_eq!(letters(&plan), "--m");
}

fn any_fleet() -> impl Strategy<Value = (Ratio, Vec<Given>)> {
    let role = prop_oneof![
        Just(None),
        Just(Some(Role::Prefill)),
        Just(Some(Role::Decode)),
        Just(Some(Role::Mixed)),
        Just(Some(Role::None)),
    ];
    let instance = (role, any::<bool>(), prop_oneof![9 => Just("x"), 1 => Just("y")]);
    let fleet = proptest::collection::vec(instance, 1..24).prop_map(|instances| {
        let given = |(index, (role, serving, layout)): (usize, (Option<Role>, bool, &str))| Given {
            spec: spec(&format!("i{index:02}"), layout),
            role,
            serving,
        };
        instances.into_iter().enumerate().map(given).collect()
    });
    ((1u32..6, 1u32..6).prop_map(|(prefill, decode)| Ratio { prefill, decode }), fleet)
}

fn count(plan: &BTreeMap<InstanceId, Role>, role: Role) -> usize {
    plan.values().filter(|planned| **planned == role).count()
}

fn with_roles(fleet: &[Given], plan: &BTreeMap<InstanceId, Role>) -> Vec<Given> {
    let given = |g: &Given| Given { role: plan.get(&g.spec.id).copied(), serving: true, ..g.clone() };
    fleet.iter().map(given).collect()
}

/// Serving roles that differ between two plans, over the instances in both.
fn moves(before: &BTreeMap<InstanceId, Role>, after: &BTreeMap<InstanceId, Role>) -> usize {
    before
        .iter()
        .filter(|(id, role)| **role != Role::None && after.get(*id).is_some_and(|now| now != *role))
        .count()
}

proptest! {
    #[test]
    fn every_plan_keeps_the_rules((policy, fleet) in any_fleet(), seed in any::<u64>()) {
        let plan = decide(policy, &fleet);
        prop_assert_eq!(plan.len(), fleet.len(), "everyone gets an answer");

        let party: Vec<_> = plan.iter().filter(|(_, role)| **role != Role::None).map(|(id, _)| id).collect();
        prop_assert!(!party.is_empty());
        let layouts: std::collections::BTreeSet<_> = fleet.iter().filter(|g| party.contains(&&g.spec.id))
            .map(|g| &g.spec.kv_layout.fingerprint).collect();
        prop_assert_eq!(layouts.len(), 1, "all who serve understand each other");

        let (prefill, decode, mixed) = (count(&plan, Role::Prefill), count(&plan, Role::Decode), count(&plan, Role::Mixed));
        if party.len() == 1 {
            prop_assert_eq!(mixed, 1);
        } else {
            prop_assert_eq!(mixed, 0);
            prop_assert!(prefill >= 1 && decode >= 1);
            let ideal = party.len() as f64 * f64::from(policy.prefill) / f64::from(policy.prefill + policy.decode);
            let bounded = ideal.clamp(1.0, (party.len() - 1) as f64);
            prop_assert!((prefill as f64 - bounded).abs() < 1.0, "{} for {}", prefill, ideal);
        }

        prop_assert_eq!(&decide(policy, &with_roles(&fleet, &plan)), &plan, "planned again, nothing changes");

        let mut shuffled = fleet.clone();
        for index in (1..shuffled.len()).rev() {
            shuffled.swap(index, (seed.rotate_left(index as u32 * 7) % (index as u64 + 1)) as usize);
        }
        prop_assert_eq!(&decide(policy, &shuffled), &plan, "the order does not matter");
    }

    #[test]
    fn one_more_or_one_less_moves_at_most_one((policy, fleet) in any_fleet(), gone in any::<prop::sample::Index>()) {
        let fleet: Vec<_> = fleet.into_iter().filter(|g| g.spec.kv_layout.fingerprint == "x").collect();
        prop_assume!(fleet.len() > 2);
        let plan = decide(policy, &fleet);
        let settled = with_roles(&fleet, &plan);
        let mut fewer = settled.clone();
        fewer.remove(gone.index(fewer.len()));
        let after = decide(policy, &fewer);
        prop_assert!(moves(&plan, &after) <= 1, "{} became {}", letters(&plan), letters(&after));
        let mut more = settled;
        more.push(Given { spec: spec("zz", "x"), role: None, serving: false });
        prop_assert!(moves(&plan, &decide(policy, &more)) <= 1);
    }

    #[test]
    fn no_cheaper_division_was_passed_over(prefill in 1u32..6, decode in 1u32..6, n in 2usize..20, held in (0usize..20, 0usize..20)) {
        let prefilling = held.0.min(n);
        let present = Split { prefill: prefilling, decode: held.1.min(n - prefilling) };
        let chosen = by_ratio(ratio(prefill, decode), n, present, 1..=n - 1);
        let ideal = n as f64 * f64::from(prefill) / f64::from(prefill + decode);
        let moved = |count: usize| present.prefill.saturating_sub(count) + present.decode.saturating_sub(n - count);
        for other in 1..n {
            if (other as f64 - ideal).abs() < 1.0 - 1e-9 {
                prop_assert!((chosen as f64 - ideal).abs() < 1.0);
                prop_assert!(moved(chosen) <= moved(other), "{chosen} moves {}, {other} {}", moved(chosen), moved(other));
            }
        }
    }
}
