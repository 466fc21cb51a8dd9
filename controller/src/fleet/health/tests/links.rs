//! Links that lose handoffs, and who is to blame for them: coordinators' reports beside those of instances.

use baton_proto::LinkUse;

use super::*;

/// Failures of each link in a second, of ten handoffs.
type Broken<'a> = &'a [(&'a str, &'a str, u64)];

impl Group {
    /// Seconds in which everybody hands over to everybody, and some links lose so many of ten.
    fn hand_over(&mut self, seconds: u64, broken: Broken<'_>) -> Vec<LinkChange> {
        let names = |role| {
            let of_role = self.instances.iter().filter(move |instance| instance.beat.role == role);
            of_role.map(|instance| instance.spec.id.clone()).collect::<Vec<_>>()
        };
        let (prefills, decodes) = (names(Role::Prefill), names(Role::Decode));
        let mut links = Vec::new();
        for (prefill, decode) in prefills.iter().flat_map(|p| decodes.iter().map(move |d| (p, d))) {
            let is = |(p, d, _): &&(&str, &str, u64)| (*p, *d) == (prefill.as_str(), decode.as_str());
            let failures = broken.iter().find(is).map_or(0, |(_, _, failures)| *failures);
            let (prefill, decode) = (prefill.clone(), decode.clone());
            links.push(LinkUse { prefill, decode, handoffs: 10 - failures, failures, mean_micros: 0 });
        }
        // What instances say of it themselves: the same, added up.
        for instance in &mut self.instances {
            let of_it = |link: &&LinkUse| link.prefill == instance.spec.id || link.decode == instance.spec.id;
            let own = links.iter().filter(of_it);
            let (handed, broken) =
                own.fold((0, 0), |sum, link| (sum.0 + link.handoffs, sum.1 + link.failures));
            instance.work = Work { handed, broken, ..instance.work };
        }
        let mut changes = Vec::new();
        for _ in 0..seconds {
            self.book.observe_handoffs(self.now, &links);
            self.second();
            changes.append(&mut self.link_changes);
        }
        changes
    }
}

#[test]
fn one_bad_link_is_shown_and_held_against_nobody() {
    for (prefill, decode) in [(2, 2), (3, 3), (2, 4)] {
        let mut group = Group::new(prefill, decode);
        assert_eq!(group.hand_over(60, &[]), []);
        let changes = group.hand_over(600, &[("p0", "d1", 10)]);
        let [LinkChange { ends, degraded: true, failing: Some(share) }] = &changes[..] else {
            panic!("{changes:?}")
        };
        assert_eq!(ends.to_string(), "p0 -> d1");
        assert!(*share > 0.2, "{share}");
        assert_eq!(group.quarantined(), Vec::<String>::new(), "{prefill} prefill, {decode} decode");
        assert_eq!(group.book.degraded_links(group.now).count(), 1);
        let changes = group.hand_over(600, &[]);
        assert!(matches!(&changes[..], [LinkChange { degraded: false, .. }]), "{changes:?}");
        assert_eq!(group.book.degraded_links(group.now).count(), 0);
    }
}

#[test]
fn a_link_that_carries_most_of_what_an_instance_gets_is_held_against_neither_end() {
    let mut group = Group::new(3, 3);
    group.hand_over(60, &[]);
    // By its own report d1 loses most of its caches, and twice as much as anybody.
    group.does("d1", Work { handed: 2, broken: 8, ..DECODES });
    group.does("p0", Work { handed: 20, broken: 8, ..PREFILLS });
    let used = |prefill: &str, failures| LinkUse {
        prefill: id(prefill),
        decode: id("d1"),
        handoffs: 1 - failures / 8,
        failures,
        mean_micros: 0,
    };
    for _ in 0..300 {
        group.book.observe_handoffs(group.now, &[used("p0", 8), used("p1", 0), used("p2", 0)]);
        group.second();
        assert_eq!(group.quarantined(), Vec::<String>::new());
    }
}

#[test]
fn who_loses_handoffs_with_most_of_its_peers_is_to_blame() {
    let mut group = Group::new(3, 3);
    group.hand_over(60, &[]);
    group.hand_over(60, &[("p1", "d0", 9), ("p1", "d2", 9)]);
    assert_eq!(group.quarantined(), ["p1"]);
    let Verdict::Quarantined { reason, .. } = group.verdict("p1") else {
        panic!("{:?}", group.verdict("p1"))
    };
    assert_eq!(reason.name(), "losing_caches");
    // Of one decode instance with many peers it could not be told before.
    let mut group = Group::new(4, 1);
    group.hand_over(60, &[]);
    group.hand_over(60, &[("p0", "d0", 9), ("p1", "d0", 9), ("p2", "d0", 9), ("p3", "d0", 9)]);
    assert_eq!(group.quarantined(), ["d0"]);
}

#[test]
fn a_network_that_is_down_is_nobodys_fault() {
    let mut group = Group::new(2, 2);
    group.hand_over(60, &[]);
    let all = [("p0", "d0", 9), ("p0", "d1", 9), ("p1", "d0", 9), ("p1", "d1", 9)];
    assert_eq!(group.hand_over(300, &all).len(), 4);
    assert_eq!(group.quarantined(), Vec::<String>::new());
}

#[test]
fn a_link_that_is_not_used_any_more_recovers_and_is_forgotten_with_its_instance() {
    let mut group = Group::new(2, 2);
    group.hand_over(60, &[("p0", "d1", 10)]);
    let before = group.book.degraded_links(group.now).count();
    for _ in 0..600 {
        group.second();
    }
    let recovered =
        LinkChange { ends: Ends { prefill: id("p0"), decode: id("d1") }, degraded: false, failing: None };
    assert_eq!((before, std::mem::take(&mut group.link_changes)), (1, vec![recovered]));
    // Of instances that nobody knows, nothing is kept.
    let stranger = |number: usize| LinkUse {
        prefill: id(&format!("x{number}")),
        decode: id("d0"),
        handoffs: 0,
        failures: 9,
        mean_micros: 0,
    };
    let many: Vec<_> = (0..100_000).map(stranger).collect();
    for _ in 0..20 {
        group.book.observe_handoffs(group.now, &many);
        group.second();
    }
    assert_eq!(group.link_changes, []);
}
