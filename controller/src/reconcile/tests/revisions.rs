//! Instances of two revisions in one group: a party is given up for another only when that costs nobody who serves.

use super::*;

impl World {
    fn hello_of(&mut self, name: &str, incarnation: u64, revision: &str, beat: Beat) -> SessionId {
        self.last_session += 1;
        let session = SessionId(self.last_session);
        let mut spec = instance_spec(name, incarnation);
        spec.model.revision = revision.into();
        self.event(Event::Hello { session, spec: Box::new(spec), beat, unix_millis: 0 });
        session
    }
}

fn waiting() -> Beat {
    beat(Phase::Waiting, Role::None, 0)
}

#[test]
fn the_only_one_that_serves_is_not_cordoned_for_two_that_load() {
    let mut world = World::new();
    let a = world.hello_of("a", 1, "one", silent());
    let b = world.hello_of("b", 1, "one", silent());
    world.obey(a);
    world.obey(b);
    let c = world.hello_of("c", 1, "two", waiting());
    world.obey(c);
    assert_eq!(world.roles(), "pd0");
    world.event(Event::Closed { session: b });
    let b = world.hello_of("b", 2, "two", silent());
    assert_eq!(world.roles(), "m00", "it serves alone, as its partner is another now");
    world.obey(a);
    world.pass(secs(30), &[a, b, c]);
    assert_eq!(world.roles(), "m00");

    // Only when it goes do the others take over.
    world.event(Event::Closed { session: a });
    let a = world.hello_of("a", 2, "two", silent());
    world.beat(b, waiting());
    world.pass(secs(1), &[a, b, c]);
    let mut roles: Vec<_> = world.roles().chars().collect();
    roles.sort_unstable();
    assert!(roles.contains(&'p') && roles.contains(&'d') && !roles.contains(&'0'), "{roles:?}");
}

#[test]
fn one_that_serves_is_cordoned_only_when_others_serve_both_phases() {
    let mut world = World::under(EPOCH + 50);
    let serving = |role, epoch| beat(Phase::Ready, role, EPOCH + epoch);
    // A store that began anew: everyone comes with a role. Three of the new revision prefill, so it is the larger.
    let a = world.hello_of("a", 1, "one", serving(Role::Prefill, 1));
    let b = world.hello_of("b", 1, "one", serving(Role::Decode, 2));
    let c = world.hello_of("c", 1, "two", serving(Role::Prefill, 3));
    let d = world.hello_of("d", 1, "two", serving(Role::Prefill, 4));
    let e = world.hello_of("e", 1, "two", serving(Role::Prefill, 5));
    let all = [a, b, c, d, e];
    world.pass(secs(9), &all);
    assert_eq!(world.roles(), "pdppp", "while others may be on their way back");
    world.pass(secs(2), &all);
    // One of the new becomes decode first; then the old go, one after the other.
    assert_eq!(world.roles(), "pdppd");
    world.pass(secs(5), &all);
    assert_eq!(world.roles(), "pdppd");
    world.obey(e);
    assert_eq!(world.roles(), "0dppd");
    world.pass(secs(5), &all);
    assert_eq!(world.roles(), "0dppd", "one at a time");
    world.obey(a);
    assert_eq!(world.roles(), "00ppd");
}
