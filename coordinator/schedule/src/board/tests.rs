//! Whom a request is given to of those that it is to avoid, and who hands on to whom.

use super::*;
use crate::{
    Among, Side,
    fleet::{
        Duty, Role,
        testing::{ready, spec},
    },
};

const FLEET: [(&str, Role); 4] =
    [("d", Role::Decode), ("m", Role::Mixed), ("p0", Role::Prefill), ("p1", Role::Prefill)];

/// Who is taken of `there`, in the order of ids, if these are to be avoided.
fn taken(there: &[&str], avoid: &[&str]) -> Vec<String> {
    let board = Board::new(Duration::from_secs(1), Settings::APART);
    let there: Vec<_> = FLEET.iter().filter(|(id, _)| there.contains(id)).collect();
    let specs: Vec<_> = there.iter().map(|(id, _)| spec(id)).collect();
    board.list(&specs, Instant::now());
    for (spec, (_, role)) in specs.iter().zip(&there) {
        board.up(&spec.id, spec.incarnation, ready(*role));
    }
    let avoid: Vec<_> = avoid.iter().map(|id| spec(id).id).collect();
    let booking = board.book(&Wanted { avoid: &avoid, ..Wanted::new(10, 10, "r1") }).expect("a place");
    booking.credit.pair().each().map(ToString::to_string).collect()
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

/// Two full blocks of 16 tokens, and two tokens of which the last is computed in any case.
fn handed_on_by(from: &InstanceId) -> Wanted<'_> {
    Wanted { among: Among::PeersOf(from), ..Wanted::new(34, 100, "r1") }
}

/// Who goes on with what this instance hands on, which drains, where these are there too.
fn goes_on(from: &str, there: &[&str], avoid: &[&str]) -> Result<String, NoPlace> {
    let board = Board::new(Duration::from_secs(1), Settings::APART);
    let there: Vec<_> = FLEET.iter().filter(|(id, _)| *id == from || there.contains(id)).collect();
    let specs: Vec<_> = there.iter().map(|(id, _)| spec(id)).collect();
    board.list(&specs, Instant::now());
    for (spec, (id, role)) in specs.iter().zip(&there) {
        board.up(&spec.id, spec.incarnation, Duty { ready: *id != from, ..ready(*role) });
    }
    let (from, avoid) = (spec(from).id, avoid.iter().map(|id| spec(id).id).collect::<Vec<_>>());
    let booking = board.book(&Wanted { avoid: &avoid, ..handed_on_by(&from) })?;
    assert_eq!(booking.way, Way::HandedOn);
    let Placement::Apart { prefill, decode } = &booking.placement else { panic!("{:?}", booking.placement) };
    assert_eq!((&prefill.instance, prefill.role_epoch), (&from, ready(Role::Decode).epoch));
    assert_eq!((prefill.uncached_tokens, prefill.blocks), (2, 1));
    assert!(booking.receipt.cheapest.iter().all(|scored| scored.side != Side::Whole));
    Ok(decode.instance.to_string())
}

#[test]
fn who_drains_hands_on_to_whoever_decodes_and_to_nobody_else() {
    assert_eq!(goes_on("d", &["m", "p0", "p1"], &[]).as_deref(), Ok("m"));
    assert_eq!(goes_on("m", &["d", "p0"], &[]).as_deref(), Ok("d"));
    assert_eq!(goes_on("m", &["d"], &["d"]).as_deref(), Ok("d"), "it is taken where nobody else is");
    assert_eq!(goes_on("d", &["p0", "p1"], &[]), Err(NoPlace::NoDecode));
    // It drains no more: it is not handed what it has.
    let board = Board::new(Duration::from_secs(1), Settings::APART);
    let d = spec("d");
    board.list(std::slice::from_ref(&d), Instant::now());
    board.up(&d.id, d.incarnation, ready(Role::Decode));
    assert_eq!(board.book(&handed_on_by(&d.id)).map(drop), Err(NoPlace::NoDecode));
    // It cannot be reached.
    let m = spec("m");
    board.list(&[d.clone(), m.clone()], Instant::now());
    board.up(&m.id, m.incarnation, ready(Role::Mixed));
    board.down(&d.id, Instant::now());
    assert!(board.book(&handed_on_by(&d.id)).is_err());
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_a_place_again_and_again_has_come_once() {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (d, p) = (spec("d"), spec("p"));
    board.list(&[d.clone(), p.clone()], Instant::now());
    board.up(&d.id, d.incarnation, ready(Role::Decode));
    board.up(&p.id, p.incarnation, ready(Role::Prefill));
    board.load(&p.id, Load { queued_prefill_tokens: 1_000_000, ..Load::default() });
    let waiting = || board.state.lock().view.model("r1").map(|model| model.classes[0].waiting(16.0));
    tokio::time::advance(Duration::from_secs(30)).await;
    let roomy = Wanted { among: Among::Roomy, ..Wanted::new(10, 10, "r1") };
    (0..10).for_each(|_| assert_eq!(board.book(&roomy).map(drop), Err(NoPlace::Busy)));
    assert_eq!(waiting(), Some(0.0));
    // Prefill is found busy: a share of 1 - 1/e counts after as long as that share is of.
    board.arrived("r1");
    assert!(waiting().is_some_and(|many| (1.7..1.8).contains(&many)), "{:?}", waiting());
}

#[test]
fn what_is_left_of_an_answer_is_of_steps_of_those_that_are_decoded() {
    let board = Board::new(Duration::from_secs(1), Settings::APART);
    let d = spec("d");
    board.list(std::slice::from_ref(&d), Instant::now());
    board.up(&d.id, d.incarnation, ready(Role::Decode));
    let left = |sequences| {
        let load = Load { sequences, sequences_most: std::num::NonZeroU32::new(4), ..Load::default() };
        board.load(&d.id, load);
        board.left(&d.id, 1, 100)
    };
    assert!(left(1) < left(4));
    assert_eq!(left(4), left(400));
}

#[tokio::test(start_paused = true)]
async fn rows_are_made_anew_only_where_instances_come_or_go_or_have_other_peers() {
    let board = Board::new(Duration::from_secs(60), Settings::APART);
    let (d, p) = (spec("d"), spec("p"));
    let list = |specs: &[&Spec]| {
        board.list(&specs.iter().map(|spec| (*spec).clone()).collect::<Vec<_>>(), Instant::now());
    };
    let rows = || board.state.lock().view.model("r1").map(|model| model.rows.len());
    let rebuilds = || board.state.lock().view.rebuilds;
    let row = |id| board.state.lock().view.row(id).cloned().expect("it is known");
    list(&[&d, &p]);
    for (spec, role) in [(&d, Role::Decode), (&p, Role::Prefill)] {
        board.up(&spec.id, spec.incarnation, ready(role));
    }
    let before = (rebuilds(), row(&d.id).number, row(&p.id).number);
    let same = || (rebuilds(), row(&d.id).number, row(&p.id).number) == before;
    // It is not on the list any more, and then it is again.
    list(&[&d]);
    assert!(same() && row(&p.id).until.is_some() && row(&d.id).until.is_none());
    list(&[]);
    assert!(same() && row(&p.id).until.is_none() && row(&d.id).until.is_none(), "the controller is away");
    list(&[&d, &p]);
    assert!(same() && row(&p.id).until.is_none());
    // Another process of it, elsewhere.
    let again = Spec { incarnation: Incarnation(2), handoff_endpoint: "p:9".into(), ..p.clone() };
    list(&[&d, &again]);
    assert!(same() && *row(&p.id).spec == again && row(&p.id).role.is_none());
    assert_eq!(board.can_serve("r1"), Err(NoPlace::NoPrefill));
    board.up(&p.id, again.incarnation, ready(Role::Prefill));
    assert_eq!(board.can_serve("r1"), Ok(()));
    assert_eq!(board.state.lock().view.model("r1").map(|model| model.classes[0].prefills()), Some(1));
    // Caches of another kind, another model, and one more.
    let unlike = Spec { layout: "l2".into(), incarnation: Incarnation(3), ..p.clone() };
    list(&[&d, &unlike]);
    board.up(&p.id, unlike.incarnation, ready(Role::Prefill));
    assert_eq!(board.can_serve("r1"), Err(NoPlace::NoDecode));
    list(&[&d, &Spec { revision: "r2".into(), ..unlike }]);
    assert_eq!(rows(), Some(1));
    list(&[&d, &again, &spec("q")]);
    assert_eq!((rows(), row(&p.id).number), (Some(3), before.2));
}
