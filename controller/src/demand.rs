//! What a group is asked for and what its instances can do, from their reports. Pure: reports in, [`Demand`] and
//! [`Speed`] out.
//!
//! Instances count what they have done since they started; the difference between two reports is what happened between
//! them. Old differences fade. What is asked for is what *arrives*, whether or not it has been served, so that a group
//! that is full is seen to be. It is read from the shortest of several memories ([`MEMORIES`]) that knows enough requests
//! for a typical one: busy groups are judged by their last seconds, so that a shift is seen within two minutes and a
//! single burst moves nothing, and groups with a few long answers by their last minutes. A longer memory is believed
//! only while the shorter ones do not contradict it: a rush that is over is forgotten as soon as they say so.
//!
//! The time of a step that only decodes is a line over the sequences in it, fitted to the same reports.
//!
//! Fed by [`crate::reconcile`] with every beat; read by [`crate::plan`] through [`Meter::demand`] and [`Meter::speed`].

use std::{collections::BTreeMap, time::Duration};

use baton_proto::{Incarnation, InstanceId, InstanceLoad};
use tokio::time::Instant;

use crate::{
    plan::auto::{Demand, Speed},
    steps::Steps,
};

/// After so long what a memory holds has fallen to 1/e of its weight.
pub const MEMORIES: [Duration; 3] =
    [Duration::from_secs(20), Duration::from_secs(100), Duration::from_secs(500)];
/// The same of the prompts that an instance computed: longer than most pauses between them, and short beside the time for
/// which it has a role.
const COMPUTED: Duration = MEMORIES[1];
/// Reports of less time than this say nothing yet.
const SHORTEST: Duration = Duration::from_secs(5);
/// Fewer requests than this, faded ones in part, say nothing of a typical one.
const FEWEST_REQUESTS: f64 = 3.0;
/// Requests that a memory expects of the time since the last one, and there were none: it is out of date. By chance that
/// happens once in twenty times.
const MISSED: f64 = 3.0;
/// A step time without known slope is taken to be of a batch that adds as much as this many sequences' worth of base.
const PRIOR_SEQUENCES: f64 = 32.0;
/// How many reports the prior weighs, at a spread of one sequence.
const PRIOR_WEIGHT: f64 = 4.0;

/// A sum of which older parts count less.
#[derive(Debug, Clone, Copy, Default)]
struct Faded(f64);

impl Faded {
    fn add(&mut self, fade: f64, value: f64) {
        self.0 = self.0 * fade + value;
    }
}

/// What reports add to a memory, and what it still holds of it: counts.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    arrived: Faded,
    arrived_tokens: Faded,
    choices: Faded,
    prefilled: Faded,
    prefilled_tokens: Faded,
    decoded_tokens: Faded,
    finished: Faded,
    finished_tokens: Faded,
}

impl Sums {
    /// What happened between two reports of an instance.
    fn learn(&mut self, fade: f64, known: &InstanceLoad, load: &InstanceLoad) {
        let more = |of: fn(&InstanceLoad) -> u64| of(load).saturating_sub(of(known)) as f64;
        self.arrived.add(fade, more(|load| load.accepted_requests));
        self.arrived_tokens.add(fade, more(|load| load.accepted_prompt_tokens));
        self.choices.add(fade, more(|load| load.accepted_choices));
        self.prefilled.add(fade, more(|load| load.prefilled_requests));
        self.prefilled_tokens.add(fade, more(|load| load.prefilled_tokens));
        self.decoded_tokens.add(fade, more(|load| load.decoded_tokens));
        self.finished.add(fade, more(|load| load.finished_requests));
        self.finished_tokens.add(fade, more(|load| load.finished_tokens));
    }

    /// Tokens of a prompt that are computed, for a request. Until enough are: all that prompts have.
    fn prompt_tokens(&self) -> f64 {
        match self.prefilled.0 >= FEWEST_REQUESTS {
            true => self.prefilled_tokens.0 / self.prefilled.0,
            false => self.arrived_tokens.0 / self.arrived.0,
        }
    }

    /// Tokens of a completion, when so many are being decoded. Of those that ended; until enough have, those that are
    /// being decoded count too, and are taken to be half done.
    fn completion_tokens(&self, running: f64) -> f64 {
        if self.finished.0 >= FEWEST_REQUESTS {
            return self.finished_tokens.0 / self.finished.0;
        }
        let unfinished = 2.0 * (self.decoded_tokens.0 - self.finished_tokens.0).max(0.0);
        (self.finished_tokens.0 + unfinished) / (self.finished.0 + running).max(1.0)
    }
}

/// One group.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    began: Option<Instant>,
    at: Option<Instant>,
    /// When a request last arrived.
    arrived: Option<Instant>,
    memories: [Sums; MEMORIES.len()],
    steps: StepLine,
    instances: BTreeMap<InstanceId, Last>,
}

/// What an instance said last.
#[derive(Debug, Clone, Copy)]
struct Last {
    at: Instant,
    incarnation: Incarnation,
    load: InstanceLoad,
    /// Tokens of prompts that it computed, of late; see [`COMPUTED`].
    computed: Faded,
}

/// Sums for a weighted line fit: weight, x, y, xx, xy.
#[derive(Debug, Clone, Copy, Default)]
struct StepLine([Faded; 5]);

impl StepLine {
    fn fade(&mut self, fade: f64) {
        self.0.iter_mut().for_each(|sum| sum.add(fade, 0.0));
    }

    fn learn(&mut self, Steps { seconds, sequences }: Steps) {
        let terms = [1.0, sequences, seconds, sequences * sequences, sequences * seconds];
        self.0.iter_mut().zip(terms).for_each(|(sum, term)| sum.add(1.0, term));
    }

    /// Base and slope, neither negative; none before the first report.
    ///
    /// Ridge regression: with batches all of one size the slope is the prior's, which assumes that sequences cost
    /// something, so that an instance is not taken to be without limit before it has been seen near it.
    fn fit(&self) -> Option<(f64, f64)> {
        let [weight, x, y, xx, xy] = self.0.map(|sum| sum.0);
        if weight <= 0.0 {
            return None;
        }
        let (mean_x, mean_y) = (x / weight, y / weight);
        let (spread, together) = (xx - weight * mean_x * mean_x, xy - weight * mean_x * mean_y);
        let prior = mean_y / (PRIOR_SEQUENCES + mean_x);
        let slope = (together + PRIOR_WEIGHT * prior) / (spread.max(0.0) + PRIOR_WEIGHT);
        let slope = slope.clamp(0.0, if mean_x > 0.0 { mean_y / mean_x } else { prior });
        Some((mean_y - slope * mean_x, slope))
    }
}

impl Meter {
    /// An instance of the group has reported. Counts that went back are of another start: they count from 0.
    pub fn report(&mut self, now: Instant, id: &InstanceId, incarnation: Incarnation, load: &InstanceLoad) {
        self.began.get_or_insert(now);
        let since = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        let before = self.instances.get(id).filter(|last| last.incarnation == incarnation);
        let new = Last { at: now, incarnation, load: *load, computed: Faded::default() };
        let Last { at, load: known, mut computed, .. } = *before.unwrap_or(&new);
        for (memory, long) in self.memories.iter_mut().zip(MEMORIES) {
            memory.learn(faded(since, long), &known, load);
        }
        let more = |of: fn(&InstanceLoad) -> u64| of(load).saturating_sub(of(&known)) as f64;
        if more(|load| load.accepted_requests) > 0.0 {
            self.arrived = Some(now);
        }
        let fade = faded(since, MEMORIES[0]);
        self.steps.fade(fade);
        if let Some(steps) = Steps::between(&known, load) {
            self.steps.learn(steps);
        }
        let fade = faded(now.saturating_duration_since(at), COMPUTED);
        computed.add(fade, more(|load| load.prefilled_tokens));
        self.instances.insert(id.clone(), Last { computed, ..new });
    }

    /// Forgets instances that are of the group no more.
    pub fn retain(&mut self, member: impl Fn(&InstanceId) -> bool) {
        self.instances.retain(|id, _| member(id));
    }

    /// None until there is something to go by, and once nothing is asked for any more.
    pub fn demand(&self, now: Instant) -> Option<Demand> {
        let (began, at, arrived) = (self.began?, self.at?, self.arrived?);
        let (age, since) = (now.saturating_duration_since(began), now.saturating_duration_since(at));
        if age < SHORTEST {
            return None;
        }
        let silence = now.saturating_duration_since(arrived).as_secs_f64();
        // Shorter memories, by the weight of their time and what they know to have arrived in it.
        let mut shorter: Vec<(f64, f64)> = Vec::new();
        for (sums, long) in self.memories.iter().zip(MEMORIES) {
            // The weight of the whole time that was watched: what a constant stream of one a second would have summed to.
            let weight = long.as_secs_f64() * (1.0 - faded(age, long));
            let known = sums.arrived.0 * faded(since, long);
            let rate = known / weight;
            let too_few = |(weight, known): &(f64, f64)| {
                let expected = rate * weight;
                *known < expected - 2.0 * expected.sqrt() - 1.0
            };
            let over = !shorter.is_empty() && rate * silence > MISSED;
            if over || shorter.iter().any(too_few) {
                return None;
            }
            if known >= FEWEST_REQUESTS {
                let decoding = self.instances.values().filter(|last| last.load.decode_steps > 0);
                let running = decoding.map(|last| f64::from(last.load.running_sequences)).sum();
                let choices = sums.choices.0 / sums.arrived.0;
                return Some(Demand {
                    requests_per_second: rate,
                    prompt_tokens: sums.prompt_tokens(),
                    completion_tokens: sums.completion_tokens(running) * choices,
                });
            }
            shorter.push((weight, known));
        }
        None
    }

    /// Of a typical instance; none until both phases have been measured. `block_tokens` is the group's.
    pub fn speed(&self, block_tokens: u32) -> Option<Speed> {
        let measured = |of: fn(&InstanceLoad) -> u64| {
            let values: Vec<f64> = self
                .instances
                .values()
                .map(|last| of(&last.load) as f64)
                .filter(|value| *value > 0.0)
                .collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let (step_base, step_per_sequence) = self.steps.fit()?;
        Some(Speed {
            prefill_tokens_per_second: self.prefill_tokens_per_second()?,
            step_base,
            step_per_sequence,
            sequences: measured(|load| load.max_sequences.into())?,
            kv_tokens: measured(|load| load.kv_blocks_total.into())? * f64::from(block_tokens),
        })
    }

    /// Of an instance that computes prompts. Who computed most of late says most: decode instances have a rate too, but
    /// know it of a few short prompts.
    fn prefill_tokens_per_second(&self) -> Option<f64> {
        let (mut weights, mut rates) = (0.0, 0.0);
        for last in self.instances.values().filter(|last| last.load.prefill_tokens_per_second > 0) {
            // One more, so that all say the same while nobody has computed anything.
            let weight = last.computed.0 + 1.0;
            weights += weight;
            rates += weight * last.load.prefill_tokens_per_second as f64;
        }
        (weights > 0.0).then(|| rates / weights)
    }
}

/// What is left of a weight of 1 after so long.
fn faded(after: Duration, long: Duration) -> f64 {
    (-after.as_secs_f64() / long.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests;
