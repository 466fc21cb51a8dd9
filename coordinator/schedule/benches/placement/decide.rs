//! How long production placement takes to decide, in fleets of several sizes, with other requests under way.
//!
//! Timed is what a request waits for: the choice and its entry on the ledger, on one thread that nobody competes with.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_proto::LegId;
use baton_schedule::{
    Settings, Wanted,
    board::{Board, Booking},
};
use tabled::{builder::Builder, settings::Style};

use crate::replay::{
    chooser::{Place, Report},
    figures::percentile,
    machine::Draws,
    production::{REVISION, board, id, load},
};

/// Requests under way at a time, for each instance.
const UNDER_WAY: usize = 4;
const UNDER_WAY_MOST: usize = 2_000;
/// Decisions before those that count.
const WARM_UP: u32 = 100;

/// Microseconds that the 99th percentile is to be below, for fleets of up to so many instances.
fn target_micros(instances: u32) -> Option<f64> {
    match instances {
        0..=10 => Some(20.0),
        11..=1_000 => Some(200.0),
        1_001..=10_000 => Some(1_000.0),
        _ => None,
    }
}

/// The table, and which targets are missed.
pub(crate) fn measure(fleets: &[u32], decisions: u32) -> (String, Vec<String>) {
    let mut table = Builder::default();
    table.push_record(["instances", "decision p50 us", "p99 us", "to be"]);
    let mut faults = Vec::new();
    for instances in fleets {
        eprintln!("{decisions} decisions among {instances} instances");
        let taken = decisions_micros(*instances as usize, decisions);
        let (median, most) = (percentile(&taken, 0.5), percentile(&taken, 0.99));
        let target = target_micros(*instances);
        table.push_record([
            instances.to_string(),
            format!("{median:.1}"),
            format!("{most:.1}"),
            target.map_or_else(String::new, |target| format!("< {target:.0}")),
        ]);
        if let Some(target) = target.filter(|target| most >= *target) {
            faults
                .push(format!("{instances} instances: p99 of decisions {most:.1} us, not below {target:.0}"));
        }
    }
    (format!("\n{}", table.build().with(Style::markdown())), faults)
}

fn decisions_micros(instances: usize, decisions: u32) -> Vec<f64> {
    let (prefills, decodes) = (instances / 2, instances - instances / 2);
    let board = board(prefills, decodes, Settings::default());
    let mut draws = Draws::new(1);
    let places = (0..prefills).map(Place::Prefill).chain((0..decodes).map(Place::Decode));
    let places: Vec<Place> = places.collect();
    places.iter().for_each(|place| reported(&board, *place, &mut draws));
    let most = (UNDER_WAY * instances).min(UNDER_WAY_MOST);
    let mut under_way: VecDeque<Booking> = (0..most).filter_map(|_| decision(&board, &mut draws).0).collect();
    let mut taken = Vec::with_capacity(decisions as usize);
    for turn in 0..WARM_UP + decisions {
        reported(&board, places[draws.below(places.len())], &mut draws);
        let (booking, time) = decision(&board, &mut draws);
        under_way.pop_front();
        under_way.extend(booking);
        if turn >= WARM_UP {
            taken.push(time.as_secs_f64() * 1e6);
        }
    }
    taken
}

fn decision(board: &Arc<Board>, draws: &mut Draws) -> (Option<Booking>, Duration) {
    let prompt_tokens = (6_500.0 * (1.1 * draws.normal()).exp()).clamp(100.0, 126_000.0) as u32;
    let began = Instant::now();
    board.arrived(REVISION);
    let booked = board.book(&Wanted::new(prompt_tokens, 2_000, REVISION));
    let time = began.elapsed();
    (booked.ok(), time)
}

fn reported(board: &Board, place: Place, draws: &mut Draws) {
    let report = Report {
        sequences: draws.below(32) as u32,
        queued_tokens: draws.below(100_000) as u64,
        cache_tokens: 2_000_000,
        cache_free_tokens: draws.below(2_000_000) as u32,
        tokens_per_second: 6_000.0 + draws.below(2_000) as f64,
        step_micros: 22_000 + draws.below(10_000) as u64,
        ..Report::default()
    };
    board.load(&id(place), load(place, &report, LegId(0)));
}
