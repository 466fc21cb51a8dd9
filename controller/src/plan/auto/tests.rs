//! Forecasts against a simulated queue, divisions against every alternative.

use proptest::prelude::*;

use super::*;

/// An accelerator of the present generation with a model of about 8 billion weights.
const SPEED: Speed = Speed {
    prefill_tokens_per_second: 12_000.0,
    step_base: 0.009,
    step_per_sequence: 0.000_15,
    sequences: 1000.0,
    kv_tokens: 400_000.0,
};
const TARGETS: Targets = Targets { ttft: Duration::from_millis(800), tpot: Duration::from_millis(40) };

fn demand(requests_per_second: f64, prompt_tokens: f64, completion_tokens: f64) -> Demand {
    Demand { requests_per_second, prompt_tokens, completion_tokens }
}

fn measured(demand: &Demand) -> Measured {
    Measured { demand: *demand, speed: SPEED, targets: TARGETS, caution: Caution::default() }
}

fn divided(instances: usize, prefill: usize, demand: &Demand) -> Division {
    let held = Split { prefill, decode: instances.saturating_sub(prefill) };
    divide(instances, held, 1..=instances - 1, &measured(demand))
}

#[test]
fn long_prompts_want_prefill_and_long_answers_want_decode() {
    let summaries = divided(8, 4, &demand(6.0, 9_000.0, 150.0));
    assert!(summaries.prefill >= 6, "{summaries:?}");
    let stories = divided(8, 4, &demand(30.0, 300.0, 1_500.0));
    assert!(stories.prefill <= 2, "{stories:?}");
}

#[test]
fn without_pressure_nothing_moves() {
    for prefill in 1..8 {
        assert_eq!(divided(8, prefill, &demand(0.1, 100.0, 20.0)).prefill, prefill);
    }
    assert_eq!(divided(8, 0, &demand(0.0, 0.0, 0.0)).prefill, 1, "there is always one of each");
    assert_eq!(divided(8, 8, &demand(0.0, 0.0, 0.0)).prefill, 7);
}

#[test]
fn a_group_that_cannot_keep_up_is_divided_to_lose_least() {
    let division = divided(4, 1, &demand(40.0, 6_000.0, 300.0));
    assert!(division.best.ttft.seconds.is_infinite());
    assert_eq!(division.prefill, 3, "prefill lacks the most: {division:?}");
    let text = division.best.to_string();
    assert!(text.contains("3 prefill, 1 decode") && text.contains("without end"), "{text}");
}

#[test]
fn who_is_free_goes_where_it_helps_most() {
    let summaries = demand(6.0, 9_000.0, 150.0);
    let division = divide(8, Split { prefill: 1, decode: 1 }, 1..=7, &measured(&summaries));
    assert_eq!(division.prefill, division.best.prefill, "six of eight have no role yet: {division}");
    let division = divide(8, Split { prefill: 1, decode: 6 }, 1..=7, &measured(&demand(0.1, 100.0, 20.0)));
    assert!((1..=2).contains(&division.prefill), "without pressure nobody is moved: {division}");
}

/// What `instances` make of a stream of arrivals with the service times of [`SPEED`]: mean seconds to the first token.
fn simulated(demand: &Demand, instances: usize) -> f64 {
    let mut free = vec![0.0_f64; instances];
    let (mut now, mut sum, mut state) = (0.0, 0.0, 1_u64);
    let mut exponential = |mean: f64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        -mean * (1.0 - (state >> 11) as f64 / (1_u64 << 53) as f64).ln()
    };
    const REQUESTS: u32 = 200_000;
    for _ in 0..REQUESTS {
        now += exponential(1.0 / demand.requests_per_second);
        let service = exponential(demand.prompt_tokens / SPEED.prefill_tokens_per_second);
        let first = free.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("at least one");
        *first = first.max(now) + service;
        sum += *first - now;
    }
    sum / f64::from(REQUESTS)
}

#[test]
fn time_to_first_token_is_that_of_a_queue() {
    for (instances, rate) in [(1, 2.0), (1, 4.0), (3, 8.0), (3, 16.0), (8, 40.0)] {
        let demand = demand(rate, 2_000.0, 100.0);
        let (forecast, seen) =
            (time_to_first_token(&demand, &SPEED, instances).seconds, simulated(&demand, instances));
        assert!(
            (forecast / seen - 1.0).abs() < 0.1,
            "{instances} at {rate}/s: forecast {forecast}, seen {seen}"
        );
    }
}

#[test]
fn time_per_token_is_that_of_the_batch_that_sustains_itself() {
    let demand = demand(20.0, 1_000.0, 200.0);
    for decode in 1..=4 {
        let forecast = time_per_token(&demand, &SPEED, decode);
        // Little: sequences running = arrivals per second * seconds that each takes.
        let running =
            demand.requests_per_second * demand.completion_tokens * forecast.seconds / decode as f64;
        let step = SPEED.step_base + running * SPEED.step_per_sequence;
        // Places enough: hardly anybody waits for one.
        assert!((step / forecast.seconds - 1.0).abs() < 1e-6, "{decode}: {step} against {forecast:?}");
    }
}

#[test]
fn who_waits_for_a_place_in_a_batch_waits_between_tokens() {
    // Four places, of which 3.6 are taken on average.
    let few = Speed { sequences: 4.0, step_per_sequence: 0.0, ..SPEED };
    let demand = demand(0.9 * 4.0 / (200.0 * SPEED.step_base), 1_000.0, 200.0);
    // Erlang's formula for four servers at 90 %: a request waits 1.97 times its own service.
    let one = time_per_token(&demand, &few, 1).seconds / SPEED.step_base;
    assert!((one / 2.97 - 1.0).abs() < 0.05, "{one}");
    let two = time_per_token(&demand, &few, 2).seconds / SPEED.step_base;
    assert!(two < 1.03, "with eight places at 45 %: {two}");
}

#[test]
fn caches_that_are_full_count_like_time() {
    let demand = demand(10.0, 8_000.0, 500.0);
    let forecast = |kv_tokens| time_per_token(&demand, &Speed { kv_tokens, ..SPEED }, 1);
    let (roomy, full) = (forecast(2e6), forecast(2e5));
    assert!(roomy.seconds.is_finite() && full.seconds.is_infinite(), "{roomy:?} {full:?}");
}

#[test]
fn what_is_wanted_meets_the_targets_and_one_less_does_not() {
    let demand = demand(25.0, 3_000.0, 400.0);
    let split = wanted(&measured(&demand), 100);
    let Split { prefill, decode } = split;
    let enough = |of: Forecast, target| of.pressure(target) <= 1.0 && of.utilisation <= 0.7;
    let ttft = |count| enough(time_to_first_token(&demand, &SPEED, count), TARGETS.ttft);
    let tpot = |count| enough(time_per_token(&demand, &SPEED, count), TARGETS.tpot);
    assert!(ttft(prefill) && !ttft(prefill - 1), "{prefill} prefill");
    assert!(tpot(decode) && !tpot(decode - 1), "{decode} decode");
    // As while small gains are worth a move, and while nobody is moved.
    for caution in [Caution::NONE, Caution { pressure: f64::INFINITY, ..Caution::default() }] {
        let cautious = Measured { caution, ..measured(&demand) };
        assert_eq!(wanted(&cautious, 100), split);
    }
    let impossible = Targets { ttft: Duration::from_millis(1), ..TARGETS };
    let Split { prefill, .. } = wanted(&Measured { targets: impossible, ..measured(&demand) }, 100);
    assert!(prefill < 100, "a target that nobody can meet asks for no endless fleet: {prefill}");
}

fn demands() -> impl Strategy<Value = Demand> {
    (0.0..200.0, 1.0..20_000.0, 1.0..4_000.0).prop_map(|(rate, prompt, answer)| demand(rate, prompt, answer))
}

proptest! {
    #[test]
    fn a_division_is_stable_and_has_one_of_each(demand in demands(), instances in 2_usize..40, prefill in 0_usize..45) {
        let first = divided(instances, prefill, &demand);
        prop_assert!((1..instances).contains(&first.prefill));
        let again = divided(instances, first.prefill, &demand);
        prop_assert_eq!(again.prefill, first.prefill, "planned again it changes nothing");
        for other in 1..instances {
            let outlook = Outlook::of(&measured(&demand), other, instances - other);
            prop_assert!(first.best.pressure <= outlook.pressure);
        }
    }

    #[test]
    fn more_instances_never_forecast_worse(demand in demands(), count in 1_usize..40) {
        let (few, more) = (time_to_first_token(&demand, &SPEED, count), time_to_first_token(&demand, &SPEED, count + 1));
        prop_assert!(more.seconds <= few.seconds && more.utilisation <= few.utilisation);
        let (few, more) = (time_per_token(&demand, &SPEED, count), time_per_token(&demand, &SPEED, count + 1));
        prop_assert!(more.seconds <= few.seconds && more.utilisation <= few.utilisation);
    }

    #[test]
    fn no_forecast_is_not_a_number(demand in demands(), prefill in 1_usize..40, decode in 1_usize..40) {
        let outlook = Outlook::of(&measured(&demand), prefill, decode);
        prop_assert!(!outlook.pressure.is_nan() && outlook.pressure >= 0.0, "{outlook:?}");
    }
}
