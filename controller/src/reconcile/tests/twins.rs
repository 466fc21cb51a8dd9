//! Processes of one id: which of them is the instance.

use super::*;

impl World {
    fn hello_from(&mut self, name: &str, incarnation: u64, endpoint: &str) -> SessionId {
        self.last_session += 1;
        let session = SessionId(self.last_session);
        let spec = InstanceSpec { inference_endpoint: endpoint.into(), ..instance_spec(name, incarnation) };
        self.event(Event::Hello { session, spec: Box::new(spec), beat: silent(), unix_millis: 0 });
        session
    }

    fn incarnation(&self, name: &str) -> u64 {
        self.mind.members()[&id(name)].spec.incarnation.0
    }
}

#[test]
fn a_twin_does_not_get_in_while_the_incumbent_is_cut_off() {
    let mut world = World::new();
    let incumbent = world.hello_from("a", 5, "x:1");
    world.event(Event::Closed { session: incumbent });
    let twin = world.hello_from("a", 6, "y:1");
    assert_eq!(world.refused, [(twin, ErrorCode::AlreadyExists, Some(5))]);
    let back = world.hello_from("a", 5, "x:1");
    assert_eq!(world.refused.len(), 1);
    assert_eq!(world.incarnation("a"), 5);

    // Gone for longer than its lease, it is replaced.
    world.event(Event::Closed { session: back });
    world.pass(secs(5), &[]);
    world.hello_from("a", 6, "y:1");
    assert_eq!(world.refused.len(), 2);
    world.pass(secs(2), &[]);
    world.hello_from("a", 6, "y:1");
    assert_eq!((world.refused.len(), world.incarnation("a")), (2, 6));
    let late = world.hello_from("a", 5, "x:1");
    assert_eq!(world.refused[2], (late, ErrorCode::StaleEpoch, Some(6)));
}

#[test]
fn a_twin_does_not_get_in_after_a_takeover() {
    let mut world = World::under(EPOCH + 50);
    world.mind.inherit(vec![(instance_spec("a", 5), None)], BTreeMap::new(), world.now);
    let twin = world.hello_from("a", 6, "y:1");
    assert_eq!(world.refused, [(twin, ErrorCode::AlreadyExists, Some(5))]);
    world.hello("a", 5, silent());
    assert_eq!((world.refused.len(), world.incarnation("a")), (1, 5));
}

#[test]
fn a_process_that_its_supervisor_starts_again_need_not_wait() {
    let mut world = World::new();
    let mut start = |incarnation: u64, supervisor: &str| {
        let mut spec = instance_spec("a", incarnation);
        spec.inference_endpoint = format!("x:{incarnation}");
        spec.labels.insert("supervisor".into(), supervisor.into());
        world.last_session += 1;
        let session = SessionId(world.last_session);
        world.event(Event::Hello { session, spec: Box::new(spec), beat: silent(), unix_millis: 0 });
        world.event(Event::Closed { session });
        (world.refused.len(), world.incarnation("a"))
    };
    assert_eq!(start(5, "one"), (0, 5));
    assert_eq!(start(6, "one"), (0, 6));
    assert_eq!(start(7, "another"), (1, 6), "of another supervisor");
}

#[test]
fn a_process_that_starts_again_at_its_address_need_not_wait() {
    let mut world = World::new();
    let first = world.hello_from("a", 5, "x:1");
    world.event(Event::Closed { session: first });
    world.hello_from("a", 6, "x:1");
    assert_eq!((world.refused.len(), world.incarnation("a")), (0, 6));
}

#[test]
fn two_processes_of_one_incarnation_are_told_apart_by_their_addresses() {
    let mut world = World::new();
    let incumbent = world.hello_from("a", 5, "x:1");
    let twin = world.hello_from("a", 5, "y:1");
    assert_eq!(world.refused, [(twin, ErrorCode::AlreadyExists, Some(5))]);
    assert_eq!(world.mind.members()[&id("a")].session(), Some(incumbent));
    world.pass(secs(7), &[]);
    let twin = world.hello_from("a", 5, "y:1");
    assert_eq!(
        world.mind.members()[&id("a")].session(),
        Some(twin),
        "the other has been silent for its lease"
    );
}
