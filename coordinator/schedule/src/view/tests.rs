//! Rows follow what is heard of their instances.

use super::*;
use crate::fleet::testing::{ready, spec};

/// Whoever comes, leaves, or changes its role: the eldest is known without a look at all of them each time.
#[test]
fn the_eldest_is_known_through_all_changes() {
    let ids = ["a", "b", "c", "d", "e"].map(spec);
    let (mut fleet, mut view) = (Fleet::new(Duration::from_secs(1)), View::default());
    let (ledger, speeds, mut now) = (Ledger::default(), Speeds::default(), Instant::now());
    fleet.list(&ids, now);
    view.listed(&fleet, &ledger, &speeds, now);
    let mut draws = 1u64;
    let mut draw = |below: u64| {
        draws = draws.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (draws >> 33) % below
    };
    for _ in 0..2_000 {
        now += Duration::from_secs(1);
        let Spec { id, incarnation, .. } = &ids[draw(5) as usize];
        match draw(4) {
            0 => drop(fleet.down(id, now)),
            role => {
                let role = [Role::Prefill, Role::Decode, Role::Mixed][role as usize - 1];
                fleet.up(id, *incarnation, ready(role));
            }
        }
        view.renew(id, &fleet, &ledger, &speeds, now);
        let model = view.model("r1").expect("five instances of it");
        for phase in 0..2 {
            let takes = |row: &&Row| phases(row).any(|of| of == phase);
            let eldest = model.rows.iter().filter(takes).map(|row| row.ready_since).min();
            assert_eq!(model.eldest[phase], eldest);
        }
    }
}
