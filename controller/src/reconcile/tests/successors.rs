//! What a controller makes of a fleet that it did not see begin: a store begun anew, a leadership taken over.

use super::*;

#[test]
fn an_embedded_store_that_begins_anew_changes_no_role() {
    let (world, a, b) = World::pair();
    let held = |session| {
        let desired = world.last_assigned(session);
        beat(Phase::Ready, desired.role, desired.epoch.0)
    };
    let (beat_a, beat_b) = (held(a), held(b));
    let mut world = World::under(EPOCH + 50);
    let b = world.hello("b", 1, beat_b);
    // Only one is back, and that for longer than it takes to settle.
    world.pass(secs(5), &[b]);
    assert_eq!(world.roles(), "d");
    let a = world.hello("a", 1, beat_a);
    world.pass(secs(60), &[a, b]);
    assert_eq!(world.roles(), "pd");
    assert_eq!(world.assigned, [], "nobody was told anything");
    let record = DesiredRole::decode(&world.stored["/baton/v1/roles/a"]).expect("a record");
    assert_eq!((record.role, record.epoch), (beat_a.role, beat_a.role_epoch));

    // The next change is later than all before, for everyone.
    world.event(Event::Bye { session: b, reason: String::new() });
    assert!(world.last_assigned(a).epoch.0 >= EPOCH + 50);
}

#[test]
fn an_adopted_role_is_told_to_the_next_process_under_an_epoch_of_this_term() {
    // The store that began anew does not know of EPOCH + 9, which this id was told and had not taken on.
    let mut world = World::under(EPOCH + 50);
    let session = world.hello("b", 1, beat(Phase::Ready, Role::Decode, EPOCH + 1));
    world.pass(secs(1), &[session]);
    world.event(Event::Closed { session });
    let session = world.hello("b", 2, beat(Phase::Loading, Role::None, 0));
    let told = world.last_assigned(session);
    assert_eq!((told.role, told.epoch.0), (Role::Decode, EPOCH + 50));
}

#[test]
fn an_adopted_instance_that_stays_alone_becomes_mixed_in_the_end() {
    let mut world = World::under(EPOCH + 50);
    let b = world.hello("b", 1, beat(Phase::Ready, Role::Decode, EPOCH + 1));
    world.pass(secs(9), &[b]);
    assert_eq!(world.roles(), "d");
    world.pass(secs(2), &[b]);
    assert_eq!(world.roles(), "m");
}

#[test]
fn a_new_leader_inherits_without_a_change() {
    let (old, a, b) = World::pair();
    let roles: BTreeMap<_, _> =
        [("a", a), ("b", b)].map(|(name, session)| (id(name), old.last_assigned(session))).into();
    let beats = |name: &str| {
        let desired = &roles[&id(name)];
        beat(Phase::Ready, desired.role, desired.epoch.0)
    };
    let (beat_a, beat_b) = (beats("a"), beats("b"));
    let mut world = World::under(EPOCH + 50);
    let left = vec![(instance_spec("a", 1), Some(beat_a)), (instance_spec("b", 1), Some(beat_b))];
    world.mind.inherit(left, roles.clone(), world.now);
    world.settle();
    assert_eq!(world.stored.len(), 4, "instances and status stand under the new leader's lease");
    let a = world.hello("a", 1, beat_a);
    world.pass(secs(1), &[a]);
    let b = world.hello("b", 1, beat_b);
    world.pass(secs(30), &[a, b]);
    assert_eq!(world.roles(), "pd");
    assert_eq!(world.assigned, []);

    // One that missed its last assignment is told on its return.
    let mut world = World::under(EPOCH + 60);
    world.mind.inherit(
        vec![(instance_spec("a", 1), Some(beat_a)), (instance_spec("b", 1), Some(beat_b))],
        roles.clone(),
        world.now,
    );
    let a = world.hello("a", 1, beat(Phase::Waiting, Role::None, 0));
    assert_eq!(world.last_assigned(a), roles[&id("a")]);
}

#[test]
fn an_inherited_instance_that_never_calls_is_dropped() {
    let (old, a, b) = World::pair();
    let roles: BTreeMap<_, _> =
        [("a", a), ("b", b)].map(|(name, session)| (id(name), old.last_assigned(session))).into();
    let mut world = World::under(EPOCH + 50);
    world.mind.inherit(
        vec![(instance_spec("a", 1), None), (instance_spec("b", 1), None)],
        roles.clone(),
        world.now,
    );
    let a = world.hello("a", 1, beat(Phase::Ready, Role::Prefill, roles[&id("a")].epoch.0));
    world.pass(secs(7), &[a]);
    assert!(!world.stored.contains_key("/baton/v1/instances/b"));
    assert_eq!(world.roles(), "pd");
    world.pass(secs(4), &[a]);
    assert_eq!(world.roles(), "m");
}

#[test]
fn an_inherited_instance_is_not_moved_before_it_is_heard() {
    // The earlier leader ended before it heard that a serves.
    let mixed = DesiredRole {
        role: Role::Mixed,
        epoch: RoleEpoch(EPOCH),
        reason: String::new(),
        leader_epoch: LeaderEpoch(EPOCH),
        drain: None,
        cordoned: false,
    };
    let mut world = World::under(EPOCH + 50);
    let left = vec![(instance_spec("a", 1), Some(beat(Phase::Switching, Role::None, 0)))];
    world.mind.inherit(left, BTreeMap::from([(id("a"), mixed)]), world.now);
    let b = world.hello("b", 1, beat(Phase::Waiting, Role::None, 0));
    world.pass(secs(1), &[b]);
    assert_eq!(world.roles(), "mp");
    let a = world.hello("a", 1, beat(Phase::Ready, Role::Mixed, EPOCH));
    world.pass(secs(1), &[a, b]);
    assert_eq!(world.roles(), "mp", "it goes on with both until b prefills");
    world.obey(b);
    assert_eq!(world.roles(), "dp");
}

#[test]
fn a_lost_instance_is_not_moved_before_it_is_back() {
    let (mut world, a, b) = World::pair();
    let held = world.last_assigned(a);
    world.event(Event::Closed { session: a });
    world.pass(secs(7), &[b]);
    world.event(Event::Bye { session: b, reason: String::new() });
    assert_eq!(world.roles(), "p", "it may serve all the same");
    let a = world.hello("a", 1, beat(Phase::Ready, Role::Prefill, held.epoch.0));
    assert_eq!((world.roles().as_str(), world.obey(a).0), ("p", Role::Prefill), "it is back, by a new epoch");
    assert_eq!((world.roles().as_str(), world.last_assigned(a).role), ("m", Role::Mixed));
}
