//! Tables over the merge of list and streams; builders that the scheduler's tests share.

use super::*;

pub(crate) fn spec(id: &str) -> Spec {
    Spec {
        id: InstanceId::new(id).expect("a good id"),
        incarnation: Incarnation(1),
        group: GroupName::default(),
        model: "tiny".into(),
        revision: "r1".into(),
        context_tokens: 1024,
        layout: "l1".into(),
        block_tokens: 16,
        inference_endpoint: format!("{id}:1"),
        handoff_endpoint: format!("{id}:2"),
    }
}

pub(crate) fn ready(role: Role) -> Duty {
    Duty { role, epoch: RoleEpoch(1), ready: true }
}

fn usable(fleet: &Fleet, now: Instant) -> Vec<&str> {
    fleet.usable(now).map(|(instance, _)| instance.spec.id.as_str()).collect()
}

const GRACE: Duration = Duration::from_secs(10);

fn fleet_of(ids: &[&str], now: Instant) -> Fleet {
    let mut fleet = Fleet::new(GRACE);
    let specs: Vec<_> = ids.iter().map(|id| spec(id)).collect();
    assert_eq!(fleet.list(&specs, now).len(), ids.len());
    for spec in &specs {
        fleet.up(&spec.id, Incarnation(1), ready(Role::Mixed));
    }
    fleet
}

#[test]
fn an_instance_is_usable_only_while_its_stream_says_ready() {
    let now = Instant::now();
    let mut fleet = Fleet::new(GRACE);
    let a = spec("a");
    fleet.list(std::slice::from_ref(&a), now);
    assert!(usable(&fleet, now).is_empty(), "listed alone is not enough");
    fleet.up(&a.id, Incarnation(1), Duty { ready: false, ..ready(Role::Prefill) });
    assert!(usable(&fleet, now).is_empty());
    fleet.duty(&a.id, ready(Role::Prefill));
    assert_eq!(usable(&fleet, now), ["a"]);
    fleet.down(&a.id, now);
    assert!(usable(&fleet, now).is_empty());
    fleet.up(&a.id, Incarnation(2), ready(Role::Prefill));
    assert!(usable(&fleet, now).is_empty(), "the list is a restart behind");
    let changes = fleet.list(&[Spec { incarnation: Incarnation(2), ..a.clone() }], now);
    assert!(matches!(changes.as_slice(), [Change::Target(spec)] if spec.incarnation == Incarnation(2)));
    assert_eq!(usable(&fleet, now), ["a"]);
}

#[test]
fn a_late_role_of_an_older_epoch_is_ignored() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a"], now);
    let id = spec("a").id;
    fleet.duty(&id, Duty { role: Role::Decode, epoch: RoleEpoch(5), ready: true });
    fleet.duty(&id, Duty { role: Role::Prefill, epoch: RoleEpoch(4), ready: true });
    assert_eq!(fleet.usable(now).next().map(|(_, duty)| duty.role), Some(Role::Decode));
}

#[test]
fn a_dropped_instance_with_a_live_stream_is_used_for_the_grace() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a", "b"], now);
    fleet.list(&[spec("b")], now);
    assert_eq!(usable(&fleet, now + GRACE), ["a", "b"]);
    assert_eq!(usable(&fleet, now + GRACE * 2), ["b"]);
}

#[test]
fn an_empty_list_means_that_the_controller_is_away() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a", "b"], now);
    fleet.list(&[], now);
    assert_eq!(usable(&fleet, now + GRACE * 100), ["a", "b"]);
}

#[test]
fn what_is_unlisted_and_unreachable_is_forgotten_after_the_grace() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a", "b"], now);
    fleet.list(&[spec("b")], now);
    fleet.down(&spec("a").id, now);
    assert!(fleet.sweep(now + GRACE).is_empty());
    assert_eq!(fleet.sweep(now + GRACE * 2), [Change::Forget(spec("a").id)]);
    assert_eq!(fleet.all().len(), 1);
}
