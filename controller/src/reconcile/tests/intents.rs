//! What operators want: cordons, pins and targets, each followed by the plan, one move at a time.

use std::num::NonZeroU32;

use baton_proto::{Cordoned, RolePolicy};
use baton_registry::records::{decode_intent, decode_targets};

use super::*;
use crate::fleet::Stuck;

fn cordoned(force: bool) -> Cordoned {
    let drain = Some(secs(90));
    Cordoned { by: "alice".into(), reason: "disk".into(), unix_millis: 1, drain, force }
}

impl World {
    fn change(&mut self, change: Change) -> Result<(), ApiError> {
        let record = self.mind.change(change)?;
        self.settle();
        // What is kept is in the store, and nowhere else.
        if let Some(record) = record {
            let kept = match &record {
                Record::Intent(id) => self.mind.intent(id).is_some(),
                Record::Targets(group) => self.mind.targets.contains_key(group),
                other => panic!("{other:?}"),
            };
            assert_eq!(self.stored.contains_key(&record.key()), kept);
        }
        Ok(())
    }

    fn cordon(&mut self, name: &str, force: bool) -> Result<(), ApiError> {
        self.change(Change::Cordon { id: id(name), cordoned: cordoned(force), only: Only::Always })
    }

    fn step_of(&self, name: &str) -> Step {
        let plans = self.mind.plans(self.now);
        let mut members = plans.into_iter().flat_map(|plan| plan.members);
        members.find(|member| member.id == id(name)).expect("it is planned").step
    }

    /// a prefills, b and c decode.
    fn three() -> (Self, [SessionId; 3]) {
        let (mut world, a, b) = Self::pair();
        let c = world.hello("c", 1, beat(Phase::Waiting, Role::None, 0));
        world.obey(c);
        assert_eq!(world.roles(), "pdd");
        (world, [a, b, c])
    }
}

#[test]
fn a_cordoned_instance_leaves_once_another_serves_in_its_place() {
    let (mut world, [a, b, c]) = World::three();
    world.cordon("a", false).expect("another can take its place");
    assert_eq!(world.roles(), "pdp", "c goes first, a serves on");
    assert_eq!(world.step_of("a"), Step::Waits("c to take on its role".into()));
    world.obey(c);
    assert_eq!(world.roles(), "0dp");
    let told = world.last_assigned(a);
    assert_eq!((told.role, told.reason.as_str()), (Role::None, "cordoned by alice: disk"));
    assert_eq!(told.drain, Some(secs(90)), "its requests have the time that alice gives them");
    world.obey(a);
    world.pass(secs(600), &[a, b, c]);
    assert_eq!(world.roles(), "0dp");

    world.change(Change::Uncordon { id: id("a"), only: Only::Always }).expect("it is known");
    assert_ne!(world.last_assigned(a).role, Role::None);
}

#[test]
fn the_last_that_serves_is_cordoned_by_force_alone() {
    let mut world = World::new();
    let a = world.hello("a", 1, beat(Phase::Waiting, Role::None, 0));
    world.pass(secs(3), &[a]);
    world.obey(a);
    assert_eq!(world.roles(), "m");
    let refusal = world.cordon("a", false).expect_err("nobody is left");
    assert!(refusal.message.contains("nobody of group default could serve in place of a"), "{refusal}");
    assert_eq!(world.mind.intent(&id("a")), None, "what was refused leaves nothing behind");
    world.cordon("a", true).expect("by force");
    assert_eq!(world.roles(), "0");
}

#[test]
fn force_waits_for_nobody() {
    let (mut world, _) = World::three();
    world.cordon("a", true).expect("by force");
    assert_eq!(world.roles().chars().next(), Some('0'));
}

#[test]
fn a_pin_moves_an_instance_and_outlives_its_leader() {
    let (mut world, [a, b, c]) = World::three();
    world.change(Change::Pin { id: id("b"), pinned: pinned(Role::Prefill) }).expect("it is known");
    assert_eq!(world.roles(), "ppd");
    world.obey(b);
    let stored = |key: String| world.stored[&key].clone();
    let intent = decode_intent(&stored(keys::intent(&id("b")))).expect("an intent");
    let roles = ["a", "b", "c"]
        .map(|name| (id(name), DesiredRole::decode(&stored(keys::role(&id(name)))).expect("a role")));

    let mut next = World::under(EPOCH + 50);
    next.now = world.now;
    let here = ["a", "b", "c"].map(|name| (instance_spec(name, 1), None));
    next.mind.inherit(here.into(), roles.into(), next.now);
    next.mind.inherit_intents([(id("b"), intent)].into(), BTreeMap::new());
    let sessions = [("a", a), ("b", b), ("c", c)].map(|(name, session)| {
        let held = world.last_assigned(session);
        next.hello(name, 1, beat(Phase::Ready, held.role, held.epoch.0))
    });
    next.pass(secs(60), &sessions);
    assert_eq!((next.roles().as_str(), next.assigned.len()), ("ppd", 0), "nothing changes");
    next.change(Change::Pin { id: id("b"), pinned: None }).expect("it is known");
    next.pass(secs(60), &sessions);
    assert_eq!(next.roles(), "ppd", "what fits the ratio stays");
}

#[test]
fn a_label_pins_until_an_operator_says_otherwise() {
    let mut world = World::new();
    let mut hello = |name: &str, label: &str| {
        world.last_session += 1;
        let mut spec = instance_spec(name, 1);
        spec.labels = BTreeMap::from([("role".to_owned(), label.to_owned())]);
        let session = SessionId(world.last_session);
        world.event(Event::Hello { session, spec: Box::new(spec), beat: silent(), unix_millis: 0 });
        session
    };
    let (a, b) = (hello("a", "decode"), hello("b", "no role at all"));
    assert_eq!(world.roles(), "dp");
    assert!(world.last_assigned(a).reason.contains("its label `role`"));
    world.obey(a);
    world.obey(b);
    world.change(Change::Pin { id: id("a"), pinned: pinned(Role::Prefill) }).expect("it is known");
    assert_eq!(world.last_assigned(a).role, Role::Mixed, "on its way: nobody else prefills or decodes");
    world.obey(a);
    world.obey(b);
    world.obey(a);
    assert_eq!(world.roles(), "pd");
    assert_eq!(world.last_assigned(a).reason, "pinned to prefill by alice");
}

#[test]
fn targets_divide_a_group_in_place_of_the_configuration() {
    let (mut world, sessions) = World::three();
    let d = world.hello("d", 1, beat(Phase::Waiting, Role::None, 0));
    world.obey(d);
    assert_eq!(world.roles(), "pddp");
    let group = GroupName::default();
    let targets = Targets { prefill: NonZeroU32::new(3), ..Targets::default() };
    world.change(Change::Divide { group: group.clone(), targets: Some(targets.clone()) }).expect("it is");
    assert_eq!(decode_targets(&world.stored[&keys::targets(&group)]).as_ref(), Ok(&targets));
    let plan = &world.mind.plans(world.now)[0];
    assert!(plan.aim.set && plan.aim.policy == RolePolicy::Ratio);
    assert_eq!(world.roles().matches('p').count(), 3);
    for session in sessions {
        world.obey(session);
    }
    world.obey(d);
    world.change(Change::Divide { group, targets: None }).expect("it is");
    assert_eq!(world.roles().matches('p').count(), 2, "as configured again");
}

fn to_scale_in() -> Cordoned {
    let (by, reason) = ("autoscaler".into(), "group default is scaled in".into());
    Cordoned { by, reason, unix_millis: 2, drain: None, force: false }
}

fn if_ours() -> Only {
    let Cordoned { by, reason, .. } = to_scale_in();
    Only::Held { by, reason }
}

#[test]
fn an_operators_cordon_stands_whichever_of_two_comes_first() {
    let cordoned_by = |world: &World| {
        world.mind.intent(&id("b")).and_then(|intent| Some(intent.cordoned.as_ref()?.by.clone()))
    };
    let ours = Change::Cordon { id: id("b"), cordoned: to_scale_in(), only: Only::Free };
    let back = Change::Uncordon { id: id("b"), only: if_ours() };
    // Both saw it free, and hers came first.
    let (mut world, _) = World::three();
    world.cordon("b", false).expect("c decodes");
    let refusal = world.change(ours.clone()).expect_err("it is not free any more");
    assert_eq!(refusal.code, ErrorCode::AlreadyExists);
    assert!(refusal.message.contains("b is by now cordoned by alice"), "{refusal}");
    let refusal = world.change(back.clone()).expect_err("it is not the autoscaler's");
    assert_eq!(refusal.code, ErrorCode::AlreadyExists);
    assert_eq!(cordoned_by(&world).as_deref(), Some("alice"));

    // Hers came second: what the autoscaler decided before that takes nothing away.
    let (mut world, _) = World::three();
    world.change(ours.clone()).expect("it is free");
    assert_eq!(cordoned_by(&world).as_deref(), Some("autoscaler"));
    world.cordon("b", false).expect("c decodes");
    assert_eq!(world.change(back.clone()).expect_err("it is alice's").code, ErrorCode::AlreadyExists);
    assert_eq!(cordoned_by(&world).as_deref(), Some("alice"));

    // She takes its cordon away: there is none that it could take back.
    world.change(Change::Uncordon { id: id("b"), only: Only::Always }).expect("it is known");
    assert_eq!(world.change(back.clone()).expect_err("there is none").code, ErrorCode::NotFound);
    world.change(ours).expect("it is free");
    world.change(back).expect("it is the autoscaler's");
    assert_eq!(cordoned_by(&world), None);
}

#[test]
fn an_instance_without_a_role_is_told_that_it_is_cordoned_and_that_it_is_not_any_more() {
    let (mut world, [a, b, c]) = World::three();
    let mut spec = instance_spec("x", 1);
    spec.model.revision = "another".to_owned();
    world.last_session += 1;
    let x = SessionId(world.last_session);
    let beat = beat(Phase::Waiting, Role::None, 0);
    world.event(Event::Hello { session: x, spec: Box::new(spec), beat, unix_millis: 0 });
    world.obey(x);
    assert_eq!(world.roles(), "pdd0");
    assert!(!world.last_assigned(x).cordoned, "nobody is there that it could serve with");
    world.cordon("x", false).expect("it serves nothing");
    let told = world.obey(x);
    assert!(told.0 == Role::None && world.last_assigned(x).cordoned);
    let stored = &world.stored[&keys::role(&id("x"))];
    assert!(DesiredRole::decode(stored).expect("a role").cordoned, "the next leader knows it, too");
    world.change(Change::Uncordon { id: id("x"), only: Only::Always }).expect("it is known");
    assert!(!world.last_assigned(x).cordoned && world.obey(x).1 > told.1);
    let last = world.assigned.len();
    world.pass(secs(600), &[a, b, c, x]);
    assert_eq!(world.assigned.len(), last, "it is told once");

    world.cordon("b", false).expect("c decodes");
    assert!(world.last_assigned(b).cordoned);
    world.obey(b);
    world.change(Change::Uncordon { id: id("b"), only: Only::Always }).expect("it is known");
    let told = world.last_assigned(b);
    assert!(told.role == Role::Decode && !told.cordoned);
}

#[test]
fn who_is_not_known_is_named() {
    let mut world = World::new();
    for change in [
        Change::Cordon { id: id("x"), cordoned: cordoned(false), only: Only::Always },
        Change::Uncordon { id: id("x"), only: Only::Always },
        Change::Pin { id: id("x"), pinned: pinned(Role::Decode) },
        Change::Divide { group: GroupName::new("x").expect("a name"), targets: None },
        Change::Rebalance { group: GroupName::new("x").expect("a name") },
    ] {
        let refusal = world.change(change.clone()).expect_err("nobody is there");
        assert_eq!(refusal.code, ErrorCode::NotFound, "{change:?}");
        assert!(refusal.message.ends_with('x') || refusal.message.contains(" x "), "{refusal}");
    }
}

#[test]
fn what_is_wanted_outlives_the_memory_of_the_instance() {
    let (mut world, [a, b, c]) = World::three();
    world.cordon("b", true).expect("by force");
    world.event(Event::Bye { session: b, reason: String::new() });
    world.pass(RoleConfig::default().memory + secs(1), &[a, c]);
    assert_eq!(world.mind.remembered().count(), 0);
    let b = world.hello("b", 2, beat(Phase::Waiting, Role::None, 0));
    world.pass(secs(60), &[a, b, c]);
    assert_eq!(
        world.roles().chars().nth(1),
        Some('0'),
        "a repaired disk is not in service before alice says so"
    );
    world.change(Change::Uncordon { id: id("b"), only: Only::Always }).expect("it is known");
    assert_ne!(world.roles().chars().nth(1), Some('0'));
}

#[test]
fn a_pair_changes_places_through_one_that_serves_both() {
    let (mut world, a, b) = World::pair();
    world.change(Change::Pin { id: id("a"), pinned: pinned(Role::Decode) }).expect("it is known");
    let mut seen = vec![world.roles()];
    for _ in 0..6 {
        world.obey(a);
        world.obey(b);
        if seen.last() != Some(&world.roles()) {
            seen.push(world.roles());
        }
    }
    assert_eq!(seen, ["md", "dp"], "never without a prefill or a decode");
    world.pass(secs(60), &[a, b]);
    assert_eq!(world.roles(), "dp");
}

#[test]
fn a_cordoned_instance_serves_on_while_nobody_else_can() {
    let (mut world, a, b) = World::pair();
    world.cordon("a", false).expect("b can take its place");
    assert_eq!(world.roles(), "pm", "b is on its way to serve both");
    // It dies on the way.
    world.event(Event::Bye { session: b, reason: String::new() });
    world.pass(secs(30), &[a]);
    assert_eq!(world.roles(), "p");
    let b = world.hello("b", 2, beat(Phase::Waiting, Role::None, 0));
    world.obey(b);
    world.pass(secs(3), &[a, b]);
    assert_eq!(world.roles(), "0m");
}

#[test]
fn another_time_for_a_drain_is_told() {
    let (mut world, [a, _, c]) = World::three();
    world.cordon("a", false).expect("another can take its place");
    world.obey(c);
    assert_eq!(world.last_assigned(a).drain, Some(secs(90)));
    let cordoned =
        Cordoned { drain: Some(secs(5)), reason: String::new(), by: "bob".into(), ..cordoned(false) };
    world.change(Change::Cordon { id: id("a"), cordoned, only: Only::Always }).expect("it is known");
    let told = world.last_assigned(a);
    assert_eq!((told.drain, told.reason.as_str()), (Some(secs(5)), "cordoned by bob: disk"));
}

#[test]
fn one_that_does_not_follow_its_pin_is_shown_as_stuck() {
    let (mut world, [a, b, c]) = World::three();
    let config = RoleConfig::default();
    world.change(Change::Pin { id: id("b"), pinned: pinned(Role::Prefill) }).expect("it is known");
    world.pass(config.drain + config.switch_grace + secs(1), &[a, b, c]);
    let stuck = world.mind.members()[&id("b")].stuck.clone();
    assert_eq!(stuck, Some(Stuck::Overdue(config.drain + config.switch_grace)));
    assert_eq!(world.step_of("b"), Step::NotCounted);
}

/// Its connection broke as it was told; by the time it is back, the other one that did the same is gone.
#[test]
fn what_may_not_have_been_heard_is_taken_back_when_nobody_else_is_left() {
    let (mut world, [a, b, c]) = World::three();
    let held = world.last_assigned(b);
    world.cordon("b", false).expect("c decodes");
    assert_eq!(world.last_assigned(b).role, Role::None);
    world.event(Event::Closed { session: b });
    world.event(Event::Bye { session: c, reason: "gone".into() });
    let b = world.hello("b", 1, beat(Phase::Ready, held.role, held.epoch.0));
    assert_eq!(world.last_assigned(b).role, Role::Decode);
    world.obey(b);
    assert_eq!(world.obey(a).0, Role::Mixed);
    assert_eq!(world.last_assigned(b).role, Role::None, "it is cordoned still");
}
