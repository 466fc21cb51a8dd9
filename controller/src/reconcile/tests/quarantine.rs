//! Those that do badly are set aside, unless nobody else does what they do.

use baton_registry::{HealthRecord, Standing};

use super::*;
use crate::fleet::health::Verdict;

/// Lets time pass with all serving what they were told; the work of `wedged` gets nowhere.
fn pass(world: &mut World, sessions: &[SessionId], wedged: Option<SessionId>, seconds: u64) {
    for _ in 0..seconds {
        for &session in sessions {
            let desired = world.last_assigned(session);
            let phase = if desired.role == Role::None { Phase::Waiting } else { Phase::Ready };
            let mut beat = beat(phase, desired.role, desired.epoch.0);
            beat.load.running_sequences = u32::from(wedged == Some(session));
            world.beat(session, beat);
        }
        world.now += Duration::from_secs(1);
        world.settle();
    }
}

#[test]
fn one_that_is_wedged_is_set_aside_and_comes_back() {
    let mut world = World::new();
    let waiting = beat(Phase::Waiting, Role::None, 0);
    let sessions: Vec<_> = ["a", "b", "c", "d"].map(|name| world.hello(name, 1, waiting)).into();
    world.pass(Duration::from_secs(3), &sessions);
    pass(&mut world, &sessions, None, 5);
    assert_eq!(world.roles(), "pddp");
    pass(&mut world, &sessions, Some(sessions[0]), 20);
    assert_eq!(world.roles(), "0ddp");
    let reason = &world.mind.members()[&id("a")].desired.as_ref().expect("decided").reason;
    assert!(reason.contains("computed nothing"), "{reason}");
    pass(&mut world, &sessions, None, 40);
    assert_eq!(world.roles(), "pddp");
}

#[test]
fn a_quarantine_outlives_the_leader_that_decided_it() {
    let mut world = World::new();
    let waiting = beat(Phase::Waiting, Role::None, 0);
    let names = ["a", "b", "c", "d"];
    let sessions: Vec<_> = names.map(|name| world.hello(name, 1, waiting)).into();
    world.pass(Duration::from_secs(3), &sessions);
    pass(&mut world, &sessions, None, 5);
    while world.roles() != "0ddp" {
        pass(&mut world, &sessions, Some(sessions[0]), 1);
    }
    let record =
        |world: &World| HealthRecord::decode(&world.stored[&keys::health(&id("a"))]).expect("a record");
    assert_eq!((record(&world).times, record(&world).left), (1, secs(30)));
    pass(&mut world, &sessions, None, 10);
    assert_eq!(record(&world).left, secs(30), "it is written once");

    let held = sessions.iter().map(|session| world.last_assigned(*session)).collect::<Vec<_>>();
    let mut next = World::under(EPOCH + 1000);
    (next.now, next.stored) = (world.now, world.stored.clone());
    let here = names.map(|name| (instance_spec(name, 1), None));
    let roles = names.map(id).into_iter().zip(held.clone()).collect();
    next.mind.inherit(here.into(), roles, next.now);
    let records = BTreeMap::from([(id("a"), record(&world))]);
    next.mind.inherit_health(records, next.now, record(&world).until_unix_millis - 20_000);
    let sessions: Vec<_> = names
        .into_iter()
        .zip(held)
        .map(|(name, held)| {
            let phase = if held.role == Role::None { Phase::Waiting } else { Phase::Ready };
            let session = next.hello(name, 1, beat(phase, held.role, held.epoch.0));
            next.assigned.push((session, held));
            session
        })
        .collect();
    pass(&mut next, &sessions, None, 19);
    assert_eq!(next.roles(), "0ddp");
    pass(&mut next, &sessions, None, 5);
    assert_eq!(next.roles(), "pddp");
    assert_eq!(record(&next).standing, Standing::Probation);
    pass(&mut next, &sessions, Some(sessions[0]), 10);
    assert_eq!(next.roles(), "0ddp", "and is on probation");
    assert_eq!(record(&next).times, 2);
}

#[test]
fn what_is_held_of_health_is_written_before_what_follows_from_it() {
    let a = || id("a");
    let mut records = [Record::Role(a()), Record::Status(a()), Record::Health(a()), Record::Instance(a())];
    records.sort();
    assert_eq!(records[0], Record::Health(a()));
}

#[test]
fn the_last_of_its_kind_stays_in_service_until_another_serves_it() {
    let mut world = World::new();
    let waiting = beat(Phase::Waiting, Role::None, 0);
    let sessions: Vec<_> = ["a", "b"].map(|name| world.hello(name, 1, waiting)).into();
    world.pass(Duration::from_secs(3), &sessions);
    pass(&mut world, &sessions, None, 5);
    assert_eq!(world.roles(), "pd");
    for _ in 0..40 {
        pass(&mut world, &sessions, Some(sessions[0]), 1);
        let roles = world.roles();
        assert!(["pd", "pm", "0m"].contains(&roles.as_str()), "{roles}");
    }
    assert_eq!(world.roles(), "0m");
    let verdicts = world.mind.health.verdicts().filter(|(_, verdict)| *verdict != Verdict::Healthy);
    assert_eq!(verdicts.count(), 1);
}

/// The store did not answer when it was decided; by the time that it does, the other one that did the same is gone.
#[test]
fn what_was_not_told_yet_is_taken_back_when_nobody_else_is_left() {
    let mut world = World::new();
    let waiting = beat(Phase::Waiting, Role::None, 0);
    let mut sessions: Vec<_> = ["a", "b", "c"].map(|name| world.hello(name, 1, waiting)).into();
    world.pass(Duration::from_secs(3), &sessions);
    pass(&mut world, &sessions, None, 5);
    assert_eq!(world.roles(), "pdd");
    let desired = |world: &World| world.mind.members()[&id("b")].desired.clone().expect("decided");
    world.unreachable = true;
    let told = world.assigned.len();
    pass(&mut world, &sessions, Some(sessions[1]), 20);
    assert_eq!(desired(&world).role, Role::None);
    let session = sessions.pop().expect("c's");
    world.event(Event::Bye { session, reason: "gone".into() });
    assert_eq!(desired(&world).role, Role::Decode);
    let reason = desired(&world).reason;
    assert!(reason.starts_with("until another serves what it serves, not none: "), "{reason}");
    assert_eq!(world.assigned.len(), told, "nobody is told anything");

    world.unreachable = false;
    world.settle();
    pass(&mut world, &sessions, Some(sessions[1]), 5);
    let of = |name: &str| -> Vec<_> {
        let of = |(session, _): &&(SessionId, DesiredRole)| *session == sessions[usize::from(name == "b")];
        world.assigned[told..].iter().filter(of).map(|(_, desired)| desired.role).collect()
    };
    assert_eq!((of("a"), of("b")), (vec![Role::Mixed], vec![Role::Decode, Role::None]));
}
