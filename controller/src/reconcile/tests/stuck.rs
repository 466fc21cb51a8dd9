//! Those that never become what they should be: they are shown, and the others go on without them.

use super::*;
use crate::fleet::Stuck;

#[test]
fn one_that_never_arrives_is_done_without_after_a_while() {
    let (mut world, a, b) = World::pair();
    let c = world.hello("c", 1, beat(Phase::Waiting, Role::None, 0));
    assert_eq!(world.roles(), "pdd");
    // It lives and does not do as it is told; now the only one that prefills leaves.
    world.event(Event::Bye { session: a, reason: String::new() });
    assert_eq!(world.roles(), "dp");
    world.pass(secs(50), &[b, c]);
    assert_eq!(world.roles(), "dp", "it may still arrive");
    world.pass(secs(12), &[b, c]);
    assert_eq!(world.roles(), "mp");
}

#[test]
fn one_that_arrives_late_counts_again() {
    let (mut world, a, b) = World::pair();
    let c = world.hello("c", 1, beat(Phase::Waiting, Role::None, 0));
    world.event(Event::Bye { session: a, reason: String::new() });
    world.pass(secs(62), &[b, c]);
    let stuck = |world: &World| world.mind.members()[&id("c")].stuck.clone();
    assert_eq!(stuck(&world), Some(Stuck::Overdue(secs(60))));
    world.obey(b);
    assert_eq!(world.roles(), "mp");
    // The same process, called again: still stuck.
    let c = world.hello("c", 1, beat(Phase::Waiting, Role::None, 0));
    world.pass(secs(2), &[b, c]);
    assert_eq!((world.roles().as_str(), stuck(&world).is_some()), ("mp", true));
    world.obey(c);
    assert_eq!((world.roles().as_str(), stuck(&world)), ("dp", None));
}

#[test]
fn who_loads_is_not_stuck() {
    let mut world = World::new();
    let (a, b) = (world.hello("a", 1, silent()), world.hello("b", 1, silent()));
    world.pass(secs(300), &[a, b]);
    assert!(world.mind.members().values().all(|member| member.stuck.is_none()));
    world.beat(a, beat(Phase::Waiting, Role::None, 0));
    world.pass(secs(59), &[a, b]);
    assert!(world.mind.members()[&id("a")].stuck.is_none(), "its time begins once it has loaded");
    world.pass(secs(2), &[a, b]);
    assert!(world.mind.members()[&id("a")].stuck.is_some());
}

#[test]
fn a_refused_role_record_is_written_again_when_nobody_else_moves() {
    let mut world = World::new();
    world.refuses = Some(keys::role(&id("a")));
    let a = world.hello("a", 1, beat(Phase::Waiting, Role::None, 0));
    let b = world.hello("b", 1, beat(Phase::Waiting, Role::None, 0));
    world.pass(secs(1), &[a, b]);
    assert_eq!(world.roles(), "pm", "the other serves alone");
    let member = &world.mind.members()[&id("a")];
    assert_eq!(member.stuck, Some(Stuck::Unwritable("as the test wants it".into())));
    world.refuses = None;
    world.pass(secs(25), &[a, b]);
    assert_eq!(world.assigned.iter().filter(|(to, _)| *to == a).count(), 0, "while the other is on its way");
    world.obey(b);
    world.pass(secs(11), &[a, b]);
    assert_eq!(world.obey(a).0, Role::Prefill);
    assert_eq!(world.roles(), "pd");
}

#[test]
fn a_refused_instance_record_is_written_again() {
    let mut world = World::new();
    world.refuses = Some(keys::instance(&id("a")));
    let a = world.hello("a", 1, silent());
    world.refuses = None;
    world.pass(secs(9), &[a]);
    assert!(!world.stored.contains_key("/baton/v1/instances/a"));
    world.pass(secs(2), &[a]);
    assert!(world.stored.contains_key("/baton/v1/instances/a"));
}
