//! Single looks by hand, and whole lives of a group beside a Kubernetes that is slow, is changed by others and fails.

use proptest::prelude::*;

use super::*;

mod world;

use world::{Trouble, World};

const MIN: u32 = 2;
const MAX: u32 = 7;

pub(super) fn limits() -> Limits {
    let (stabilisation, patience) = (Duration::from_secs(60), Duration::from_secs(40));
    Limits { min: MIN, max: MAX, stabilisation, patience }
}

pub(super) fn id(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a good id")
}

fn pod() -> Pod {
    Pod { placed: true, running: true, ready: true, template: "t".to_owned(), ..Pod::default() }
}

fn instance(name: &str, role: Role) -> Instance {
    let (id, pod) = (id(name), Some(name.to_owned()));
    Instance { id, pod, here: true, role, sequences: 1, drained: false, cordoned: None }
}

/// Two prefill and two decode of as many replicas, of which so many are wanted.
fn four(prefill: usize, decode: usize) -> Seen {
    let roles = [("p1", Role::Prefill), ("p2", Role::Prefill), ("d1", Role::Decode), ("d2", Role::Decode)];
    Seen {
        demand: Demand::Measured(Wanted { prefill, decode }),
        replicas: 4,
        pods: roles.iter().map(|(name, _)| ((*name).to_owned(), pod())).collect(),
        instances: roles.into_iter().map(|(name, role)| instance(name, role)).collect(),
    }
}

/// One that has looked at this for a whole window.
fn watched(seen: &Seen) -> (Scaler, Instant) {
    let (mut scaler, mut now) = (Scaler::new(limits()), Instant::now());
    for _ in 0..12 {
        assert_eq!(scaler.decide(seen, now).action, Action::Wait, "before the window is over");
        now += limits().stabilisation / 12;
    }
    (scaler, now)
}

fn cordon(seen: &mut Seen, name: &str, by: By) {
    let instance = seen.instances.iter_mut().find(|it| it.id.as_str() == name).expect("it is there");
    instance.cordoned = Some(by);
}

fn drain(seen: &mut Seen, name: &str) {
    let instance = seen.instances.iter_mut().find(|it| it.id.as_str() == name).expect("it is there");
    (instance.role, instance.sequences, instance.drained) = (Role::None, 0, true);
}

#[test]
fn more_are_asked_for_at_once_and_within_the_limits() {
    let decide = |prefill, decode| Scaler::new(limits()).decide(&four(prefill, decode), Instant::now());
    assert_eq!(decide(3, 2).action, Action::ScaleOut { to: 5 });
    assert_eq!(decide(30, 20).action, Action::ScaleOut { to: MAX });
    assert_eq!((decide(2, 2).action, decide(2, 2).waits), (Action::Wait, None));
    assert_eq!(decide(1, 1).wanted, Some(2));
}

#[test]
fn one_is_cordoned_drained_marked_and_only_then_taken_away() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    let mut decide = |seen: &Seen| scaler.decide(seen, now);
    // There is one decode more than is wanted.
    assert_eq!(decide(&seen).action, Action::Cordon(id("d1")));
    cordon(&mut seen, "d1", By::Us);
    assert_eq!(decide(&seen).waits.as_deref(), Some("d1 drains"));
    drain(&mut seen, "d1");
    assert_eq!(decide(&seen).action, Action::Mark("d1".to_owned()));
    seen.pods.get_mut("d1").expect("a pod").marked = true;
    assert_eq!(decide(&seen).action, Action::ScaleIn { to: 3, pod: "d1".to_owned() });
    seen.replicas = 3;
    assert_eq!(decide(&seen).waits.as_deref(), Some("Kubernetes has yet to delete a pod"));
    seen.pods.get_mut("d1").expect("a pod").leaving = true;
    assert_eq!(decide(&seen).action, Action::Wait);
    seen.pods.remove("d1");
    assert_eq!(decide(&seen).action, Action::Wait, "its instance is still here");
    seen.instances.iter_mut().find(|it| it.id == id("d1")).expect("it is there").here = false;
    assert_eq!(decide(&seen).action, Action::Uncordon(id("d1"), Release::Gone));
    seen.instances.retain(|it| it.id != id("d1"));
    assert_eq!(decide(&seen), Decision { action: Action::Wait, wanted: Some(3), waits: None });
}

#[test]
fn one_that_is_wanted_again_or_takes_too_long_is_taken_back() {
    let mut seen = four(1, 1);
    let (mut scaler, now) = watched(&seen);
    let Action::Cordon(victim) = scaler.decide(&seen, now).action else { panic!("nobody is to go") };
    cordon(&mut seen, victim.as_str(), By::Us);
    assert_eq!(scaler.decide(&seen, now).action, Action::Wait);
    let more = Seen { demand: Demand::Measured(Wanted { prefill: 2, decode: 3 }), ..seen.clone() };
    let wanted = scaler.clone().decide(&more, now).action;
    assert_eq!(wanted, Action::Uncordon(victim.clone(), Release::Wanted), "before more are asked for");
    let as_many = Seen { demand: Demand::Measured(Wanted { prefill: 2, decode: 2 }), ..seen.clone() };
    let wanted = scaler.clone().decide(&as_many, now).action;
    assert_eq!(wanted, Action::Uncordon(victim.clone(), Release::Wanted));
    let unasked = Seen { demand: Demand::Unasked, ..seen.clone() };
    let unsure = scaler.clone().decide(&unasked, now).action;
    assert_eq!(unsure, Action::Uncordon(victim.clone(), Release::Unsure));

    let mut late = now;
    while late < now + limits().patience {
        assert_eq!(scaler.decide(&seen, late).action, Action::Wait);
        late += Duration::from_secs(10);
    }
    assert_eq!(scaler.decide(&seen, late).action, Action::Uncordon(victim.clone(), Release::Overdue));
    seen.instances.iter_mut().for_each(|it| it.cordoned = None);
    for _ in 0..12 {
        assert_eq!(scaler.decide(&seen, late).action, Action::Wait, "for another window");
        late += limits().stabilisation / 12;
    }
    let Action::Cordon(other) = scaler.decide(&seen, late).action else { panic!("nobody is to go") };
    assert_ne!(other, victim, "another is asked first");
}

#[test]
fn a_pod_that_is_not_deleted_in_time_keeps_its_instance() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    cordon(&mut seen, "d1", By::Us);
    let late = now + limits().patience - Duration::from_secs(15);
    assert_eq!(scaler.decide(&seen, now).action, Action::Wait);
    assert_eq!(scaler.decide(&seen, late).action, Action::Wait);
    drain(&mut seen, "d1");
    seen.pods.get_mut("d1").expect("a pod").marked = true;
    assert_eq!(scaler.decide(&seen, late).action, Action::ScaleIn { to: 3, pod: "d1".to_owned() });
    seen.replicas = 3;
    let later = now + limits().patience;
    assert_eq!(scaler.decide(&seen, later).action, Action::Wait, "that has a time of its own");
    let overdue = scaler.decide(&seen, late + limits().patience).action;
    assert_eq!(overdue, Action::Uncordon(id("d1"), Release::Overdue));
}

#[test]
fn of_two_that_were_to_go_one_is_taken_back_and_who_serves_nothing_goes_first() {
    let mut seen = four(1, 1);
    let (mut scaler, now) = watched(&seen);
    cordon(&mut seen, "p1", By::Us);
    assert_eq!(scaler.decide(&seen, now).waits.as_deref(), Some("p1 drains"));
    cordon(&mut seen, "d1", By::Us);
    assert_eq!(scaler.decide(&seen, now).action, Action::Uncordon(id("d1"), Release::Another));

    let mut seen = four(1, 1);
    seen.replicas = 5;
    seen.pods.insert("z".to_owned(), pod());
    seen.instances.push(instance("z", Role::None));
    let (mut scaler, now) = watched(&seen);
    assert_eq!(scaler.decide(&seen, now).action, Action::Cordon(id("z")));
}

#[test]
fn what_was_asked_for_before_is_waited_for() {
    let mut short = four(1, 1);
    short.replicas = 5;
    let (mut scaler, now) = watched(&short);
    let waits = scaler.decide(&short, now).waits;
    assert_eq!(waits.as_deref(), Some("there are 4 pods for 5 replicas"));

    let mut leaving = four(1, 1);
    leaving.pods.insert("x".to_owned(), Pod { leaving: true, ..pod() });
    leaving.instances.push(instance("x", Role::Decode));
    let (mut scaler, now) = watched(&leaving);
    assert_eq!(scaler.decide(&leaving, now).waits.as_deref(), Some("x is being deleted"));
}

#[test]
fn no_mark_is_left_on_another_pod() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    cordon(&mut seen, "d1", By::Us);
    drain(&mut seen, "d1");
    seen.pods.get_mut("p2").expect("a pod").marked = true;
    assert_eq!(scaler.decide(&seen, now).action, Action::Unmark("p2".to_owned()));
}

#[test]
fn what_others_hold_is_left_alone_and_so_is_the_last_of_a_phase() {
    let mut seen = four(1, 1);
    for name in ["p1", "d1"] {
        cordon(&mut seen, name, By::Others);
        drain(&mut seen, name);
    }
    let (mut scaler, now) = watched(&seen);
    let waits = scaler.decide(&seen, now).waits.expect("it waits");
    assert!(waits.contains("others hold them"), "{waits}");
    let mut seen = four(1, 1);
    cordon(&mut seen, "d1", By::Others);
    let (mut scaler, now) = watched(&seen);
    assert_eq!(scaler.decide(&seen, now).action, Action::Cordon(id("p1")), "d2 is the last that decodes");
}

#[test]
fn a_pod_that_serves_nobody_goes_first_and_without_ado() {
    let mut seen = four(2, 2);
    seen.replicas = 5;
    seen.pods.insert("new".to_owned(), Pod { ready: false, ..pod() });
    let (mut scaler, now) = watched(&seen);
    assert_eq!(scaler.decide(&seen, now).action, Action::Mark("new".to_owned()));
    // One without a node would go before it.
    let mut pending = Seen { replicas: 6, ..seen.clone() };
    pending.pods.insert("z".to_owned(), Pod { template: "t".to_owned(), ..Pod::default() });
    let (mut other, later) = watched(&pending);
    assert_eq!(other.decide(&pending, later).action, Action::Mark("z".to_owned()));
    seen.pods.get_mut("new").expect("a pod").marked = true;
    assert_eq!(scaler.decide(&seen, now).action, Action::ScaleIn { to: 4, pod: "new".to_owned() });
    // Had it become one that serves meanwhile, it would be like any other.
    seen.pods.get_mut("new").expect("a pod").ready = true;
    seen.instances.push(instance("new", Role::Decode));
    assert_eq!(scaler.decide(&seen, now).action, Action::Unmark("new".to_owned()));
}

#[test]
fn nothing_goes_that_kubernetes_would_not_take_first() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    cordon(&mut seen, "d1", By::Us);
    drain(&mut seen, "d1");
    seen.pods.get_mut("p1").expect("a pod").ready = false;
    assert_eq!(scaler.decide(&seen, now).action, Action::Uncordon(id("d1"), Release::Overtaken));
    cordon(&mut seen, "d1", By::Others);
    assert_eq!(scaler.decide(&seen, now).action, Action::Cordon(id("p1")));
}

#[test]
fn pods_that_are_no_instances_and_rollouts_and_a_group_switched_off_are_waited_for() {
    let mut strangers = four(1, 1);
    strangers.instances.iter_mut().for_each(|it| it.pod = None);
    let (mut scaler, now) = watched(&strangers);
    let waits = scaler.decide(&strangers, now).waits.expect("it waits");
    assert!(waits.contains("kubernetes.pod_label"), "{waits}");

    let mut rollout = four(1, 1);
    rollout.pods.get_mut("p1").expect("a pod").template = "next".to_owned();
    let (mut scaler, now) = watched(&rollout);
    let waits = scaler.decide(&rollout, now).waits.expect("it waits");
    assert_eq!(waits, "the Deployment is being rolled out");

    let mut off = four(3, 3);
    (off.replicas, off.pods) = (0, BTreeMap::new());
    let expected = Decision { action: Action::Wait, wanted: None, waits: None };
    assert_eq!(Scaler::new(limits()).decide(&off, Instant::now()), expected);
}

#[test]
fn a_count_that_somebody_else_sets_stands_for_a_window() {
    let mut seen = four(1, 1);
    let (mut scaler, now) = watched(&seen);
    seen.replicas = 5;
    seen.pods.insert("more".to_owned(), pod());
    seen.instances.push(instance("more", Role::Decode));
    assert_eq!(scaler.decide(&seen, now).action, Action::Wait);
}

#[test]
fn a_group_with_nothing_to_do_wants_the_least_and_one_with_little_no_more_than_it_has() {
    let mut seen = four(1, 1);
    seen.demand = Demand::Little;
    let mut scaler = Scaler::new(limits());
    assert_eq!(scaler.decide(&seen, Instant::now()).wanted, Some(4), "all have work");
    seen.instances.iter_mut().for_each(|it| it.sequences = 0);
    assert_eq!(scaler.decide(&seen, Instant::now()).wanted, Some(MIN));
    seen.demand = Demand::Unasked;
    assert_eq!(scaler.decide(&seen, Instant::now()).wanted, None);
}

fn trouble() -> impl Strategy<Value = Vec<(u64, Trouble)>> {
    let kind = prop_oneof![
        3 => (0usize..10).prop_map(Trouble::Wanted),
        1 => Just(Trouble::Little),
        1 => Just(Trouble::Unasked),
        1 => (2u32..9).prop_map(Trouble::Replicas),
        1 => Just(Trouble::Leader),
        1 => Just(Trouble::Crash),
        2 => (0usize..7).prop_map(Trouble::Cordon),
        1 => Just(Trouble::Uncordon),
        1 => (1u64..90).prop_map(Trouble::Slow),
        1 => Just(Trouble::Refuse),
    ];
    prop::collection::vec((0u64..120, kind), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What must never happen is asserted by the world, action by action.
    #[test]
    fn whatever_happens_nothing_is_taken_away_that_serves(seed: u64, troubles in trouble()) {
        let mut world = World::new(seed, 4);
        for (seconds, trouble) in troubles {
            world.live(Duration::from_secs(seconds));
            world.suffer(trouble);
        }
        world.recover(5);
        world.live(Duration::from_secs(1800));
        prop_assert_eq!(world.replicas(), 5);
        prop_assert!(world.is_at_rest());
    }

    #[test]
    fn a_constant_demand_is_met_and_then_nothing_moves(seed: u64, began in 2u32..9, wanted in 0usize..12) {
        let mut world = World::new(seed, began);
        world.suffer(Trouble::Wanted(wanted));
        world.live(Duration::from_secs(1800));
        let aim = u32::try_from(wanted.max(2)).expect("few").clamp(MIN, MAX);
        prop_assert_eq!(world.replicas(), aim);
        prop_assert!(world.is_at_rest());
        let (out, r#in) = world.changes();
        prop_assert!(out == 0 || r#in == 0, "{} out and {} in", out, r#in);
        let before = world.actions();
        world.live(Duration::from_secs(3600));
        prop_assert_eq!(world.actions(), before);
    }
}
