//! Whom a request is given to of those that it is to avoid.

use super::*;
use crate::fleet::{
    Role,
    testing::{ready, spec},
};

const FLEET: [(&str, Role); 4] =
    [("d", Role::Decode), ("m", Role::Mixed), ("p0", Role::Prefill), ("p1", Role::Prefill)];

/// Who is taken of `there`, in the order of ids, if these are to be avoided.
fn taken(there: &[&str], avoid: &[&str]) -> Vec<String> {
    let board = Board::with(Duration::from_secs(1), Settings { local_prefill: false, ..Settings::default() });
    let there: Vec<_> = FLEET.iter().filter(|(id, _)| there.contains(id)).collect();
    let specs: Vec<_> = there.iter().map(|(id, _)| spec(id)).collect();
    board.list(&specs, Instant::now());
    for (spec, (_, role)) in specs.iter().zip(&there) {
        board.up(&spec.id, spec.incarnation, ready(*role));
    }
    let avoid: Vec<_> = avoid.iter().map(|id| spec(id).id).collect();
    let booking = board.place(10, (10, 1), "r1", &avoid).expect("a place");
    let (one, other) = booking.credit.pair();
    [Some(one), other].into_iter().flatten().map(ToString::to_string).collect()
}

#[test]
fn who_is_missed_for_one_role_brings_back_nobody_of_another() {
    let pairs = ["d", "p0", "p1"];
    for _ in 0..8 {
        assert_eq!(taken(&pairs, &["d", "p0"]), ["p1", "d"]);
        assert_eq!(taken(&pairs, &["p0", "d"]), ["p1", "d"]);
        assert_eq!(taken(&pairs, &["p1", "d", "p0"]), ["p0", "d"], "who failed last is asked first");
        assert_eq!(taken(&["d", "m", "p0"], &["m", "d"]), ["p0", "d"]);
        assert_eq!(taken(&["d", "m"], &["d", "m"]), ["m"]);
    }
}
