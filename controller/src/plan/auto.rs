//! How a group's instances are best divided into prefill and decode, from what they are asked for and what they measured.
//! Pure: [`Measured`] in, a [`Division`] out, which says why in numbers.
//!
//! Both phases are forecast for every possible division. A prompt waits as in a queue with several servers
//! (Sakasegawa's approximation of M/M/c) and is then computed; a token takes a decode step, and how many sequences share
//! a step follows from Little's law: as many as arrive in the time that one takes. A sequence waits for its place in a batch
//! as a prompt does, with a server for each place. The *pressure* on a division is the
//! larger of both forecasts, each as a share of its target: above 1 a target is missed.
//!
//! Moving an instance empties it first, so the present division is kept unless it is under pressure and another one
//! has clearly less ([`Caution`]). A division in use is never changed by its own forecast: what is best stays best.
//!
//! Called by [`super`]'s planner for groups whose policy is `auto`.

use std::{fmt, ops::RangeInclusive, time::Duration};

use super::split::Split;

/// What a group is asked for: means over a recent window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demand {
    pub requests_per_second: f64,
    /// Computed for a request: what a prefix cache held is not among them.
    pub prompt_tokens: f64,
    pub completion_tokens: f64,
}

/// What one instance of the group can do, as measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    pub prefill_tokens_per_second: f64,
    /// Seconds of a decode step, without any sequence.
    pub step_base: f64,
    /// Seconds that each sequence adds to a decode step.
    pub step_per_sequence: f64,
    /// Most sequences that it decodes at a time.
    pub sequences: f64,
    /// Tokens that its KV cache holds.
    pub kv_tokens: f64,
}

/// What operators promise their users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Targets {
    /// From a request's arrival to its first token.
    pub ttft: Duration,
    /// Between tokens.
    pub tpot: Duration,
}

/// What must hold before an instance is moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Caution {
    /// No division is changed below this pressure.
    pub pressure: f64,
    /// By which share the new division's pressure must be smaller.
    pub gain: f64,
}

impl Caution {
    /// Any gain is worth a move.
    pub const NONE: Self = Self { pressure: 0.0, gain: 0.0 };
}

impl Default for Caution {
    fn default() -> Self {
        Self { pressure: 0.7, gain: 0.2 }
    }
}

/// All that a division is decided from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    pub demand: Demand,
    pub speed: Speed,
    pub targets: Targets,
    pub caution: Caution,
}

/// What is expected of one phase.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Seconds: mean time to first token, or per token. Infinite if the instances cannot keep up.
    pub seconds: f64,
    /// Of what its instances can do; above 1 they cannot keep up.
    pub utilisation: f64,
}

impl Forecast {
    /// Pressure of a phase that cannot keep up: above every one that can, and the more so the more it lacks.
    const OVERLOAD: f64 = 1e6;

    fn of(seconds: f64, utilisation: f64) -> Self {
        if utilisation < 1.0 {
            Self { seconds, utilisation }
        } else {
            Self { seconds: f64::INFINITY, utilisation }
        }
    }

    fn pressure(&self, target: Duration) -> f64 {
        if self.seconds.is_finite() {
            (self.seconds / target.as_secs_f64()).min(Self::OVERLOAD)
        } else {
            Self::OVERLOAD * self.utilisation
        }
    }
}

/// Mean time to first token with `prefill` instances.
pub fn time_to_first_token(demand: &Demand, speed: &Speed, prefill: usize) -> Forecast {
    let instances = prefill as f64;
    let service = demand.prompt_tokens / speed.prefill_tokens_per_second;
    let utilisation = demand.requests_per_second * service / instances;
    Forecast::of(service * (1.0 + waits(instances, utilisation)), utilisation)
}

/// How many times its own service a request waits for one of so many servers, on average, while they can keep up.
/// H. Sakasegawa, "An approximation formula L_q = a rho^b / (1 - rho)", 1977; both variations taken as 1.
fn waits(servers: f64, utilisation: f64) -> f64 {
    utilisation.powf((2.0 * (servers + 1.0)).sqrt() - 1.0) / (servers * (1.0 - utilisation))
}

/// Mean time per token with `decode` instances.
pub fn time_per_token(demand: &Demand, speed: &Speed, decode: usize) -> Forecast {
    let instances = decode as f64;
    let tokens_per_second = demand.requests_per_second * demand.completion_tokens / instances;
    // The batch b that sustains itself: b = tokens/s * step(b), step(b) = base + b * per_sequence.
    let batch = tokens_per_second * speed.step_base / (1.0 - tokens_per_second * speed.step_per_sequence);
    // On average a sequence has its prompt and half of its completion in the cache; what is full first is the largest batch.
    let in_cache = speed.kv_tokens / (demand.prompt_tokens + demand.completion_tokens / 2.0);
    let largest = in_cache.min(speed.sequences);
    let utilisation = tokens_per_second * (speed.step_base / largest + speed.step_per_sequence);
    let step = speed.step_base + batch * speed.step_per_sequence;
    // Whoever waits for a place in a batch waits between two tokens; it is shared by all of a completion's.
    Forecast::of(step * (1.0 + waits(largest * instances, utilisation)), utilisation)
}

/// A division and what is expected of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    pub prefill: usize,
    pub decode: usize,
    pub ttft: Forecast,
    pub tpot: Forecast,
    pub pressure: f64,
}

impl Outlook {
    /// At least one of each.
    pub fn of(measured: &Measured, prefill: usize, decode: usize) -> Self {
        let Measured { demand, speed, targets, .. } = measured;
        let ttft = time_to_first_token(demand, speed, prefill);
        let tpot = time_per_token(demand, speed, decode);
        let pressure = ttft.pressure(targets.ttft).max(tpot.pressure(targets.tpot));
        Self { prefill, decode, ttft, tpot, pressure }
    }
}

impl fmt::Display for Outlook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefill, decode, ttft, tpot, .. } = self;
        write!(f, "{prefill} prefill, {decode} decode: TTFT {}, TPOT {}", Millis(*ttft), Millis(*tpot))
    }
}

struct Millis(Forecast);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Forecast { seconds, utilisation } = self.0;
        let use_percent = utilisation * 100.0;
        if seconds.is_finite() {
            write!(f, "{:.1} ms ({use_percent:.0} % used)", seconds * 1e3)
        } else {
            write!(f, "without end ({use_percent:.0} % used)")
        }
    }
}

/// How a group is to be divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Division {
    /// The present one.
    pub present: Outlook,
    /// The one under the least pressure.
    pub best: Outlook,
    /// The one to have: either of the two.
    pub prefill: usize,
}

impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { present, best, prefill } = self;
        if *prefill != present.prefill {
            write!(f, "{best}; better than {present}")
        } else if best.prefill == present.prefill {
            write!(f, "{present}; the best there is")
        } else {
            write!(f, "{present}; enough, or not much worse than {best}")
        }
    }
}

/// Divides `instances >= 2`, of which those of `held` prefill and decode at present; the others are free to do either, and are
/// given what is best without a move. As many as `range` says may prefill; there is always one of each.
pub fn divide(instances: usize, held: Split, range: RangeInclusive<usize>, measured: &Measured) -> Division {
    let Caution { pressure, gain } = measured.caution;
    let least = |range: RangeInclusive<usize>, near: usize| {
        let outlooks = range.map(|prefill| Outlook::of(measured, prefill, instances - prefill));
        outlooks.min_by(|a, b| {
            let away = |it: &Outlook| it.prefill.abs_diff(near);
            a.pressure.total_cmp(&b.pressure).then(away(a).cmp(&away(b)))
        })
    };
    let fewest = held.prefill.clamp(*range.start(), *range.end());
    let most = instances.saturating_sub(held.decode).clamp(fewest, *range.end());
    let present =
        least(fewest..=most, fewest).unwrap_or_else(|| Outlook::of(measured, fewest, instances - fewest));
    let best = least(range, present.prefill).unwrap_or(present);
    let worth = present.pressure > pressure && best.pressure < present.pressure * (1.0 - gain);
    Division { present, best, prefill: if worth { best.prefill } else { present.prefill } }
}

/// The fewest instances of each role that meet the targets, up to `most` of each: what to scale to.
///
/// A target that not even an idle instance meets is left out: then as many as keep up with ease are wanted.
pub fn wanted(measured: &Measured, most: usize) -> Split {
    let Measured { demand, speed, targets, caution: _ } = measured;
    // The caution of the moment is about moves: how much is enough does not change with it.
    let ease = Caution::default().pressure;
    let fewest = |target: Duration, forecast: &dyn Fn(usize) -> Forecast| {
        let idle = forecast(usize::MAX / 2).seconds;
        let enough = |count: &usize| {
            let of = forecast(*count);
            let in_time = idle >= target.as_secs_f64() || of.pressure(target) <= 1.0;
            of.utilisation <= ease && in_time
        };
        (1..=most).find(enough).unwrap_or(most)
    };
    Split {
        prefill: fewest(targets.ttft, &|count| time_to_first_token(demand, speed, count)),
        decode: fewest(targets.tpot, &|count| time_per_token(demand, speed, count)),
    }
}

#[cfg(test)]
mod tests;
