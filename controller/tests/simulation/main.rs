//! Whole clusters on virtual time: several controllers with clocks of their own, a store that is slow, loses answers
//! or is away, and instances that crash, freeze, are cut off, come back and have doubles. One seed is one history.
//!
//! The election, its fence and the reconciler are the real ones; what is between them (`lead.rs`, gRPC, servers) is
//! played by this. After every step the [`checks`] are made. A failure says its seed and the last steps:
//! `BATON_SIM_SEED=<seed> cargo test -p baton-controller --test simulation` plays it again, and
//! `BATON_SIM_SEEDS=<n>` plays more seeds than usual.

mod batch;
mod checks;
mod controller;
mod faults;
mod instance;
mod lead;
mod sessions;
mod store;
mod times;
mod world;

use std::{
    collections::BTreeMap,
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use checks::Counts;
use world::World;

/// Seeds played in an ordinary run.
const SEEDS: u64 = 300;
/// Steps shown of a history that failed.
const SHOWN: usize = 60;

/// Plays a seed; what went wrong and the end of its history if it fails.
fn play(seed: u64, log: bool) -> Result<Counts, (String, Vec<String>)> {
    let mut world = World::new(seed, log);
    let played = catch_unwind(AssertUnwindSafe(|| world.run()));
    let mut failed = |what| (what, world.log.take().unwrap_or_default());
    match played {
        Ok(Ok(counts)) => Ok(counts),
        Ok(Err(what)) => Err(failed(what)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(failed(format!("a panic: {}", text.unwrap_or_default())))
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn any_history_keeps_the_invariants_and_ends_well() {
    let one = setting("BATON_SIM_SEED");
    let seeds = one.map_or(0..setting("BATON_SIM_SEEDS").unwrap_or(SEEDS), |seed| seed..seed + 1);
    let (since, mut sum, mut longest) = (Instant::now(), Counts::default(), 0);
    let (next, played) = (AtomicU64::new(seeds.start), Mutex::new(BTreeMap::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !seeds.contains(&seed) {
                        break;
                    }
                    let end = play(seed, false);
                    played.lock().expect("nobody panicked").insert(seed, end);
                }
            });
        }
    });
    let mut failed = Vec::new();
    for (seed, end) in played.into_inner().expect("nobody panicked") {
        match end {
            Ok(counts) => {
                longest = longest.max(counts.calm_ms);
                sum.add(counts);
            }
            Err((what, _)) => failed.push((seed, what)),
        }
    }
    println!(
        "{} seeds in {:?}: {sum:?}, calm after {longest} ms at most",
        seeds.end - seeds.start,
        since.elapsed()
    );
    if let Some((seed, what)) = failed.first() {
        let (_, log) = play(*seed, true).expect_err("a seed is one history");
        let shown = if one.is_some() { log.len() } else { SHOWN.min(log.len()) };
        for (seed, what) in failed.iter().take(20) {
            eprintln!("seed {seed}: {what}");
        }
        eprintln!("the last steps of seed {seed}:\n{}", log[log.len() - shown..].join("\n"));
        panic!("{} of {} seeds fail; seed {seed}: {what}", failed.len(), seeds.end - seeds.start);
    }
    if one.is_none() {
        let Counts { fenced, lost_answers, late_orders, refusals, moves, inherited, .. } = sum;
        for happened in [fenced, lost_answers, late_orders, refusals, moves, inherited] {
            assert!(happened > 0, "too little happens to say anything: {sum:?}");
        }
    }
}

#[test]
fn a_seed_is_one_history() {
    let log = |seed| {
        let mut world = World::new(seed, true);
        world.run().ok();
        world.log.expect("it was wanted")
    };
    for seed in 0..5 {
        let (one, two) = (log(seed), log(seed));
        let differs = one.iter().zip(&two).find(|(one, two)| one != two);
        assert!(one == two, "seed {seed} has two histories, which part here: {differs:?}");
    }
    assert!(log(0) != log(1));
}
