//! Those that do badly are set aside, unless nobody else does what they do.

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
