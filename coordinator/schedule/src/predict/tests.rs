//! Machines of known speed are learnt; liars, noise and restarts do not break what is believed.

use std::{num::NonZeroU32, time::Duration};

use baton_proto::attention_pairs;
use proptest::prelude::*;

use super::{fit::predicted, step_time::HALF_LIFE, *};
use crate::fleet::testing::spec;

/// A machine that takes so long, with noise of a tenth, and what it has reported so far.
struct Machine {
    spec: Spec,
    prefill: [f64; 3],
    decode: [f64; 3],
    load: Load,
    draws: u64,
}

impl Machine {
    fn new(id: &str, prefill: [f64; 3], decode: [f64; 3]) -> Self {
        Self { spec: spec(id), prefill, decode, load: Load::default(), draws: 7 }
    }

    fn draw(&mut self, most: u64) -> u64 {
        self.draws =
            self.draws.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.draws >> 33) % most
    }

    /// Some steps of each kind, and a report of them.
    fn work(&mut self, speeds: &mut Speeds, now: Instant) {
        let (tokens, before) = (64 + self.draw(448), self.draw(60_000));
        let counted = attention_pairs(tokens, before + tokens);
        let noise = 0.9 + self.draw(201) as f64 / 1_000.0;
        let micros = (predicted(self.prefill, [tokens as f64, counted as f64, 1.0])) * noise;
        let (sequences, context) = (1 + self.draw(60), self.draw(150_000));
        let step = self.decode[0] + self.decode[1] * sequences as f64 + self.decode[2] * context as f64;
        let timed = &mut self.load.timed;
        timed.prefill_micros += micros as u64;
        timed.prefill_steps += 1;
        timed.prefill_tokens += tokens;
        timed.prefill_pairs += counted;
        timed.decode_micros += (step * noise * 4.0) as u64;
        timed.decode_steps += 4;
        timed.decode_sequences += 4 * sequences;
        timed.context_tokens += 4 * context;
        speeds.reported(&self.spec, &self.load, now);
    }
}

/// How far what is predicted is from the truth, at worst, over some work.
fn error(speeds: &Speeds, machine: &Machine, now: Instant) -> f64 {
    let speed = speeds.of(&machine.spec, now);
    let mut worst = 0.0f64;
    for (tokens, whole) in [(1_000.0, 1_000.0), (8_000.0, 8_000.0), (2_000.0, 40_000.0)] {
        let pairs = tokens * (whole - tokens / 2.0);
        let truth = predicted(machine.prefill, [tokens, pairs, f64::ceil(tokens / 512.0)]);
        worst = worst.max((speed.prefill_micros(tokens, pairs) / truth - 1.0).abs());
    }
    for (sequences, context) in [(4.0, 20_000.0), (32.0, 100_000.0), (60.0, 60_000.0)] {
        let truth = machine.decode[0] + machine.decode[1] * sequences + machine.decode[2] * context;
        worst = worst.max((speed.step_micros(sequences, context) / truth - 1.0).abs());
    }
    worst
}

const FAST: ([f64; 3], [f64; 3]) = ([125.0, 1.2e-3, 0.0], [22_000.0, 200.0, 0.08]);
const SLOW: ([f64; 3], [f64; 3]) = ([250.0, 2.4e-3, 0.0], [44_000.0, 400.0, 0.16]);

#[test]
fn fifty_reports_are_enough_to_know_each_machine() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let mut fast = Machine::new("a", FAST.0, FAST.1);
    let mut slow = Machine::new("b", SLOW.0, SLOW.1);
    for _ in 0..51 {
        fast.work(&mut speeds, now);
        slow.work(&mut speeds, now);
    }
    let errors = [error(&speeds, &fast, now), error(&speeds, &slow, now)];
    assert!(errors.iter().all(|error| *error < 0.12), "{errors:?}");
}

#[test]
fn a_new_instance_is_taken_for_one_of_its_kind_and_what_was_learnt_fades_towards_it() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let mut all: Vec<Machine> = ["a", "b", "c"].map(|id| Machine::new(id, FAST.0, FAST.1)).into();
    all.push(Machine::new("s", SLOW.0, SLOW.1));
    for _ in 0..51 {
        all.iter_mut().for_each(|machine| machine.work(&mut speeds, now));
    }
    let kind = speeds.of(&spec("new"), now).prefill_micros(1_000.0, 500_000.0);
    let slow = |after| speeds.of(&spec("s"), now + after).prefill_micros(1_000.0, 500_000.0);
    let truth = 250.0 * 1_000.0 + 2.4e-3 * 500_000.0;
    assert!(kind < slow(Duration::ZERO) && (slow(Duration::ZERO) / truth - 1.0).abs() < 0.15);
    let half = (slow(HALF_LIFE) - kind) / (slow(Duration::ZERO) - kind);
    assert!((half - 0.5).abs() < 1e-9, "{half}");
    assert!((slow(HALF_LIFE * 20) / kind - 1.0).abs() < 1e-3, "it is tried again");
    assert_eq!(speeds.of(&Spec { layout: "other".into(), ..spec("x") }, now), Speed::default());
}

/// Short rests of long prompts, and long prompts that are new: what a step takes whatever is in it is no attention.
#[test]
fn a_step_is_told_from_what_is_in_it() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let (prefill, step_tokens) = ([40.0, 0.8e-3, 20_000.0], NonZeroU32::new(2_048));
    let mut machine = Machine::new("a", prefill, FAST.1);
    machine.load.step_tokens = step_tokens;
    let mut work = |speeds: &mut Speeds, long: bool| {
        let noise = 0.95 + machine.draw(101) as f64 / 1_000.0;
        let (tokens, before) = match long {
            false => (16 + machine.draw(64), 30_000),
            true => (2_048 * (1 + machine.draw(4)), 0),
        };
        let (pairs, steps) = (attention_pairs(tokens, before + tokens), tokens.div_ceil(2_048));
        let timed = &mut machine.load.timed;
        timed.prefill_micros +=
            (predicted(prefill, [tokens as f64, pairs as f64, steps as f64]) * noise) as u64;
        timed.prefill_tokens += tokens;
        timed.prefill_pairs += pairs;
        timed.prefill_steps += steps;
        speeds.reported(&machine.spec, &machine.load, now);
    };
    (0..200).for_each(|report| work(&mut speeds, report % 10 >= 7));
    let close = |speeds: &Speeds, most: f64| {
        let speed = speeds.of(&spec("a"), now);
        for (tokens, whole) in [(32_768, 32_768), (2_048, 2_048), (40, 40), (40, 30_000)] {
            let pairs = attention_pairs(tokens, whole) as f64;
            let truth = predicted(prefill, [tokens as f64, pairs, tokens.div_ceil(2_048) as f64]);
            let error = speed.prefill_micros(tokens as f64, pairs) / truth - 1.0;
            assert!(error.abs() < most, "{tokens} of {whole}: {error}");
        }
    };
    close(&speeds, 0.15);
    // Nothing long comes for long: what was learnt of that is not forgotten for what is guessed of nobody.
    (0..1_000).for_each(|_| work(&mut speeds, false));
    close(&speeds, 0.2);
}

#[test]
fn prefill_fades_while_only_decode_is_heard_of() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let mut all: Vec<Machine> = ["a", "b", "c"].map(|id| Machine::new(id, FAST.0, FAST.1)).into();
    let mut slow = Machine::new("s", SLOW.0, SLOW.1);
    for _ in 0..51 {
        all.iter_mut().for_each(|machine| machine.work(&mut speeds, now));
        slow.work(&mut speeds, now);
    }
    let later = now + HALF_LIFE * 20;
    for seconds in 1..=(later - now).as_secs() {
        for (machine, micros) in all.iter_mut().map(|machine| (machine, 44_000)).chain([(&mut slow, 88_000)])
        {
            let timed = &mut machine.load.timed;
            (timed.decode_micros, timed.decode_steps) =
                (timed.decode_micros + micros, timed.decode_steps + 2);
            speeds.reported(&machine.spec, &machine.load, now + Duration::from_secs(seconds));
        }
    }
    let (kind, own) = (speeds.of(&spec("new"), later), speeds.of(&slow.spec, later));
    let prefill = |speed: Speed| speed.prefill_micros(1_000.0, 500_000.0);
    assert!((prefill(own) / prefill(kind) - 1.0).abs() < 1e-3, "it is tried again");
    assert!(own.step_micros(4.0, 0.0) > 1.2 * kind.step_micros(4.0, 0.0), "of decode there is news");
}

#[test]
fn a_restart_is_learnt_anew_and_counters_that_went_back_teach_nothing() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let mut machine = Machine::new("a", FAST.0, FAST.1);
    (0..51).for_each(|_| machine.work(&mut speeds, now));
    let before = speeds.of(&machine.spec, now);
    machine.load.timed = Timed::default();
    speeds.reported(&machine.spec, &machine.load, now);
    let kind = speeds.of(&spec("new"), now);
    assert_eq!(speeds.of(&machine.spec, now), kind, "it is one of its kind again");
    let micros = |speed: Speed| speed.prefill_micros(1_000.0, 10_000_000.0);
    assert!((micros(before) / micros(kind) - 1.0).abs() < 0.1);
    speeds.forget(&machine.spec.id);
    assert_eq!(speeds.of(&machine.spec, now), kind);
}

/// A step may be held up by anything: one of two equals that was is not left aside for it.
#[test]
fn a_step_that_was_held_up_says_little() {
    // Also where machines are much faster than one of which nothing is known.
    for (held_up, faster) in [(1, 1), (2, 1), (3, 1), (5, 1), (20, 1), (1, 100), (2, 100_u32)] {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        let [prefill, decode] = [FAST.0, FAST.1].map(|line| line.map(|each| each / f64::from(faster)));
        let mut pair = ["a", "b"].map(|id| Machine::new(id, prefill, decode));
        for report in 1..=25 {
            if report == held_up {
                pair[0].load.timed.prefill_micros += 1_000_000 / u64::from(faster);
                pair[0].load.timed.decode_micros += 5_000_000 / u64::from(faster);
            }
            // The other has nothing to do at first: of that nothing is known but what one of its kind is.
            pair.iter_mut()
                .take(1 + usize::from(report > 5))
                .for_each(|machine| machine.work(&mut speeds, now));
            if report <= held_up.max(4) {
                continue;
            }
            let [of_one, of_other] = pair.each_ref().map(|machine| speeds.of(&machine.spec, now));
            let prefill = |speed: Speed| speed.prefill_micros(500.0, 125_000.0);
            let step = |speed: Speed| speed.step_micros(30.0, 60_000.0);
            let ratios = [prefill(of_one) / prefill(of_other), step(of_one) / step(of_other)];
            let most = ratios.iter().copied().fold(0.0, f64::max);
            assert!(most < 1.4, "step {held_up}, {faster} times as fast, report {report}: {ratios:?}");
        }
    }
}

/// One that is faster than all others of its kind has not been held up before: it is known to be fast, if not how fast.
#[test]
fn an_instance_that_is_much_faster_than_its_kind_is_known_to_be() {
    for (reports, least) in [(6, 1.5), (51, 2.0)] {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        let mut slow = ["a", "b", "c"].map(|id| Machine::new(id, FAST.0, FAST.1));
        let [prefill, decode] = [FAST.0, FAST.1].map(|line| line.map(|each| each / 4.0));
        let mut fast = Machine::new("f", prefill, decode);
        for _ in 0..reports {
            slow.iter_mut().for_each(|machine| machine.work(&mut speeds, now));
            fast.work(&mut speeds, now);
        }
        let [of_fast, of_slow] = [&fast, &slow[0]].map(|machine| speeds.of(&machine.spec, now));
        let prefill = |speed: Speed| speed.prefill_micros(500.0, 125_000.0);
        let step = |speed: Speed| speed.step_micros(30.0, 60_000.0);
        let ratios = [prefill(of_slow) / prefill(of_fast), step(of_slow) / step(of_fast)];
        assert!(ratios.iter().all(|ratio| *ratio > least), "after {reports}: {ratios:?}");
    }
}

/// Who has little to do tells little at a time, and much of that has faded when more comes.
#[test]
fn what_is_told_now_and_then_counts_too() {
    let (mut speeds, began) = (Speeds::default(), Instant::now());
    let mut all: Vec<Machine> = ["a", "b", "c"].map(|id| Machine::new(id, FAST.0, FAST.1)).into();
    let [prefill, decode] = [FAST.0, FAST.1].map(|line| line.map(|each| each * 4.0));
    all.push(Machine::new("s", prefill, decode));
    let times: Vec<Instant> = (0..20).map(|at| began + at * HALF_LIFE / 2).collect();
    for now in &times {
        all.iter_mut().for_each(|machine| machine.work(&mut speeds, *now));
    }
    let [fast, slow] = [0, 3].map(|at| speeds.of(&all[at].spec, times[19]));
    let prefill = |speed: Speed| speed.prefill_micros(500.0, 125_000.0);
    let ratio = prefill(slow) / prefill(fast);
    assert!(ratio > 1.5, "{ratio}");
}

/// What has faded is not back for one more sample.
#[test]
fn an_instance_that_was_slow_once_is_forgiven() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let mut pair = ["a", "b"].map(|id| Machine::new(id, FAST.0, FAST.1));
    let slow = [FAST.0, FAST.1].map(|line| line.map(|each| each * 4.0));
    [pair[0].prefill, pair[0].decode] = slow;
    (0..51).for_each(|_| pair.iter_mut().for_each(|machine| machine.work(&mut speeds, now)));
    (pair[0].prefill, pair[0].decode) = FAST;
    (0..51).for_each(|_| pair[1].work(&mut speeds, now));
    let later = now + HALF_LIFE * 10;
    pair[0].work(&mut speeds, later);
    let [one, other] = pair.each_ref().map(|machine| speeds.of(&machine.spec, later));
    let prefill = |speed: Speed| speed.prefill_micros(500.0, 125_000.0);
    let ratio = prefill(one) / prefill(other);
    assert!(ratio < 1.3, "{ratio}");
}

/// A step that took no time is none; one that is said to have taken next to none does not make the others' free, not even if it
/// is the first that is heard of.
#[test]
fn a_server_that_says_it_needs_no_time_is_not_believed() {
    for said in [0, 1] {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        let mut honest = Machine::new("h", FAST.0, FAST.1);
        let mut liar = Machine::new("l", [0.0; 3], [0.0; 3]);
        for _ in 0..300 {
            liar.work(&mut speeds, now);
            let timed = &mut liar.load.timed;
            (timed.prefill_micros, timed.decode_micros) =
                (timed.prefill_steps * said, timed.decode_steps * said);
            honest.work(&mut speeds, now);
        }
        let error = error(&speeds, &honest, now);
        assert!(error < 0.8, "of {said} us: {error}");
        (0..100).for_each(|_| honest.work(&mut speeds, now));
        let error = self::error(&speeds, &honest, now);
        assert!(error < 0.3, "of {said} us, afterwards: {error}");
    }
}

/// What lasts is believed from the second sample on.
#[test]
fn an_instance_that_has_become_slow_is_soon_known_to_be() {
    let (mut speeds, now) = (Speeds::default(), Instant::now());
    let mut pair = ["a", "b"].map(|id| Machine::new(id, FAST.0, FAST.1));
    (0..10).for_each(|_| pair.iter_mut().for_each(|machine| machine.work(&mut speeds, now)));
    (pair[0].prefill, pair[0].decode) = (FAST.0.map(|each| 4.0 * each), FAST.1.map(|each| 4.0 * each));
    (0..5).for_each(|_| pair.iter_mut().for_each(|machine| machine.work(&mut speeds, now)));
    let [slow, fast] = pair.each_ref().map(|machine| speeds.of(&machine.spec, now));
    let prefill = |speed: Speed| speed.prefill_micros(500.0, 125_000.0);
    let ratio = prefill(slow) / prefill(fast);
    assert!(ratio > 1.5, "{ratio}");
}

proptest! {
    /// Whatever one instance reports, it is believed to be neither free nor endless beside others of its kind.
    #[test]
    fn nobody_is_believed_to_be_beyond_reason(
        reports in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..60),
    ) {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        let mut honest: Vec<Machine> = ["a", "b", "c"].map(|id| Machine::new(id, FAST.0, FAST.1)).into();
        let liar = spec("l");
        for (micros, tokens, pairs) in reports {
            honest.iter_mut().for_each(|machine| machine.work(&mut speeds, now));
            let timed = Timed {
                prefill_micros: micros,
                prefill_steps: pairs >> 7,
                prefill_tokens: tokens,
                prefill_pairs: pairs,
                decode_micros: micros,
                decode_steps: tokens,
                decode_sequences: pairs,
                context_tokens: micros,
            };
            speeds.reported(&liar, &Load { timed, ..Load::default() }, now);
            let speed = speeds.of(&liar, now);
            let said = [speed.prefill_micros(1_000.0, 0.0), speed.step_micros(10.0, 10_000.0)];
            prop_assert!(said.iter().all(|micros| micros.is_finite() && *micros >= 0.0), "{said:?}");
        }
    }
}
