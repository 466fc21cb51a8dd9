//! What time ends: registrations of the silent, places of the lost, memories of the gone.

use super::*;

#[test]
fn silence_alone_ends_a_registration() {
    let (mut world, a, b) = World::pair();
    world.pass(secs(5), &[a]);
    assert!(world.closed.is_empty());
    world.pass(secs(2), &[a]);
    assert_eq!(world.closed, [b]);
    assert!(!world.stored.contains_key("/baton/v1/instances/b"));
    // A late beat of the ended session changes nothing.
    world.beat(b, beat(Phase::Ready, Role::Mixed, EPOCH + 100));
    assert!(!world.stored.contains_key("/baton/v1/instances/b"));
}

#[test]
fn a_lost_instance_that_stays_away_is_done_without() {
    let (mut world, a, b) = World::pair();
    world.event(Event::Closed { session: b });
    world.pass(secs(11), &[a]);
    assert_eq!(world.roles(), "m");
    world.obey(a);
    // Its role is remembered: on its return the other makes room, once it serves.
    let b = world.hello("b", 2, silent());
    assert_eq!(world.last_assigned(b).role, Role::Decode);
    world.pass(secs(1), &[a, b]);
    assert_eq!(world.roles(), "md");
    world.obey(b);
    assert_eq!(world.roles(), "pd");
}

#[test]
fn a_frozen_instance_has_its_role_again_under_a_new_epoch() {
    for away in [7, 30] {
        let (mut world, a, b) = World::pair();
        let held = world.last_assigned(b);
        world.pass(secs(2), &[a]);
        let again = world.hello("b", 1, beat(Phase::Ready, held.role, held.epoch.0));
        assert_eq!(world.last_assigned(b).epoch, held.epoch, "it was not lost yet");
        // Its session has ended meanwhile, and it is the same process.
        world.event(Event::Closed { session: again });
        world.pass(secs(away), &[a]);
        let back = world.hello("b", 1, beat(Phase::Ready, held.role, held.epoch.0));
        let desired = world.last_assigned(back);
        assert_eq!(desired.role, held.role, "after {away} s");
        assert!(desired.epoch > held.epoch, "after {away} s: {desired:?}, it held {held:?}");
        assert_eq!(DesiredRole::decode(&world.stored["/baton/v1/roles/b"]).expect("a role"), desired);
        assert_eq!(world.obey(back).0, Role::Decode);
    }
}

#[test]
fn roles_of_the_gone_fade_from_memory() {
    let (mut world, a, b) = World::pair();
    world.event(Event::Bye { session: b, reason: String::new() });
    assert_eq!(world.mind.remembered().count(), 1);
    world.pass(secs(3590), &[a]);
    assert!(world.stored.contains_key("/baton/v1/roles/b"));
    world.pass(secs(20), &[a]);
    assert!(!world.stored.contains_key("/baton/v1/roles/b"));
    assert_eq!(world.mind.remembered().count(), 0);
}

#[test]
fn no_more_of_the_gone_are_remembered_than_may_be_here() {
    let mut world = World::new();
    world.mind.sessions_config.max_instances = 2;
    for name in ["a", "b", "c", "d"] {
        let session = world.hello(name, 1, beat(Phase::Waiting, Role::None, 0));
        world.pass(secs(2), &[session]);
        world.obey(session);
        world.event(Event::Bye { session, reason: String::new() });
    }
    let remembered: Vec<_> = world.mind.remembered().map(|(id, _)| id.to_string()).collect();
    assert_eq!(remembered, ["c", "d"], "the longest gone are forgotten");
    let stored: Vec<_> = world.stored.keys().collect();
    assert_eq!(stored, ["/baton/v1/roles/c", "/baton/v1/roles/d"]);
}

#[test]
fn a_controller_that_stood_still_ends_no_registration() {
    let (mut world, a, b) = World::pair();
    world.pass(secs(3), &[a, b]);
    // Stopped for longer than the lease: it concludes before it reads what has come meanwhile.
    world.now += secs(30);
    world.settle();
    assert!(world.mind.members().values().all(Member::is_registered));
    assert_eq!(world.roles(), "pd");
    // Who stays silent is lost all the same, a lease later.
    world.pass(SessionConfig::default().lease + secs(1), &[a]);
    assert!(!world.mind.members()[&id("b")].is_registered());
}
