//! A week of a fleet in good health, with all the noise that there is: nobody is quarantined.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;

/// Between reports, so that a week is simulated in seconds.
const EVERY: Duration = Duration::from_secs(5);
const WEEK: u64 = 7 * 24 * 3600;

struct Noise(StdRng);

impl Noise {
    fn chance(&mut self, share: f64) -> bool {
        self.0.random::<f64>() < share
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.0.random::<f64>()
    }

    fn times(&mut self, mean: f64) -> u64 {
        self.between(0.0, 2.0 * mean).round() as u64
    }

    /// What an instance does between two reports; `demand` is from 0 at night to 1.
    fn work(&mut self, role: Role, demand: f64) -> Work {
        if demand < 0.05 && self.chance(0.5) {
            return IDLE;
        }
        let served = self.times(20.0 * demand);
        // Clients leave, a batch fails now and then, a slice is damaged.
        let failed = if self.chance(0.001) { self.times(8.0) } else { 0 };
        let broken = if self.chance(0.003) { self.times(3.0) } else { 0 };
        let decodes = role == Role::Decode;
        let batch = self.between(1.0, 4.0 + 60.0 * demand);
        let micros = (9_000.0 + 150.0 * batch) * self.between(0.8, 1.6);
        Work {
            served,
            failed,
            broken,
            handed: served,
            steps: if decodes { self.times(200.0) } else { 0 },
            batch: batch as u64,
            step_micros: if decodes { micros as u64 } else { 0 },
            // The last work is done by the time of some reports.
            busy: served > 0 && self.chance(0.9),
        }
    }
}

#[test]
fn nobody_of_a_healthy_fleet_is_quarantined_in_a_week() {
    let mut noise = Noise(StdRng::seed_from_u64(7));
    let mut group = Group::new(3, 5);
    group.book = HealthBook::new(HealthConfig::default(), EVERY, MOST);
    let mut silent_until = vec![0; group.instances.len()];
    let mut suspected = 0u64;
    for second in (0..WEEK).step_by(EVERY.as_secs() as usize) {
        let hour = (second as f64 / 3600.0) % 24.0;
        let demand = (1.0 - (hour / 12.0 - 1.0).abs()) * noise.between(0.7, 1.0);
        for (instance, silent_until) in group.instances.iter_mut().zip(&mut silent_until) {
            instance.work = noise.work(instance.beat.role, demand);
            if noise.chance(0.002) {
                *silent_until = second + noise.times(20.0);
            }
            instance.silent = second < *silent_until;
            if noise.chance(0.000_02) {
                instance.spec.incarnation.0 += 1;
                instance.beat.load = InstanceLoad::default();
            }
        }
        // The controller is held up now and then.
        let pause = if noise.chance(0.000_1) { secs(noise.times(60.0)) } else { Duration::ZERO };
        group.now += EVERY - BEAT + pause;
        group.second();
        let quarantined = group.book.verdicts().find(|(_, verdict)| verdict.is_quarantined());
        assert_eq!(quarantined, None, "after {second} s");
        suspected += group.book.verdicts().filter(|(_, verdict)| *verdict != Verdict::Healthy).count() as u64;
    }
    let looks = WEEK / EVERY.as_secs() * group.instances.len() as u64;
    assert!(suspected > 0 && suspected < looks / 50, "{suspected} of {looks}");
}
