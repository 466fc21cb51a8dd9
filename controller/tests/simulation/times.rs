//! How a cluster of the simulation is configured: times short enough that everything happens within a minute or two.

use std::time::Duration;

use baton_controller::{ControllerConfig, config::HealthConfig};
use rand::{RngExt, rngs::StdRng};

/// Quarantines and probations of a few seconds.
pub(crate) fn health(random: &mut StdRng) -> HealthConfig {
    let mut between = |least: u64, most: u64| Duration::from_millis(random.random_range(least..=most));
    let quarantine = between(1_000, 15_000);
    HealthConfig {
        wedge: between(1_000, 3_000),
        quarantine,
        quarantine_most: quarantine + between(0, 30_000),
        probation: between(1_000, 15_000),
        ..HealthConfig::default()
    }
}

/// A whole configuration; its health is as by default.
pub(crate) fn config(random: &mut StdRng) -> ControllerConfig {
    let mut config = ControllerConfig::default();
    let mut between =
        |least: u64, most: u64| Duration::from_millis(random.random_range(least / 100..=most / 100) * 100);
    config.leader.ttl = between(2_000, 5_000);
    config.leader.records_ttl = config.leader.ttl + between(0, 20_000);
    config.sessions.beat = between(300, 1_000);
    config.sessions.lease = config.sessions.beat * 2 + between(500, 5_000);
    config.roles.settle = between(200, 1_500);
    config.roles.lost_grace = between(1_000, 10_000);
    config.roles.load_grace = between(2_000, 15_000);
    config.roles.drain = between(500, 4_000);
    config.roles.switch_grace = between(1_500, 5_000);
    config.roles.moves_period = between(1_000, 10_000);
    config.roles.moves_most = random.random_range(1..=4);
    (config.roles.prefill, config.roles.decode) = (random.random_range(1..=2), random.random_range(1..=3));
    config
}
