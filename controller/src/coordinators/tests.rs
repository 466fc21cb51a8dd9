//! Hellos, beats and silence of coordinators, and what is listed of them.

use baton_proto::Incarnation;

use super::*;

const LEASE: Duration = Duration::from_secs(6);
const EPOCH: LeaderEpoch = LeaderEpoch(5);

fn id(id: &str) -> CoordinatorId {
    CoordinatorId::new(id).expect("a good id")
}

fn hello(name: &str, incarnation: u64, session: u64) -> Hello {
    let spec = CoordinatorSpec {
        id: id(name),
        incarnation: Incarnation(incarnation),
        http_endpoint: format!("{name}:8000"),
        admin_endpoint: String::new(),
        version: "1".into(),
        models: Vec::new(),
    };
    Hello { session: SessionId(session), spec, beat: CoordinatorBeat::default(), unix_millis: session }
}

fn beat(requests: u64) -> CoordinatorBeat {
    CoordinatorBeat { requests, ..CoordinatorBeat::default() }
}

/// Id, incarnation and requests of all that are listed.
fn listed(coordinators: &Coordinators, now: Instant) -> Vec<(String, u64, u64)> {
    let view = |of: Registered| (of.spec.id.to_string(), of.spec.incarnation.0, of.beat.requests);
    coordinators.list(EPOCH, now).into_iter().map(view).collect()
}

#[test]
fn listed_from_hello_until_the_lease_after_the_last_beat() {
    let (all, now) = (Coordinators::default(), Instant::now());
    all.hello(EPOCH, hello("b", 1, 1), LEASE, now).expect("is taken");
    all.hello(EPOCH, hello("a", 1, 2), LEASE, now).expect("is taken");
    assert_eq!(listed(&all, now), [("a".into(), 1, 0), ("b".into(), 1, 0)]);
    let later = now + LEASE / 2;
    all.beat(EPOCH, SessionId(2), &id("a"), beat(9), LEASE, later).expect("is taken");
    assert_eq!(listed(&all, now + LEASE - Duration::from_millis(1)).len(), 2);
    assert_eq!(listed(&all, now + LEASE), [("a".into(), 1, 9)], "b was silent");
    assert_eq!(all.list(EPOCH, now + LEASE)[0].last_beat, later);
    assert!(listed(&all, later + LEASE).is_empty());
    let error = all.beat(EPOCH, SessionId(2), &id("a"), beat(9), LEASE, later + LEASE);
    assert_eq!(error.expect_err("it has to say hello again").code, ErrorCode::NotFound);
}

#[test]
fn how_many_serve_is_known_a_lease_after_the_first_hello() {
    let (all, now) = (Coordinators::default(), Instant::now());
    let serving = |now| all.serving(EPOCH, LEASE, now);
    all.hello(EPOCH, hello("a", 1, 1), LEASE, now).expect("is taken");
    assert_eq!(serving(now), 0, "others may be on their way");
    let later = now + LEASE;
    all.hello(EPOCH, hello("a", 1, 1), LEASE, later).expect("is taken");
    all.hello(EPOCH, hello("b", 1, 2), LEASE, later).expect("is taken");
    assert_eq!(serving(later), 2);
    let drains = CoordinatorBeat { draining: true, ..beat(1) };
    all.beat(EPOCH, SessionId(2), &id("b"), drains, LEASE, later).expect("is taken");
    assert_eq!(serving(later), 1);
    assert_eq!(serving(later + LEASE), 0, "both were silent");
    // One that comes when the term is over stands for nobody else.
    all.hello(EPOCH, hello("a", 1, 1), LEASE, later).expect("is taken");
    assert_eq!(serving(later), 1);
    all.over(EPOCH);
    all.hello(EPOCH, hello("a", 1, 1), LEASE, later).expect("is taken");
    assert_eq!(serving(later), 0);
    // Whoever leads next has to hear from them first.
    let next = LeaderEpoch(EPOCH.0 + 1);
    all.hello(next, hello("a", 1, 3), LEASE, later).expect("is taken");
    assert_eq!((serving(later), all.serving(next, LEASE, later)), (0, 0));
}

#[test]
fn who_leaves_is_gone_at_once_and_takes_no_successor_along() {
    let (all, now) = (Coordinators::default(), Instant::now());
    all.hello(EPOCH, hello("a", 1, 1), LEASE, now).expect("is taken");
    all.hello(EPOCH, hello("a", 2, 2), LEASE, now).expect("is taken");
    all.left(EPOCH, SessionId(1), &id("a"));
    assert_eq!(listed(&all, now), [("a".into(), 2, 0)]);
    all.left(EPOCH, SessionId(2), &id("a"));
    assert!(listed(&all, now).is_empty());
}

#[test]
fn of_several_processes_the_latest_is_listed_and_the_others_are_closed() {
    let (all, now) = (Coordinators::default(), Instant::now());
    all.hello(EPOCH, hello("a", 5, 1), LEASE, now).expect("is taken");
    // The same process calls again, and its first stream has not broken yet.
    all.hello(EPOCH, hello("a", 5, 2), LEASE, now).expect("is taken");
    let closed = all.beat(EPOCH, SessionId(1), &id("a"), beat(1), LEASE, now);
    assert_eq!(closed.expect_err("is closed").code, ErrorCode::AlreadyExists);
    all.hello(EPOCH, hello("a", 6, 3), LEASE, now).expect("a later one is taken");
    assert!(all.beat(EPOCH, SessionId(2), &id("a"), beat(1), LEASE, now).is_err());
    let refused = all.hello(EPOCH, hello("a", 5, 4), LEASE, now).expect_err("the earlier one calls again");
    assert_eq!(refused.code, ErrorCode::AlreadyExists);
    assert!(refused.message.contains("incarnation 6, at a:8000"), "{refused}");
    assert_eq!(listed(&all, now), [("a".into(), 6, 0)]);
    // A clock that was set back costs a lease, no more.
    all.hello(EPOCH, hello("a", 5, 5), LEASE, now + LEASE).expect("the later one is gone");
}

#[test]
fn there_are_only_so_many() {
    let (all, now) = (Coordinators::default(), Instant::now());
    for number in 0..COORDINATORS_MOST as u64 {
        all.hello(EPOCH, hello(&format!("c{number}"), 1, number), LEASE, now).expect("is taken");
    }
    let refused = all.hello(EPOCH, hello("one-more", 1, 9999), LEASE, now).expect_err("is one too many");
    assert_eq!(refused.code, ErrorCode::QueueFull);
    all.hello(EPOCH, hello("c7", 2, 9999), LEASE, now).expect("who is there may come again");
    all.left(EPOCH, SessionId(0), &id("c0"));
    all.hello(EPOCH, hello("one-more", 1, 9999), LEASE, now).expect("there is room");
}

#[test]
fn nothing_outlives_the_term() {
    let (all, now) = (Coordinators::default(), Instant::now());
    all.hello(EPOCH, hello("a", 1, 1), LEASE, now).expect("is taken");
    let (before, after) = (LeaderEpoch(EPOCH.0 - 1), LeaderEpoch(EPOCH.0 + 1));
    assert!(all.list(before, now).is_empty() && all.list(after, now).is_empty());
    all.over(before);
    assert_eq!(listed(&all, now).len(), 1, "another term's end is nothing to this one");
    all.over(EPOCH);
    assert!(listed(&all, now).is_empty());

    all.hello(EPOCH, hello("a", 1, 1), LEASE, now).expect("is taken");
    all.hello(after, hello("b", 1, 2), LEASE, now).expect("the next term begins");
    assert_eq!(all.list(after, now).len(), 1, "with what it has heard itself");
    let late = all.hello(EPOCH, hello("c", 1, 3), LEASE, now).expect_err("comes too late");
    assert_eq!(late.code, ErrorCode::Unavailable);
    assert!(all.beat(EPOCH, SessionId(1), &id("a"), beat(1), LEASE, now).is_err());
}

/// Prefill, decode, handoffs, failures, mean.
type Told<'a> = (&'a str, &'a str, u64, u64, u64);

fn links_beat(links: &[Told<'_>], all_links: bool) -> CoordinatorBeat {
    let id = |name: &str| InstanceId::new(name).expect("a good id");
    let link = |&(prefill, decode, handoffs, failures, mean_micros): &Told<'_>| LinkUse {
        prefill: id(prefill),
        decode: id(decode),
        handoffs,
        failures,
        mean_micros,
    };
    CoordinatorBeat { links: links.iter().map(link).collect(), all_links, ..CoordinatorBeat::default() }
}

fn told(links: &[LinkUse]) -> Vec<Told<'_>> {
    let view = |link: &LinkUse| (link.handoffs, link.failures, link.mean_micros);
    let flat = |link| {
        let (handoffs, failures, mean) = view(link);
        (link.prefill.as_str(), link.decode.as_str(), handoffs, failures, mean)
    };
    links.iter().map(flat).collect()
}

#[test]
fn beats_are_merged_and_say_what_is_more() {
    let (all, now) = (Coordinators::default(), Instant::now());
    let beat = links_beat(&[("p", "d", 30, 1, 9), ("p", "e", 5, 0, 9)], true);
    all.hello(EPOCH, Hello { beat, ..hello("a", 1, 1) }, LEASE, now).expect("is taken");
    let beat = |links: &[Told<'_>], full| {
        let beat = links_beat(links, full);
        all.beat(EPOCH, SessionId(1), &id("a"), beat, LEASE, now).expect("is taken")
    };
    let held = || all.list(EPOCH, now).remove(0).links;
    assert_eq!(told(&beat(&[], false)), []);
    assert_eq!(held().len(), 2, "who tells of none has used none");
    // One that is new has nothing to be compared with yet.
    let more = beat(&[("q", "d", 7, 7, 9), ("p", "e", 6, 2, 8)], false);
    assert_eq!(told(&more), [("p", "e", 1, 2, 8)]);
    assert_eq!(told(&held()), [("q", "d", 7, 7, 9), ("p", "e", 6, 2, 8), ("p", "d", 30, 1, 9)]);
    let more = beat(&[("q", "d", 7, 8, 9), ("p", "e", 6, 2, 8)], false);
    assert_eq!(told(&more), [("q", "d", 0, 1, 9)], "what is told again is no more");
    assert_eq!(told(&beat(&[("q", "d", 9, 8, 9)], true)), [("q", "d", 2, 0, 9)]);
    assert_eq!(told(&held()), [("q", "d", 9, 8, 9)], "all there are");
    assert_eq!(told(&beat(&[("q", "d", 1, 0, 9)], false)), [], "counts that go back are no more");
}

#[test]
fn no_number_of_beats_makes_a_coordinator_have_more_links_than_it_may() {
    let (all, now) = (Coordinators::default(), Instant::now());
    all.hello(EPOCH, hello("a", 1, 1), LEASE, now).expect("is taken");
    for round in 0..5 {
        let names: Vec<String> = (0..LINKS_MOST / 2).map(|number| format!("p{round}-{number}")).collect();
        let links: Vec<Told<'_>> = names.iter().map(|name| (name.as_str(), "d", 1, 0, 0)).collect();
        let beat = links_beat(&links, false);
        all.beat(EPOCH, SessionId(1), &id("a"), beat, LEASE, now).expect("is taken");
    }
    let held = all.list(EPOCH, now).remove(0).links;
    assert_eq!((held.len(), held[0].prefill.as_str()), (LINKS_MOST, "p4-0"));
}

fn with_links(links: &[Told<'_>]) -> Registered {
    let (all, now) = (Coordinators::default(), Instant::now());
    let beat = links_beat(links, true);
    all.hello(EPOCH, Hello { beat, ..hello("a", 1, 1) }, LEASE, now).expect("is taken");
    all.list(EPOCH, now).remove(0)
}

#[test]
fn links_add_up_over_coordinators() {
    let (one, other) = (
        with_links(&[("p", "d", 30, 1, 1000), ("p", "e", 5, 0, 0), ("q", "d", 0, 2, 0)]),
        with_links(&[("p", "d", 10, 2, 5000), ("p", "e", 1, 0, 700)]),
    );
    let (all, left_out) = links(&[one.clone(), other.clone()], 10);
    let view = |link: &LinkUse| {
        let names = format!("{}>{}", link.prefill, link.decode);
        (names, link.handoffs, link.failures, link.mean_micros)
    };
    assert_eq!(left_out, 0);
    assert_eq!(
        all.iter().map(view).collect::<Vec<_>>(),
        [("p>d".into(), 40, 3, 2000), ("p>e".into(), 6, 0, 700), ("q>d".into(), 0, 2, 0)]
    );
    let (most_used, left_out) = links(&[one, other], 1);
    assert_eq!((most_used.len(), left_out), (1, 2));
    assert_eq!(most_used[0].decode.as_str(), "d");

    let lies = with_links(&[("p", "d", u64::MAX, u64::MAX, u64::MAX), ("p", "d", u64::MAX, 1, u64::MAX)]);
    let (all, _) = links(&[lies.clone(), lies], 10);
    assert_eq!((all[0].handoffs, all[0].failures), (u64::MAX, u64::MAX));
}
