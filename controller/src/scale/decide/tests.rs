//! Single looks by hand.

use super::*;

mod lives;
mod world;

const MIN: u32 = 2;
const MAX: u32 = 7;
const KNOWN_AFTER: Duration = Duration::from_secs(5);

pub(super) fn limits() -> Limits {
    Limits {
        min: MIN,
        max: MAX,
        stabilisation: Duration::from_secs(60),
        patience: Duration::from_secs(40),
        notice: Duration::from_secs(45),
        known_after: KNOWN_AFTER,
    }
}

pub(super) fn id(name: &str) -> InstanceId {
    InstanceId::new(name).expect("a good id")
}

fn pod() -> Pod {
    Pod { placed: true, running: true, ready: true, template: "t".to_owned(), ..Pod::default() }
}

fn instance(name: &str, role: Role) -> Instance {
    let (id, pod) = (id(name), Some(name.to_owned()));
    Instance { id, pod, here: true, role, sequences: 1, drained: false, quarantined: false, cordoned: None }
}

/// Two prefill and two decode of as many replicas, of which so many are wanted.
fn four(prefill: usize, decode: usize) -> Seen {
    let roles = [("p1", Role::Prefill), ("p2", Role::Prefill), ("d1", Role::Decode), ("d2", Role::Decode)];
    Seen {
        demand: Demand::Measured(Split { prefill, decode }),
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

fn ready(seen: &mut Seen, name: &str, ready: bool) {
    seen.pods.get_mut(name).expect("a pod").ready = ready;
}

fn scale_in(to: u32, pods: &[&str]) -> Action {
    Action::ScaleIn { to, pods: pods.iter().map(|&pod| pod.to_owned()).collect() }
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
fn one_is_cordoned_drained_seen_not_ready_and_only_then_taken_away() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    let mut decide = |seen: &Seen, now| scaler.decide(seen, now);
    // There is one decode more than is wanted.
    assert_eq!(decide(&seen, now).action, Action::Cordon(id("d1")));
    cordon(&mut seen, "d1", By::Us);
    assert_eq!(decide(&seen, now).waits.as_deref(), Some("d1 drains"));
    drain(&mut seen, "d1");
    let waits = decide(&seen, now).waits;
    assert_eq!(waits.as_deref(), Some("d1 is drained, and its pod has yet to be seen not ready"));
    ready(&mut seen, "d1", false);
    assert_eq!(decide(&seen, now).waits.as_deref(), Some("d1 has only just ceased to be ready"));
    let now = now + KNOWN_AFTER;
    assert_eq!(decide(&seen, now).action, scale_in(3, &["d1"]));
    seen.replicas = 3;
    assert_eq!(decide(&seen, now).waits.as_deref(), Some("Kubernetes has yet to delete a pod"));
    seen.pods.get_mut("d1").expect("a pod").leaving = true;
    assert_eq!(decide(&seen, now).action, Action::Wait);
    seen.pods.remove("d1");
    assert_eq!(decide(&seen, now).action, Action::Wait, "its instance is still here");
    seen.instances.iter_mut().find(|it| it.id == id("d1")).expect("it is there").here = false;
    assert_eq!(decide(&seen, now).action, Action::Uncordon(id("d1"), Release::Gone));
    seen.instances.retain(|it| it.id != id("d1"));
    assert_eq!(decide(&seen, now), Decision { action: Action::Wait, wanted: Some(3), waits: None });
}

#[test]
fn one_that_is_wanted_again_or_takes_too_long_is_taken_back() {
    let mut seen = four(1, 1);
    let (mut scaler, now) = watched(&seen);
    let Action::Cordon(victim) = scaler.decide(&seen, now).action else { panic!("nobody is to go") };
    cordon(&mut seen, victim.as_str(), By::Us);
    assert_eq!(scaler.decide(&seen, now).action, Action::Wait);
    let more = Seen { demand: Demand::Measured(Split { prefill: 2, decode: 3 }), ..seen.clone() };
    let wanted = scaler.clone().decide(&more, now).action;
    assert_eq!(wanted, Action::Uncordon(victim.clone(), Release::Wanted), "before more are asked for");
    let as_many = Seen { demand: Demand::Measured(Split { prefill: 2, decode: 2 }), ..seen.clone() };
    let wanted = scaler.clone().decide(&as_many, now).action;
    assert_eq!(wanted, Action::Uncordon(victim.clone(), Release::Wanted));
    let unknown = Seen { demand: Demand::Unknown, ..seen.clone() };
    let unsure = scaler.clone().decide(&unknown, now).action;
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
fn a_pod_that_stays_ready_or_is_not_deleted_in_time_keeps_its_instance() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    cordon(&mut seen, "d1", By::Us);
    let mut late = now + limits().patience - Duration::from_secs(15);
    assert_eq!(scaler.decide(&seen, now).action, Action::Wait);
    assert_eq!(scaler.decide(&seen, late).action, Action::Wait);
    drain(&mut seen, "d1");
    assert_eq!(scaler.decide(&seen, late).action, Action::Wait);
    let mut other = (scaler.clone(), late);
    while other.1 < late + limits().notice {
        assert_eq!(other.0.decide(&seen, other.1).action, Action::Wait, "that has a time of its own");
        other.1 += KNOWN_AFTER;
    }
    assert_eq!(other.0.decide(&seen, other.1).action, Action::Uncordon(id("d1"), Release::Ready));

    ready(&mut seen, "d1", false);
    assert_eq!(scaler.decide(&seen, late).action, Action::Wait);
    late += KNOWN_AFTER;
    assert_eq!(scaler.decide(&seen, late).action, scale_in(3, &["d1"]));
    seen.replicas = 3;
    let later = late + limits().notice - Duration::from_secs(1);
    assert_eq!(scaler.decide(&seen, later).action, Action::Wait, "that has a time of its own, too");
    let overdue = scaler.decide(&seen, late + limits().notice).action;
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
fn what_others_hold_and_have_drained_is_not_deleted_in_place_of_another() {
    let mut seen = four(1, 1);
    cordon(&mut seen, "d1", By::Others);
    drain(&mut seen, "d1");
    ready(&mut seen, "d1", false);
    let (mut scaler, now) = watched(&seen);
    let waits = scaler.decide(&seen, now).waits.expect("it waits");
    assert!(waits.contains("others hold them"), "{waits}");
    // Nor if its process has gone.
    seen.instances.iter_mut().find(|it| it.id == id("d1")).expect("it is there").here = false;
    let waits = scaler.decide(&seen, now).waits.expect("it waits");
    assert!(waits.contains("others hold them"), "{waits}");
}

#[test]
fn a_pod_that_serves_nobody_goes_first_and_without_ado() {
    let mut seen = four(2, 2);
    seen.replicas = 5;
    seen.pods.insert("new".to_owned(), Pod { ready: false, ..pod() });
    let (mut scaler, now) = watched(&seen);
    assert_eq!(scaler.clone().decide(&seen, now).action, scale_in(4, &["new"]));
    // One without a node would go before it.
    let mut pending = Seen { replicas: 6, ..seen.clone() };
    pending.pods.insert("z".to_owned(), Pod { template: "t".to_owned(), ..Pod::default() });
    let (mut other, later) = watched(&pending);
    assert_eq!(other.decide(&pending, later).action, scale_in(5, &["z"]));
    // Had it become one that serves meanwhile, it would be like any other.
    ready(&mut seen, "new", true);
    seen.instances.push(instance("new", Role::Decode));
    assert_eq!(scaler.decide(&seen, now).action, Action::Cordon(id("d1")));
}

#[test]
fn of_one_that_is_to_go_and_one_that_serves_nobody_either_may_go() {
    let mut seen = four(2, 2);
    seen.replicas = 5;
    seen.pods.insert("new".to_owned(), pod());
    seen.instances.push(instance("new", Role::Decode));
    let (mut scaler, mut now) = watched(&seen);
    cordon(&mut seen, "d1", By::Us);
    drain(&mut seen, "d1");
    ready(&mut seen, "d1", false);
    // It crashes.
    ready(&mut seen, "new", false);
    seen.instances.retain(|it| it.id != id("new"));
    assert_eq!(scaler.decide(&seen, now).action, Action::Wait);
    now += KNOWN_AFTER;
    assert_eq!(scaler.decide(&seen, now).action, scale_in(4, &["d1", "new"]));
    seen.replicas = 4;
    assert_eq!(scaler.decide(&seen, now).waits.as_deref(), Some("Kubernetes has yet to delete a pod"));
    seen.pods.remove("new");
    assert_eq!(scaler.decide(&seen, now).action, Action::Uncordon(id("d1"), Release::Wanted));
}

#[test]
fn nothing_goes_that_kubernetes_might_not_take_first() {
    let mut seen = four(2, 1);
    let (mut scaler, now) = watched(&seen);
    cordon(&mut seen, "d1", By::Us);
    drain(&mut seen, "d1");
    ready(&mut seen, "d1", false);
    ready(&mut seen, "p1", false);
    let now = now + KNOWN_AFTER;
    assert_eq!(scaler.decide(&seen, now).action, Action::Uncordon(id("d1"), Release::Overtaken));
    cordon(&mut seen, "d1", By::Others);
    assert_eq!(scaler.decide(&seen, now).action, Action::Cordon(id("p1")));
}

#[test]
fn those_in_quarantine_are_no_capacity_and_come_back_without_a_change_to_and_fro() {
    let mut seen = four(2, 2);
    for name in ["p1", "d1"] {
        let ill = seen.instances.iter_mut().find(|it| it.id == id(name)).expect("it is there");
        (ill.quarantined, ill.role, ill.sequences) = (true, Role::None, 0);
    }
    let (mut scaler, now) = (Scaler::new(limits()), Instant::now());
    assert_eq!(scaler.decide(&seen, now).action, Action::ScaleOut { to: 6 });
    let many = Seen { demand: Demand::Measured(Split { prefill: 3, decode: 3 }), ..seen.clone() };
    assert_eq!(scaler.clone().decide(&many, now).action, Action::ScaleOut { to: MAX });
    let little = Seen { demand: Demand::Little, ..seen.clone() };
    assert_eq!(Scaler::new(limits()).decide(&little, now).wanted, Some(4), "two have work, two do badly");
    let none_left = Seen { demand: Demand::Little, replicas: 3, ..seen.clone() };
    assert_eq!(Scaler::new(limits()).decide(&none_left, now).wanted, Some(4), "the least are to serve");
}

#[test]
fn a_pod_without_an_instance_is_not_taken_for_nobodys_while_somebody_is_held_who_knows_where() {
    let mut seen = four(1, 1);
    seen.instances.retain(|it| it.id != id("d2"));
    seen.instances.push(Instance { pod: None, here: false, role: Role::None, ..instance("d2", Role::None) });
    ready(&mut seen, "d2", false);
    let pod = seen.pods["d2"].clone();
    assert!(seen.is_spare("d2", &pod));
    cordon(&mut seen, "d2", By::Others);
    assert!(!seen.is_spare("d2", &pod), "it may be the one that people look at");
}

#[test]
fn one_that_cannot_go_is_asked_last() {
    let seen = four(1, 1);
    let (mut scaler, now) = watched(&seen);
    let Action::Cordon(first) = scaler.decide(&seen, now).action else { panic!("nobody is asked") };
    scaler.refused(first.clone());
    assert!(matches!(scaler.decide(&seen, now).action, Action::Cordon(next) if next != first));
}

#[test]
fn one_that_is_congested_and_not_measured_gets_one_more_at_a_time() {
    let mut seen = Seen { demand: Demand::Congested, ..four(1, 1) };
    let (mut scaler, now) = (Scaler::new(limits()), Instant::now());
    assert_eq!(scaler.decide(&seen, now).action, Action::ScaleOut { to: 5 });
    seen.replicas = 5;
    assert_eq!(scaler.decide(&seen, now).wanted, Some(5), "the fifth does not serve yet");
    seen.replicas = MAX;
    assert_eq!(scaler.decide(&seen, now).wanted, Some(MAX), "what has been asked for is not taken back");
}

#[test]
fn a_group_that_nobody_measures_is_kept_between_its_limits() {
    let mut seen = Seen { demand: Demand::Unasked, ..four(1, 1) };
    let wanted = |seen: &Seen| Scaler::new(limits()).decide(seen, Instant::now());
    assert_eq!(wanted(&seen), Decision { action: Action::Wait, wanted: Some(4), waits: None });
    seen.replicas = 1;
    assert_eq!(wanted(&seen).action, Action::ScaleOut { to: MIN });
    assert_eq!(
        wanted(&Seen { demand: Demand::Unknown, ..seen.clone() }).action,
        Action::ScaleOut { to: MIN }
    );
    seen.replicas = 0;
    assert_eq!(wanted(&seen).wanted, None, "it is switched off");
    seen.replicas = 9;
    assert_eq!(wanted(&seen).wanted, Some(MAX));
    assert_eq!(wanted(&Seen { demand: Demand::Unknown, ..seen }).wanted, None);
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
}
