//! Shares, order and ends of those who wait.

use std::{collections::HashSet, time::Duration};

use proptest::prelude::*;

use super::*;

fn wish(tenant: &str, weight: u32, wanted: Instant) -> Wish {
    Wish { priority: 0, tenant: tenant.into(), weight, wanted, work: 1.0 }
}

fn take<T: Copy>(queue: &mut Queue<T>, now: Instant) -> Option<T> {
    queue.next(now, |_| Some(())).map(|(item, ())| item)
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
    let mut fill = |priority, tenant: &str, seconds, item| {
        let wanted = now + Duration::from_secs(seconds);
        queue.push(Wish { priority, ..wish(tenant, 1, wanted) }, item, now);
    };
    let rank = |priority, band_ends| Rank { tenant: "new", priority, band_ends };
    fill(0, "c", 9, "before all");
    fill(2, "z", 99, "the only one of its tenant");
    for (seconds, item) in [(1, "first"), (3, "third"), (2, "second")] {
        fill(2, "a", seconds, item);
    }
    assert!(queue.has_behind(&rank(1, 1)) && !queue.has_behind(&rank(1, 2)));
    assert_eq!(queue.give_way(&rank(-9, 2)), None, "nobody asks their way past others of their band");
    let order: Vec<_> = std::iter::from_fn(|| queue.give_way(&rank(0, 0))).collect();
    assert_eq!(order, ["third", "second", "the only one of its tenant", "first"]);
    assert_eq!(queue.give_way(&rank(-1, -1)), Some("before all"));
    assert!(queue.is_empty() && queue.bands.is_empty());
}

#[test]
fn a_tenants_own_give_way_to_what_it_wants_more() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for (tenant, priority) in [("a", 3), ("b", 9), ("a", 5), ("a", 0)] {
        queue.push(Wish { priority, ..wish(tenant, 1, now) }, (tenant, priority), now);
    }
    let rank = Rank { tenant: "a", priority: 0, band_ends: 10 };
    let order: Vec<_> = std::iter::from_fn(|| queue.give_way(&rank)).collect();
    assert_eq!(order, [("a", 5), ("a", 3)]);
}

#[test]
fn some_of_the_last_band_stay_whoever_comes() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    for number in 0..200 {
        queue.push(Wish { priority: i32::from(number < 50), ..wish("a", 1, now) }, number, now);
    }
    let rank = Rank { tenant: "b", priority: 0, band_ends: 0 };
    while queue.give_way(&rank).is_some() {
        queue.push(wish("b", 1, now), 0, now);
    }
    assert_eq!(queue.bands[&1].tenants["a"].waiting.len(), 200 / TURNS as usize);
}

#[test]
fn a_band_waits_for_those_before_it_and_not_for_ever() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let wanted = now + Duration::from_secs(60);
    let fill = |queue: &mut Queue<i32>, priority| {
        queue.push(Wish { priority, ..wish("a", 1, wanted) }, priority, now);
    };
    (-1..3).for_each(|priority| fill(&mut queue, priority));
    let mut had = [0; 4];
    for _ in 0..6_000 {
        let priority = take(&mut queue, now).expect("somebody waits");
        had[(priority + 1) as usize] += 1;
        fill(&mut queue, priority);
    }
    assert_eq!(had, [5_700, 100, 100, 100]);
}

#[test]
fn whoever_fits_goes_before_whoever_does_not_and_the_order_stays() {
    let (mut queue, now) = (Queue::default(), Instant::now());
    let wanted = |item: i32| now + Duration::from_secs(item as u64);
    (0..30).for_each(|item| {
        drop(queue.push(wish(if item < 20 { "a" } else { "b" }, 1, wanted(item)), item, now))
    });
    let mut asked = Vec::new();
    let fits = |item: &i32| {
        asked.push(*item);
        (*item == 1).then_some("yes")
    };
    assert_eq!(queue.next(now, fits), Some((1, "yes")));
    assert_eq!(asked, [0, 1]);
    let mut asked = Vec::new();
    let none = queue.next(now, |item| {
        asked.push(*item);
        None::<()>
    });
    // The other tenant has had nothing yet. Of more it is not expected that they fit.
    assert_eq!((none, asked), (None, vec![20, 21]));
    assert_eq!(take(&mut queue, now), Some(20));
}

#[test]
fn the_wait_is_that_of_those_before() {
    let (mut queue, mut now) = (Queue::default(), Instant::now());
    let wanted = now + Duration::from_secs(600);
    for item in 0..30 {
        let wish = Wish { priority: item % 3, work: 5.0, ..wish("a", 1, wanted) };
        queue.push(wish, item, now);
    }
    assert_eq!(queue.wait(2, now), None, "nobody has been taken");
    for _ in 0..10 {
        now += Duration::from_millis(200);
        take(&mut queue, now).expect("somebody waits");
    }
    // Those of the first band have gone.
    let wait = |priority| queue.wait(priority, now).map(|wait| wait.as_secs_f64().round());
    assert_eq!([wait(-1), wait(0), wait(1), wait(2)], [Some(0.0), Some(0.0), Some(2.0), Some(4.0)]);
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
        steps in prop::collection::vec((0u8..4, -2i32..2, 0usize..5, 0u64..100, any::<prop::sample::Index>()), 1..300),
    ) {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let mut waiting: Vec<(u64, Ticket)> = Vec::new();
        let (mut next, mut gone) = (0, HashSet::new());
        for (what, priority, tenant, seconds, which) in steps {
            match what {
                0 | 1 => {
                    let wanted = now + Duration::from_secs(seconds);
                    let tenant = format!("t{tenant}");
                    waiting.push((next, queue.push(Wish { priority, ..wish(&tenant, 3, wanted) }, next, now)));
                    next += 1;
                }
                2 if !waiting.is_empty() => {
                    let (item, ticket) = waiting.swap_remove(which.index(waiting.len()));
                    prop_assert_eq!(queue.remove(&ticket), Some(item));
                    prop_assert_eq!(queue.remove(&ticket), None);
                    prop_assert!(gone.insert(item));
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
