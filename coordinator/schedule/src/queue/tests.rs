//! Shares, order and ends of those who wait.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    time::Duration,
};

use proptest::prelude::*;

use super::*;

fn rank(band: u8, tenant: &str, priority: i32) -> Rank {
    Rank { band, tenant: tenant.into(), weight: 1, priority }
}

fn wish(tenant: &str, weight: u32, wanted: Instant) -> Wish {
    Wish { rank: Rank { weight, ..rank(0, tenant, 0) }, wanted, work: 1.0 }
}

fn take<T: Copy>(queue: &mut Queue<T>, now: Instant) -> Option<T> {
    fitting(queue, now, |_, _| true)
}

/// The next of those that fit.
fn fitting<T>(queue: &mut Queue<T>, now: Instant, mut fits: impl FnMut(&T, bool) -> bool) -> Option<T> {
    let fits = |item: &T, overdue| fits(item, overdue).then_some(Ok::<_, Infallible>(()));
    queue.next(now, fits).map(|(item, _)| item)
}

#[test]
fn of_one_tenant_whoever_is_wanted_soonest_is_next() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for (item, seconds) in [(1, 30), (2, 10), (3, 20), (4, 10)] {
        queue.push(wish("a", 1, now + Duration::from_secs(seconds)), item, now);
    }
    let order: Vec<i32> = std::iter::from_fn(|| take(&mut queue, now)).collect();
    assert_eq!(order, [2, 4, 3, 1]);
    assert!(queue.is_empty() && queue.bands.is_empty());
}

#[test]
fn those_that_are_late_get_every_second_turn() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let later = now + Duration::from_secs(60);
    (0..4).for_each(|late| {
        drop(queue.push(wish("a", 1, now + Duration::from_secs(late)), -1 - late as i32, now))
    });
    (0..3)
        .for_each(|item| drop(queue.push(wish("a", 1, later + Duration::from_secs(item as u64)), item, now)));
    let order: Vec<i32> = std::iter::from_fn(|| take(&mut queue, later)).collect();
    assert_eq!(order, [-1, 0, -2, 1, -3, 2, -4]);
}

#[test]
fn a_turn_of_others_that_nobody_of_them_fits_into_is_not_lost() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let push = |queue: &mut Queue<&'static str>, band, priority, item| {
        queue.push(Wish { rank: rank(band, "a", priority), wanted: now, work: 1.0 }, item, now);
    };
    (0..TURNS).for_each(|_| push(&mut queue, 0, 0, "short"));
    (0..3).for_each(|_| push(&mut queue, 2, 0, "long"));
    (0..3).for_each(|_| push(&mut queue, 0, 9, "long"));
    (0..TURNS - 1).for_each(|_| assert_eq!(take(&mut queue, now), Some("short")));
    let mut asked = Vec::new();
    let short = fitting(&mut queue, now, |item, _| {
        asked.push(*item);
        *item == "short"
    });
    assert_eq!(short, Some("short"));
    assert_eq!(asked, ["long", "long", "short"], "of the other band, and of the other priority");
    assert_eq!(queue.len(), 6);
}

#[test]
fn tenants_share_by_weight_and_nobody_saves_up_turns() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let wanted = now + Duration::from_secs(60);
    let tenants = [("a", 1, 4.0), ("b", 2, 1.0), ("c", 5, 0.5)];
    let fill = |queue: &mut Queue<usize>, which: usize| {
        let (tenant, weight, work) = tenants[which];
        queue.push(Wish { work, ..wish(tenant, weight, wanted) }, which, now);
    };
    (0..2).for_each(|which| (0..20).for_each(|_| fill(&mut queue, which)));
    let mut had = [0.0; 3];
    let serve = |queue: &mut Queue<usize>, had: &mut [f64; 3]| {
        let which = take(queue, now).expect("all wait all the time");
        had[which] += tenants[which].2;
        fill(queue, which);
    };
    (0..1_000).for_each(|_| serve(&mut queue, &mut had));
    // The third comes now, and gets its share from here on.
    (0..20).for_each(|_| fill(&mut queue, 2));
    had = [0.0; 3];
    (0..10_000).for_each(|_| serve(&mut queue, &mut had));
    let all: f64 = had.iter().sum();
    for (had, (_, weight, _)) in had.iter().zip(tenants) {
        let share = had / all;
        assert!((share / (f64::from(weight) / 8.0) - 1.0).abs() < 0.05, "weight {weight} has {share}");
    }
}

#[test]
fn whoever_would_be_last_gives_way_to_a_key_of_a_higher_band() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let mut fill = |band, tenant: &str, seconds, item| {
        let wanted = now + Duration::from_secs(seconds);
        queue.push(Wish { rank: rank(band, tenant, 0), ..wish(tenant, 1, wanted) }, item, now);
    };
    fill(1, "c", 9, "before all");
    fill(2, "z", 99, "the only one of its tenant");
    for (seconds, item) in [(1, "first"), (3, "third"), (2, "second")] {
        fill(2, "a", seconds, item);
    }
    let new = |band| rank(band, "new", -9);
    assert!(queue.has_behind(&new(1)) && !queue.has_behind(&rank(2, "a", 0)));
    let order: Vec<_> = std::iter::from_fn(|| queue.give_way(&new(1))).collect();
    assert_eq!(order, ["third", "second", "the only one of its tenant", "first"]);
    assert_eq!(queue.give_way(&new(0)), Some("before all"));
    assert!(queue.is_empty() && queue.bands.is_empty());
}

#[test]
fn a_tenants_own_give_way_to_what_it_wants_more() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for priority in [3, 9, 5, 0] {
        queue.push(Wish { rank: rank(0, "a", priority), ..wish("a", 1, now) }, priority, now);
    }
    let order: Vec<_> = std::iter::from_fn(|| queue.give_way(&rank(0, "a", 3))).collect();
    assert_eq!(order, [9, 5]);
}

#[test]
fn who_floods_the_line_gives_way_to_others_of_the_band_up_to_its_share() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for item in 0..30 {
        // As much as it wants to be first.
        queue.push(Wish { rank: rank(0, "a", -5), ..wish("a", 1, now) }, ("a", item), now);
    }
    assert!(!queue.has_behind(&rank(0, "a", -5)));
    let twice = Rank { weight: 2, ..rank(0, "b", 0) };
    let mut came = 0;
    while let Some((tenant, item)) = queue.give_way(&twice) {
        assert_eq!((tenant, item), ("a", 29 - came), "the last of it");
        queue.push(Wish { rank: twice.clone(), ..wish("b", 2, now) }, ("b", came), now);
        came += 1;
    }
    assert_eq!((came, queue.len()), (20, 30));
    assert!(queue.has_behind(&rank(0, "c", 9)) && !queue.has_behind(&rank(1, "c", 0)));
}

#[test]
fn a_few_of_the_last_band_keep_no_other_in_line() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for number in 0..100 {
        let band = if number < 5 { 2 } else { 1 };
        queue.push(Wish { rank: rank(band, "a", 0), ..wish("a", 1, now) }, band, now);
    }
    assert_eq!(queue.give_way(&rank(0, "b", 0)), Some(1));
    queue.push(Wish { rank: rank(2, "a", 0), ..wish("a", 1, now) }, 2, now);
    assert_eq!(queue.give_way(&rank(0, "b", 0)), Some(2), "of the last they are more than a twentieth now");
}

#[test]
fn one_that_takes_long_is_no_cover_for_who_floods() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    queue.push(Wish { work: 1_000.0, ..wish("long", 1, now) }, "long", now);
    (0..9).for_each(|_| drop(queue.push(Wish { work: 100.0, ..wish("floods", 1, now) }, "floods", now)));
    for _ in 0..8 {
        assert_eq!(queue.give_way(&rank(0, "new", 0)), Some("floods"));
    }
    assert_eq!(queue.give_way(&rank(0, "new", 0)), None, "whose turn would be no later");
}

#[test]
fn nobody_asks_their_way_past_other_tenants() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for item in 0..40 {
        let (tenant, priority) = if item % 2 == 0 { ("a", -100) } else { ("b", 0) };
        queue.push(Wish { rank: rank(0, tenant, priority), ..wish(tenant, 1, now) }, tenant, now);
    }
    let served: Vec<_> = (0..20).filter_map(|_| take(&mut queue, now)).collect();
    assert_eq!(served.iter().filter(|tenant| **tenant == "a").count(), 10);
}

#[test]
fn some_of_the_last_band_stay_whoever_comes() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for number in 0..200 {
        let rank = rank(u8::from(number < 50), "a", 0);
        queue.push(Wish { rank, ..wish("a", 1, now) }, number, now);
    }
    while queue.bands[&1].waiting() * TURNS as usize > queue.len() {
        let _ = queue.give_way(&rank(0, "a", 0)).expect("one of the last band");
        queue.push(wish("a", 1, now), 0, now);
    }
    assert_eq!(queue.give_way(&rank(0, "a", 0)), None);
    assert_eq!(queue.bands[&1].waiting(), 200 / TURNS as usize);
}

#[test]
fn bands_and_priorities_wait_for_those_before_them_and_not_for_ever() {
    let now = Instant::now();
    let of_band = |number| rank(number, "a", 0);
    let of_priority = |number: u8| rank(0, "a", i32::from(number) - 2);
    for of in [&of_band as &dyn Fn(u8) -> Rank, &of_priority] {
        let mut queue = Queue::default();
        let fill = |queue: &mut Queue<u8>, number| {
            let wanted = now + Duration::from_secs(60);
            queue.push(Wish { rank: of(number), ..wish("a", 1, wanted) }, number, now);
        };
        (0..4).for_each(|number| fill(&mut queue, number));
        let mut had = [0; 4];
        for _ in 0..6_000 {
            let number = take(&mut queue, now).expect("somebody waits");
            had[usize::from(number)] += 1;
            fill(&mut queue, number);
        }
        assert_eq!(had, [5_700, 100, 100, 100]);
    }
}

#[test]
fn whoever_fits_goes_before_whoever_does_not_and_the_order_stays() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let wanted = |item: i32| now + Duration::from_secs(item as u64);
    (0..30).for_each(|item| {
        drop(queue.push(wish(if item < 20 { "a" } else { "b" }, 1, wanted(item)), item, now))
    });
    let mut asked = Vec::new();
    let fits = |item: &i32, _| {
        asked.push(*item);
        (*item == 20).then_some(Ok::<_, Infallible>("yes"))
    };
    assert_eq!(queue.next(now, fits), Some((20, Ok("yes"))));
    assert_eq!(asked, [0, 20], "what does not fit of one tenant is in no other's way");
    let mut asked = Vec::new();
    let none = fitting(&mut queue, now, |item, _| {
        asked.push(*item);
        false
    });
    // Two of each, in turn. Of more it is not expected that they fit.
    assert_eq!((none, asked), (None, vec![0, 21, 1, 22]));
    assert_eq!(take(&mut queue, now), Some(0));
    // Of one tenant alone the second is asked.
    let mut queue = Queue::default();
    (0..3).for_each(|item| drop(queue.push(wish("a", 1, wanted(item)), item, now)));
    assert_eq!(fitting(&mut queue, now, |item, _| *item == 1), Some(1));
}

#[test]
fn others_go_only_so_often_before_one_that_does_not_fit() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    queue.push(wish("a", 1, now), "large", now);
    (1..20).for_each(|n| drop(queue.push(wish("a", 1, now + Duration::from_secs(n)), "small", now)));
    let next =
        |queue: &mut Queue<&'static str>| fitting(queue, now, |item, overdue| *item == "small" || overdue);
    (0..PASSED_OVER_MOST).for_each(|_| assert_eq!(next(&mut queue), Some("small")));
    assert_eq!(next(&mut queue), Some("large"));
    // Where nobody goes before it it is not passed over.
    let mut queue = Queue::default();
    queue.push(wish("a", 1, now), "large", now);
    (0..2 * PASSED_OVER_MOST).for_each(|_| assert_eq!(next(&mut queue), None));
}

#[test]
fn who_is_passed_over_gets_its_share_later_whatever_it_adds_meanwhile() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let fill = |queue: &mut Queue<&'static str>, tenant| {
        queue.push(wish(tenant, 1, now + Duration::from_secs(60)), tenant, now);
    };
    (0..20).for_each(|_| ["large", "small"].into_iter().for_each(|tenant| fill(&mut queue, tenant)));
    let mut had = HashMap::from([("large", 0), ("small", 0)]);
    let mut serve = |queue: &mut Queue<&'static str>, large_fits: bool| {
        let fits = |item: &&str, _| large_fits || *item == "small";
        let tenant = fitting(queue, now, fits).expect("one that fits");
        *had.entry(tenant).or_default() += 1;
        let [large, small] = ["large", "small"].map(|tenant| had[tenant]);
        (large, small)
    };
    for _ in 0..6 {
        serve(&mut queue, false);
        fill(&mut queue, "large");
    }
    let later: Vec<_> = (0..7).map(|_| serve(&mut queue, true)).collect();
    assert_eq!(later[6], (7, 6));
    assert_eq!(serve(&mut queue, true), (7, 7), "and takes turns then");
}

#[test]
fn the_wait_is_that_of_those_before() {
    let (mut queue, mut now) = (Queue::default(), Instant::now());
    let wanted = now + Duration::from_secs(600);
    for item in 0..30 {
        let (band, priority) = [(0, 0), (1, -7), (1, 7)][item as usize % 3];
        let wish = Wish { rank: rank(band, "a", priority), wanted, work: 5.0 };
        queue.push(wish, item, now);
    }
    let wait = |queue: &Queue<i32>, rank, now| {
        queue.wait(&rank, now).map(|wait: Duration| (wait.as_secs_f64() * 10.0).round() / 10.0)
    };
    assert_eq!(wait(&queue, rank(1, "a", 7), now), None, "nobody has been taken");
    for _ in 0..10 {
        now += Duration::from_millis(200);
        take(&mut queue, now).expect("somebody waits");
    }
    // Those of the first band have gone, each in 200 ms, as ten of either priority will.
    let ranks = [rank(0, "a", 9), rank(1, "a", -8), rank(1, "a", 0), rank(1, "a", 7), rank(2, "a", 0)];
    assert_eq!(ranks.map(|rank| wait(&queue, rank, now)), [0.0, 0.0, 2.0, 4.0, 4.0].map(Some));
    // Another tenant's turn is next, and one's own that has as much before it has to share.
    assert_eq!(wait(&queue, rank(1, "b", 7), now), Some(0.0));
    queue.push(Wish { rank: rank(1, "b", 0), wanted, work: 25.0 }, 30, now);
    assert_eq!(wait(&queue, rank(1, "b", 0), now), Some(2.0));
    assert_eq!(wait(&queue, rank(1, "a", 7), now), Some(5.0));
    assert_eq!(queue.wait_of_all(now).map(|wait| wait.as_secs_f64().round()), Some(5.0));
}

#[test]
fn who_is_turned_away_has_had_nothing_and_says_nothing_of_how_fast_others_are_served() {
    let (mut queue, mut now) = (Queue::default(), Instant::now());
    let wanted = now + Duration::from_secs(600);
    for item in 0..40 {
        queue.push(wish(if item < 20 { "a" } else { "b" }, 1, wanted + Duration::from_secs(item)), item, now);
    }
    for _ in 0..10 {
        now += Duration::from_millis(100);
        take(&mut queue, now).expect("somebody waits");
    }
    let takes = |queue: &Queue<u64>, now| queue.wait_of_all(now).expect("much was seen").as_secs_f64();
    assert!((takes(&queue, now) - 3.0).abs() < 1e-6);
    // At once, and past one that does not fit.
    let refused =
        |item: &u64, _: bool| (*item != 25 && *item < 30).then_some(Err::<(), _>("nobody is there"));
    let refused: Vec<_> = std::iter::from_fn(|| queue.next(now, refused)).collect();
    assert!(refused.len() == 19 && refused.iter().all(|(_, found)| found.is_err()), "{refused:?}");
    assert!((takes(&queue, now) - 1.1).abs() < 1e-6, "{} s", takes(&queue, now));
    // Who was turned away is as far as the other one: that one has the next turn, and then both in turn.
    (100..105).for_each(|item| drop(queue.push(wish("a", 1, wanted), item, now)));
    let turns: Vec<u64> = (0..10).map_while(|_| take(&mut queue, now)).collect();
    assert_eq!(turns, [100, 25, 101, 30, 102, 31, 103, 32, 104, 33]);
}

#[test]
fn late_ones_are_served_by_age_and_nobody_starves() {
    let (mut queue, began) = (Queue::default(), Instant::now());
    // Twice as many come as are served, and all are late after a second.
    let (mut came, mut late, mut in_time) = (0, Vec::new(), 0);
    for turn in 0..2_000 {
        let now = began + Duration::from_millis(10 * turn);
        for _ in 0..2 {
            queue.push(wish("a", 1, now + Duration::from_secs(1)), (came, turn), now);
            came += 1;
        }
        let (item, came_in) = take(&mut queue, now).expect("somebody waits");
        if came_in + 100 < turn { late.push(item) } else { in_time += 1 }
    }
    assert!(late.is_sorted());
    assert!(late.len() >= 900 && in_time >= 900, "{} late, {in_time} in time", late.len());
}

proptest! {
    /// Everybody who comes is taken once, by a turn or because they left, and then nothing is left of them.
    #[test]
    fn nobody_is_lost_or_served_twice(
        steps in prop::collection::vec((0u8..5, (0u8..3, -2i32..2), 0usize..5, 0u64..100, any::<prop::sample::Index>()), 1..300),
    ) {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let mut waiting: Vec<(u64, Ticket)> = Vec::new();
        let (mut next, mut gone) = (0, HashSet::new());
        for (what, (band, priority), tenant, seconds, which) in steps {
            let tenant = format!("t{tenant}");
            let rank = Rank { weight: 3, ..rank(band, &tenant, priority) };
            match what {
                0 | 1 => {
                    let wanted = now + Duration::from_secs(seconds);
                    waiting.push((next, queue.push(Wish { rank, ..wish(&tenant, 3, wanted) }, next, now)));
                    next += 1;
                }
                2 if !waiting.is_empty() => {
                    let (item, ticket) = waiting.swap_remove(which.index(waiting.len()));
                    prop_assert_eq!(queue.remove(&ticket), Some(item));
                    prop_assert_eq!(queue.remove(&ticket), None);
                    prop_assert!(gone.insert(item));
                }
                3 => {
                    let (has, given) = (queue.has_behind(&rank), queue.give_way(&rank));
                    prop_assert_eq!(has, given.is_some());
                    if let Some(item) = given {
                        prop_assert!(gone.insert(item), "{} was served twice", item);
                        waiting.retain(|(other, _)| *other != item);
                    }
                }
                _ => {
                    let now = now + Duration::from_secs(50);
                    if let Some(item) = take(&mut queue, now) {
                        prop_assert!(gone.insert(item), "{} was served twice", item);
                        waiting.retain(|(other, _)| *other != item);
                    } else {
                        prop_assert!(waiting.is_empty());
                    }
                }
            }
            prop_assert_eq!(queue.len(), waiting.len());
        }
        while let Some(item) = take(&mut queue, now) {
            prop_assert!(gone.insert(item));
        }
        prop_assert_eq!(gone.len() as u64, next);
        prop_assert!(queue.is_empty() && queue.bands.is_empty());
    }
}
