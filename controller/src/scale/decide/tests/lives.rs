//! Whole lives of a group beside a Kubernetes that is slow, is changed by others and fails.

use proptest::prelude::*;

use super::{
    world::{Trouble, World},
    *,
};

fn trouble() -> impl Strategy<Value = Vec<(u64, Trouble)>> {
    let kind = prop_oneof![
        3 => (0usize..10).prop_map(Trouble::Wanted),
        1 => Just(Trouble::Little),
        1 => Just(Trouble::Unasked),
        1 => Just(Trouble::Unknown),
        2 => (0usize..7).prop_map(Trouble::Quarantine),
        1 => Just(Trouble::Probation),
        1 => (2u32..9).prop_map(Trouble::Replicas),
        1 => Just(Trouble::Leader),
        1 => Just(Trouble::Crash),
        2 => (0usize..7).prop_map(Trouble::Cordon),
        1 => Just(Trouble::Uncordon),
        1 => (1u64..90).prop_map(Trouble::Slow),
        1 => Just(Trouble::Refuse),
    ];
    prop::collection::vec((0u64..120, kind), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What must never happen is asserted by the world, action by action.
    #[test]
    fn whatever_happens_nothing_is_taken_away_that_serves(seed: u64, troubles in trouble()) {
        let mut world = World::new(seed, 4);
        for (seconds, trouble) in troubles {
            world.live(Duration::from_secs(seconds));
            world.suffer(trouble);
        }
        world.recover(5);
        world.live(Duration::from_secs(1800));
        prop_assert_eq!(world.replicas(), 5);
        prop_assert!(world.is_at_rest());
    }

    #[test]
    fn a_constant_demand_is_met_and_then_nothing_moves(seed: u64, began in 2u32..9, wanted in 0usize..12) {
        let mut world = World::new(seed, began);
        world.suffer(Trouble::Wanted(wanted));
        world.live(Duration::from_secs(1800));
        let aim = u32::try_from(wanted.max(2)).expect("few").clamp(MIN, MAX);
        prop_assert_eq!(world.replicas(), aim);
        prop_assert!(world.is_at_rest());
        let (out, r#in) = world.changes();
        prop_assert!(out == 0 || r#in == 0, "{} out and {} in", out, r#in);
        let before = world.actions();
        world.live(Duration::from_secs(3600));
        prop_assert_eq!(world.actions(), before);
    }

    /// Two are quarantined, on probation and quarantined again within a window, and at last well.
    #[test]
    fn a_quarantine_is_made_up_for_once(seed: u64, wanted in 4usize..6, pause in 5u64..50) {
        let mut world = World::new(seed, 4);
        world.suffer(Trouble::Wanted(wanted));
        world.live(Duration::from_secs(600));
        let settled = world.changes();
        for _ in 0..4 {
            world.suffer(Trouble::Quarantine(0));
            world.suffer(Trouble::Quarantine(1));
            world.live(Duration::from_secs(200));
            prop_assert_eq!(world.replicas() as usize, wanted + 2);
            prop_assert!(world.serving_well() >= wanted);
            world.suffer(Trouble::Probation);
            world.live(Duration::from_secs(pause));
        }
        world.live(Duration::from_secs(1800));
        prop_assert_eq!(world.replicas() as usize, wanted);
        prop_assert!(world.is_at_rest());
        prop_assert_eq!(world.changes(), (settled.0 + 1, settled.1 + 2));
    }
}
