//! Tables, properties and statistics for the sampler.

use super::*;
use proptest::prelude::*;

fn sampled(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, ..SamplingParams::GREEDY }
}

fn choose(logits: &[f32], params: &SamplingParams, counts: Option<&TokenCounts>, position: u32) -> u32 {
    Sampler::default().sample(logits, params, counts, position).expect("a token")
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    assert_eq!(choose(&[1.0, 3.0, 3.0, -1.0], &SamplingParams::GREEDY, None, 7), 1);
    assert_eq!(choose(&[f32::NEG_INFINITY, -5.0], &sampled(1e-6), None, 0), 1);
}

/// Wherever the largest stands in a vocabulary, and whatever stands behind the last sixteen; one NaN spoils all.
#[test]
fn the_largest_is_found_anywhere() {
    let logits: Vec<f32> = (0..75).map(|i| (i % 7) as f32).collect();
    for at in 0..logits.len() {
        let mut one = logits.clone();
        one[at] = 9.0;
        *one.last_mut().expect("some") = 9.0;
        assert_eq!(choose(&one, &SamplingParams::GREEDY, None, 0), at as u32);
        one[at] = f32::NAN;
        assert_eq!(Sampler::default().sample(&one, &SamplingParams::GREEDY, None, 0), Err(BadLogits), "{at}");
    }
}

#[test]
fn broken_logits_are_an_error() {
    for broken in [
        &[][..],
        &[f32::NAN, 1.0],
        &[1.0, f32::NAN],
        &[f32::NEG_INFINITY, f32::NEG_INFINITY],
        &[f32::INFINITY, 0.0],
    ] {
        for params in [SamplingParams::GREEDY, sampled(1.0)] {
            assert_eq!(Sampler::default().sample(broken, &params, None, 0), Err(BadLogits), "{broken:?}");
        }
    }
}

#[test]
fn penalties_follow_their_definitions() {
    let counts = TokenCounts::new(&[0, 0, 1], &[1, 2, 2]);
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..SamplingParams::GREEDY
    };
    let mut logits = [4.0, -3.0, 2.0, 1.0];
    penalise(&mut logits, &params, &counts);
    // 0: prompt only; 1: both, negative; 2: completion twice; 3: never seen.
    assert_eq!(logits, [2.0, -6.75, 1.0 - 1.25, 1.0]);
}

#[test]
fn no_penalty_makes_a_sound_logit_unsound() {
    let counts = TokenCounts::new(&[0, 1], &[0, 1]);
    for repetition_penalty in [f32::MIN_POSITIVE / 1e3, 1e-30, f32::MAX] {
        let params =
            SamplingParams { repetition_penalty, frequency_penalty: f32::MAX, ..SamplingParams::GREEDY };
        for mut logits in [[1e10, -1e10, 0.5], [-1e10, 1e10, 0.5]] {
            penalise(&mut logits, &params, &counts);
            assert!(logits.iter().all(|logit| logit.is_finite()), "{repetition_penalty}: {logits:?}");
        }
    }
    let mut broken = [f32::NAN, f32::INFINITY, 0.5];
    penalise(&mut broken, &SamplingParams::GREEDY, &counts);
    assert!(broken[0].is_nan() && broken[1].is_infinite(), "what the model broke stays seen");
}

#[test]
fn penalties_act_on_greedy_choices_too() {
    let params = SamplingParams { presence_penalty: 2.0, ..SamplingParams::GREEDY };
    let counts = TokenCounts::new(&[], &[0]);
    assert_eq!(choose(&[1.5, 1.0], &params, Some(&counts), 1), 1);
}

#[test]
fn bias_moves_bans_and_forces_before_penalties() {
    let biased = |logit_bias: &[(u32, f32)]| SamplingParams {
        logit_bias: logit_bias.to_vec(),
        ..SamplingParams::GREEDY
    };
    let logits = [1.0, 0.5, -3.0];
    assert_eq!(choose(&logits, &biased(&[(1, 0.25)]), None, 0), 0);
    assert_eq!(choose(&logits, &biased(&[(1, 0.75)]), None, 0), 1);
    assert_eq!(choose(&logits, &biased(&[(2, 100.0)]), None, 0), 2);
    assert_eq!(choose(&logits, &biased(&[(0, -100.0), (9, 100.0)]), None, 0), 1, "9 is no token");
    // 1.5 / 2 after the bias; before it, it would be 1.25.
    let halved = SamplingParams { repetition_penalty: 2.0, ..biased(&[(0, 0.5)]) };
    assert_eq!(choose(&[1.0, 1.0, -3.0], &halved, Some(&TokenCounts::new(&[0], &[])), 0), 1);
    for position in 0..200 {
        let params = SamplingParams { temperature: 1.0, ..biased(&[(0, -100.0)]) };
        assert_ne!(choose(&logits, &params, None, position), 0);
    }
}

#[test]
fn stop_tokens_wait_for_min_tokens() {
    let params = SamplingParams { min_tokens: 2, stop_tokens: vec![0, 2, 77], ..SamplingParams::GREEDY };
    let chosen = [0, 1, 2, 3].map(|position| choose(&[3.0, 1.0, 2.0], &params, None, position));
    assert_eq!(chosen, [1, 1, 0, 0]);
}

/// Draws at many positions and compares frequencies with probabilities by a chi-squared test.
fn check_distribution(logits: &[f32], params: &SamplingParams, expected: &[f64]) {
    const DRAWS: u32 = 60_000;
    let mut sampler = Sampler::default();
    let mut seen = vec![0u32; logits.len()];
    for position in 0..DRAWS {
        seen[sampler.sample(logits, params, None, position).expect("a token") as usize] += 1;
    }
    let mut chi_squared = 0.0;
    for (token, (&seen, &probability)) in seen.iter().zip(expected).enumerate() {
        let expected = probability * f64::from(DRAWS);
        if probability == 0.0 {
            assert_eq!(seen, 0, "token {token} was cut off");
        } else {
            chi_squared += (f64::from(seen) - expected).powi(2) / expected;
        }
    }
    // The 99.9% quantile for up to 7 degrees of freedom is 24.3.
    assert!(chi_squared < 24.3, "chi squared {chi_squared} for {params:?}: {seen:?}");
}

#[test]
fn frequencies_are_the_softmax() {
    let probabilities = [0.4, 0.3, 0.15, 0.1, 0.05f64];
    let logits = probabilities.map(|p| p.ln() as f32 + 3.0);
    for seed in [0, 1, 42, u64::MAX] {
        check_distribution(&logits, &SamplingParams { seed, ..sampled(1.0) }, &probabilities);
    }
    let squared: f64 = probabilities.iter().map(|p| p * p).sum();
    check_distribution(&logits, &sampled(0.5), &probabilities.map(|p| p * p / squared));
}

#[test]
fn cut_offs_leave_the_right_tokens() {
    let probabilities = [0.1, 0.4, 0.05, 0.3, 0.15f64];
    let logits = probabilities.map(|p| p.ln() as f32);
    let base = sampled(1.0);
    let top_k = SamplingParams { top_k: 2, ..base.clone() };
    check_distribution(&logits, &top_k, &[0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7, 0.0]);
    let top_p = SamplingParams { top_p: 0.75, ..base.clone() };
    check_distribution(&logits, &top_p, &[0.0, 0.4 / 0.85, 0.0, 0.3 / 0.85, 0.15 / 0.85]);
    let min_p = SamplingParams { min_p: 0.5, ..base.clone() };
    check_distribution(&logits, &min_p, &[0.0, 0.4 / 0.7, 0.0, 0.3 / 0.7, 0.0]);
    // top_p counts over what top_k left: 0.4 / 0.7 = 0.57 is enough for 0.5.
    let both = SamplingParams { top_k: 2, top_p: 0.5, ..base };
    check_distribution(&logits, &both, &[0.0, 1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn uniform_numbers_are_uniform_and_independent_of_neighbours() {
    const N: u32 = 100_000;
    let of = |seed: u64| (0..N).map(move |position| uniform(seed, position));
    for seed in [0, 1, 2, 1 << 40] {
        let mean = of(seed).sum::<f64>() / f64::from(N);
        assert!((mean - 0.5).abs() < 0.004, "mean {mean} of seed {seed}");
        let lag =
            of(seed).zip(of(seed).skip(1)).map(|(a, b)| (a - 0.5) * (b - 0.5)).sum::<f64>() / f64::from(N);
        let next = of(seed).zip(of(seed + 1)).map(|(a, b)| (a - 0.5) * (b - 0.5)).sum::<f64>() / f64::from(N);
        assert!(lag.abs() < 0.002 && next.abs() < 0.002, "correlation {lag} and {next} of seed {seed}");
    }
}

#[test]
fn the_stream_of_a_seed_never_changes() {
    // Another value here would change every seeded completion, also in the middle of a migration between versions.
    let known: Vec<u64> = [(0, 0), (0, 1), (42, 7)]
        .map(|(seed, position)| (uniform(seed, position) * (1u64 << 53) as f64) as u64)
        .to_vec();
    assert_eq!(known, KNOWN_STREAM);
}

/// Computed from the definition by an independent program (Python integers).
const KNOWN_STREAM: [u64; 3] = [5876733520225071, 6315957190297641, 6617773565905164];

proptest! {
    #[test]
    fn a_choice_is_possible_pure_and_within_the_cut_offs(
        logits in prop::collection::vec(-20.0f32..20.0, 1..400),
        temperature in 0.0f32..3.0,
        top_p in 0.01f32..=1.0,
        top_k in 0u32..50,
        min_p in 0.0f32..=1.0,
        seed: u64,
        position: u32,
    ) {
        let params = SamplingParams { temperature, top_p, top_k, min_p, seed, ..SamplingParams::GREEDY };
        let token = choose(&logits, &params, None, position);
        let mut used = Sampler::default();
        let _ = used.sample(&[1.0, 2.0], &params, None, 0);
        prop_assert_eq!(used.sample(&logits, &params, None, position).expect("a token"), token);
        let better = logits.iter().filter(|&&logit| logit > logits[token as usize]).count() as u32;
        prop_assert!(top_k == 0 || better < top_k);
        if min_p == 1.0 || temperature < MIN_TEMPERATURE {
            prop_assert_eq!(better, 0);
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_sufficient_head(
        weights in prop::collection::vec(0.001f32..1.0, 1..2000),
        top_p in 0.01f32..1.0,
    ) {
        let mut kept: Vec<Candidate> =
            weights.iter().enumerate().map(|(token, &weight)| Candidate { token: token as u32, weight }).collect();
        let mut all = kept.clone();
        all.sort_by(heavier);
        keep_top_p(&mut kept, top_p);
        let total: f64 = all.iter().map(|c| f64::from(c.weight)).sum();
        let head = |n: usize| all[..n].iter().map(|c| f64::from(c.weight)).sum::<f64>();
        let tokens = |list: &[Candidate]| list.iter().map(|c| c.token).collect::<Vec<_>>();
        prop_assert_eq!(tokens(&kept), tokens(&all[..kept.len()]));
        prop_assert!(head(kept.len()) >= total * f64::from(top_p) * (1.0 - 1e-9));
        prop_assert!(kept.len() == 1 || head(kept.len() - 1) < total * f64::from(top_p) * (1.0 + 1e-9));
    }
}
