//! A group's moves in a period are bounded, whatever asks for them; what it cannot serve without is moved all the same.

use std::num::NonZeroU32;

use baton_proto::{Cordoned, Targets};

use super::*;

/// Ten that serve, five of each role, of whom two may be moved in a minute; all are to decode but one.
fn lopsided() -> (World, Vec<SessionId>) {
    let mut world = World::new();
    world.mind.roles_config.moves_most = 2;
    let waiting = beat(Phase::Waiting, Role::None, 0);
    let names: Vec<_> = ('a'..='j').map(String::from).collect();
    let sessions: Vec<_> = names.iter().map(|name| world.hello(name, 1, waiting)).collect();
    world.pass(secs(8), &sessions);
    for session in &sessions {
        world.obey(*session);
    }
    assert_eq!(count(&world), (5, 5));
    (world, sessions)
}

fn targets() -> Change {
    let (prefill, decode) = (NonZeroU32::new(1), NonZeroU32::new(9));
    let group = GroupName::default();
    Change::Divide { group, targets: Some(Targets { prefill, decode, ..Targets::default() }) }
}

fn count(world: &World) -> (usize, usize) {
    let roles = world.roles();
    (roles.matches('p').count(), roles.matches('d').count())
}

/// Lets time pass with everyone doing as told, at once.
fn run(world: &mut World, sessions: &[SessionId], seconds: u64) {
    for _ in 0..seconds {
        for session in sessions {
            world.obey(*session);
        }
        world.pass(secs(1), &[]);
    }
}

fn plan(mind: &Reconciler, now: Instant) -> GroupPlan {
    mind.plans(now).pop().expect("one group")
}

#[test]
fn a_ratio_is_approached_at_no_more_than_so_many_moves_a_period() {
    let (mut world, sessions) = lopsided();
    world.mind.change(targets()).expect("the group is there");
    run(&mut world, &sessions, 10);
    assert_eq!(count(&world), (3, 7), "two of four");
    let plan = plan(&world.mind, world.now);
    let (made, most) = (plan.moves.made, plan.moves.most);
    assert!((made, most) == (2, 2) && plan.moves.wait > secs(45), "{:?}", plan.moves);
    let waits = plan.members.iter().filter_map(|member| match &member.step {
        Step::Waits(what) => Some(what.as_str()),
        _ => None,
    });
    let waits: Vec<_> = waits.collect();
    assert_eq!(waits.len(), 2);
    assert!(waits.iter().all(|what| what.ends_with("2 of at most 2 were made in 60 s")), "{waits:?}");
    run(&mut world, &sessions, 45);
    assert_eq!(count(&world), (3, 7));
    // By time alone.
    run(&mut world, &sessions, 10);
    assert_eq!(count(&world), (1, 9));
    run(&mut world, &sessions, 200);
    assert_eq!((count(&world), world.mind.plans(world.now)[0].moves.made), ((1, 9), 0));
}

#[test]
fn a_dry_run_says_what_waits_for_the_next_move() {
    let (mut world, sessions) = lopsided();
    world.mind.change(targets()).expect("the group is there");
    run(&mut world, &sessions, 10);
    let mut what_if = world.mind.clone();
    let even = Targets { prefill: NonZeroU32::new(1), decode: NonZeroU32::new(1), ..Targets::default() };
    what_if.change(Change::Divide { group: GroupName::default(), targets: Some(even) }).expect("it is there");
    let plan = plan(&what_if, world.now);
    let steps: Vec<_> = plan.members.iter().filter(|member| member.step != Step::Keeps).collect();
    let waits =
        |member: &&MemberPlan| matches!(&member.step, Step::Waits(what) if what.contains("next move"));
    assert!(!steps.is_empty() && steps.iter().all(waits), "{steps:?}");
}

#[test]
fn what_a_group_cannot_serve_without_waits_for_nothing() {
    let (mut world, mut sessions) = lopsided();
    world.mind.change(targets()).expect("the group is there");
    run(&mut world, &sessions, 70);
    run(&mut world, &sessions, 70);
    assert_eq!(count(&world), (1, 9));
    world.mind.roles_config.moves_most = 1;
    let prefills = |world: &World| {
        let role = |member: &&Member| member.serving_role() == Some(Role::Prefill);
        world.mind.members().values().find(role).map(|member| member.spec.id.clone()).expect("one prefills")
    };
    for round in 0..3 {
        // The only one that prefills is gone, over and over.
        let session = world.mind.members()[&prefills(&world)].session().expect("it is here");
        sessions.retain(|other| *other != session);
        world.event(Event::Bye { session, reason: String::new() });
        assert_eq!(count(&world).0, 1, "round {round}");
        run(&mut world, &sessions, 1);
    }
    // It is to go, and somebody has to take its place first.
    let (by, reason) = ("alice".into(), String::new());
    let cordoned = Cordoned { by, reason, unix_millis: 1, drain: None, force: false };
    let id = prefills(&world);
    world
        .mind
        .change(Change::Cordon { id: id.clone(), cordoned, only: Only::Always })
        .expect("others are there");
    run(&mut world, &sessions, 3);
    assert_ne!(prefills(&world), id);
    assert_eq!(world.mind.members()[&id].serving_role(), None);
}

#[test]
fn who_is_pinned_by_an_operator_waits_for_no_room_and_takes_it() {
    let (mut world, sessions) = lopsided();
    world.mind.change(targets()).expect("the group is there");
    run(&mut world, &sessions, 10);
    assert_eq!(count(&world), (3, 7));
    let decodes = |member: &&Member| member.serving_role() == Some(Role::Decode);
    let id = world.mind.members().values().find(decodes).map(|member| member.spec.id.clone()).expect("one");
    world.mind.change(Change::Pin { id: id.clone(), pinned: pinned(Role::Prefill) }).expect("it is here");
    run(&mut world, &sessions, 2);
    assert_eq!(world.mind.members()[&id].serving_role(), Some(Role::Prefill));
    // The others of that minute are over, and this one is not.
    run(&mut world, &sessions, 54);
    let Budget { made, wait, .. } = plan(&world.mind, world.now).moves;
    assert!(made == 2 && wait < secs(15), "{made}, {wait:?}");
}
