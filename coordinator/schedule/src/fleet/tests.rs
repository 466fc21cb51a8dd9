//! Tables over the merge of list and streams.

use super::{
    testing::{ready, spec},
    *,
};

fn usable_of<'a>(fleet: &'a Fleet, revision: &str, now: Instant) -> Vec<(&'a str, Role)> {
    let alike = fleet.models().filter(|(of, _)| *of == revision).flat_map(|(_, alike)| alike.values());
    alike
        .filter_map(|instance| {
            let (duty, until) = fleet.duty(instance)?;
            until.is_none_or(|until| now <= until).then_some((instance.spec.id.as_str(), duty.role))
        })
        .collect()
}

fn usable(fleet: &Fleet, now: Instant) -> Vec<&str> {
    usable_of(fleet, "r1", now).into_iter().map(|(id, _)| id).collect()
}

const GRACE: Duration = Duration::from_secs(10);

fn fleet_of(ids: &[&str], now: Instant) -> Fleet {
    let mut fleet = Fleet::new(GRACE);
    let specs: Vec<_> = ids.iter().map(|id| spec(id)).collect();
    assert_eq!(fleet.list(&specs, now).0.len(), ids.len());
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
    assert!(fleet.changed(&a.id, ready(Role::Prefill)));
    assert!(!fleet.changed(&a.id, ready(Role::Prefill)), "it is that already");
    assert_eq!(usable(&fleet, now), ["a"]);
    assert!(fleet.down(&a.id, now));
    assert!(!fleet.down(&a.id, now), "it was down");
    assert!(usable(&fleet, now).is_empty());
    fleet.up(&a.id, Incarnation(2), ready(Role::Prefill));
    assert!(usable(&fleet, now).is_empty(), "the list is a restart behind");
    let (changes, other) = fleet.list(&[Spec { incarnation: Incarnation(2), ..a.clone() }], now);
    assert!(other);
    assert!(matches!(changes.as_slice(), [Change::Target(spec)] if spec.incarnation == Incarnation(2)));
    assert_eq!(usable(&fleet, now), ["a"]);
}

#[test]
fn a_late_role_of_an_older_epoch_is_ignored() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a"], now);
    let id = spec("a").id;
    fleet.changed(&id, Duty { role: Role::Decode, epoch: RoleEpoch(5), ready: true });
    fleet.changed(&id, Duty { role: Role::Prefill, epoch: RoleEpoch(4), ready: true });
    assert_eq!(usable_of(&fleet, "r1", now).first().map(|(_, role)| *role), Some(Role::Decode));
}

#[test]
fn a_dropped_instance_with_a_live_stream_is_used_for_the_grace() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a", "b"], now);
    assert!(fleet.list(&[spec("b")], now).1);
    assert!(!fleet.list(&[spec("b")], now).1, "it says the same again");
    assert_eq!(usable(&fleet, now + GRACE), ["a", "b"]);
    assert_eq!(usable(&fleet, now + GRACE * 2), ["b"]);
}

#[test]
fn those_that_are_not_on_the_first_list_after_an_empty_one_have_the_grace_to_come_back() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a", "b"], now);
    fleet.list(&[], now);
    let back = now + 3 * GRACE;
    assert_eq!(usable(&fleet, back), ["a", "b"]);
    fleet.list(&[spec("a")], back);
    assert_eq!(usable(&fleet, back + GRACE), ["a", "b"]);
    assert_eq!(usable(&fleet, back + 2 * GRACE), ["a"]);
    assert_eq!(fleet.size(), 2);
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
    assert_eq!(fleet.size(), 1);
}

#[test]
fn an_instance_is_found_under_the_model_that_it_runs_now() {
    let now = Instant::now();
    let mut fleet = fleet_of(&["a", "b"], now);
    let changed = Spec { incarnation: Incarnation(2), revision: "r2".into(), ..spec("b") };
    assert_eq!(fleet.list(&[spec("a"), changed.clone()], now).0, [Change::Target(changed.clone())]);
    fleet.up(&changed.id, Incarnation(2), ready(Role::Mixed));
    assert_eq!(usable(&fleet, now), ["a"]);
    let of_r2: Vec<_> = usable_of(&fleet, "r2", now).into_iter().map(|(id, _)| id).collect();
    assert_eq!(of_r2, ["b"]);

    // The list that drops all instances of one model still lists another's: the controller is there.
    fleet.list(&[spec("a")], now);
    assert_eq!(usable_of(&fleet, "r2", now + GRACE * 2).len(), 0);
    fleet.down(&changed.id, now);
    assert_eq!(fleet.sweep(now + GRACE * 2), [Change::Forget(changed.id)]);
    assert_eq!(fleet.models().count(), 1);
    fleet.list(&[], now);
    assert_eq!(usable(&fleet, now + GRACE * 100), ["a"], "nobody is listed, of whatever model");
}

#[test]
fn numbers_beyond_reason_are_cut_down_and_still_compare() {
    let most = v1::InstanceLoad {
        running_sequences: u32::MAX,
        waiting_sequences: 1,
        queued_prefill_tokens: u64::MAX,
        queued_prefill_pairs: u64::MAX,
        kv_blocks_total: 7,
        kv_blocks_free: 8,
        decode_step_micros: u64::MAX,
        outgoing_transfers: u32::MAX,
        incoming_transfers: u32::MAX,
        ..v1::InstanceLoad::default()
    };
    let load = Load::from(&most);
    assert_eq!((load.sequences, load.kv_blocks_free), (u32::MAX, 7));
    assert_eq!((load.queued_prefill_tokens, load.queued_prefill_pairs), (1 << 32, 1 << 52));
    assert_eq!((load.decode_step_micros, load.transfers), (60_000_000, 1 << 20));
}
