//! How likely the model holds a token, and which tokens it holds likeliest.
//!
//! Called by [`crate::engine::step`] for sequences that asked. The distribution is the model's own: the softmax of its
//! logits before bias, penalties, temperature and cuts (as vLLM's default). So the figures say what the model thinks
//! whatever the request makes of it, those of one completion compare with those of another, and greedy ones have them
//! too.

/// What the model gives the token that was chosen. Natural logarithms, at most 0.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// The likeliest tokens, likeliest first, equals by id; the chosen one may or may not be among them.
    pub top: Vec<(u32, f32)>,
}

/// Of `token`, which must be within `logits`, and of the `top` likeliest tokens. Linear in the vocabulary.
///
/// log softmax(x)_i = (x_i - m) - ln(sum_j exp(x_j - m)) with m the largest logit: no exponent is above 0, so nothing
/// overflows, and the sum, taken in double precision, is at least 1.
pub fn logprobs(logits: &[f32], token: u32, top: u32) -> TokenLogprobs {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    let normaliser = f64::from(largest) + sum.ln();
    let of = |logit: f32| (f64::from(logit) - normaliser).min(0.0) as f32;
    let chosen = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let top = likeliest(logits, top as usize).into_iter().map(|(token, logit)| (token, of(logit))).collect();
    TokenLogprobs { logprob: of(chosen), top }
}

/// The `count` largest logits with their tokens, largest first, equals by id.
fn likeliest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut held: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (token, &logit) in logits.iter().enumerate() {
        // Ids ascend, so an equal one belongs behind those that are held.
        if held.len() == count && held.last().is_none_or(|&(_, smallest)| logit <= smallest) {
            continue;
        }
        let at = held.partition_point(|&(_, larger)| larger >= logit);
        held.insert(at, (token as u32, logit));
        held.truncate(count);
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By the definition, in double precision.
    fn naive(logits: &[f32], token: u32) -> f64 {
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        (f64::from(logits[token as usize]).exp() / sum).ln()
    }

    #[test]
    fn equal_logits_come_by_id() {
        let found = logprobs(&[1.0, 2.0, 0.0, 2.0, 1.0, 2.0], 4, 4);
        let tokens: Vec<u32> = found.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, [1, 3, 5, 0]);
        assert_eq!(found.top[3].1, found.logprob, "tokens 0 and 4 are equally likely");
        assert!(logprobs(&[1.0, 2.0], 0, 0).top.is_empty());
        assert_eq!(logprobs(&[1.0, 2.0], 0, 20).top.len(), 2);
    }

    #[test]
    fn extreme_logits_neither_overflow_nor_vanish() {
        let found = logprobs(&[1e30, -1e30, f32::NEG_INFINITY], 0, 3);
        assert_eq!((found.logprob, found.top[0]), (0.0, (0, 0.0)));
        assert_eq!(found.top[2], (2, f32::NEG_INFINITY));
        let found = logprobs(&[800.0, 800.0 - 60.0], 1, 0);
        assert!((found.logprob + 60.0).abs() < 1e-4, "{found:?}");
    }

    proptest! {
        #[test]
        fn they_are_the_logarithms_of_a_distribution(
            logits in prop::collection::vec(-30.0f32..30.0, 1..600),
            pick: prop::sample::Index,
            top in 0u32..=20,
        ) {
            let token = pick.index(logits.len()) as u32;
            let found = logprobs(&logits, token, top);
            prop_assert!((f64::from(found.logprob) - naive(&logits, token)).abs() < 2e-5);
            let all = logprobs(&logits, token, logits.len() as u32);
            let sum: f64 = all.top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
            prop_assert!((sum - 1.0).abs() < 1e-5, "all of them add up to {sum}");
            prop_assert!(found.top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum::<f64>() <= 1.0 + 1e-6);
            prop_assert_eq!(&found.top[..], &all.top[..(top as usize).min(logits.len())]);
            for pair in all.top.windows(2) {
                let (a, b) = (logits[pair[0].0 as usize], logits[pair[1].0 as usize]);
                prop_assert!(a > b || (a == b && pair[0].0 < pair[1].0));
            }
            for &(token, logprob) in &found.top {
                prop_assert!((f64::from(logprob) - naive(&logits, token)).abs() < 2e-5);
            }
        }
    }
}
