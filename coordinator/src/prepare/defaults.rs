//! What parameters of sampling may be, and what they are where a request does not say.

use std::{fmt, ops::RangeInclusive};

use baton_checkpoint::{SuggestedSampling, Suggestion};

use crate::ModelError;

/// What a parameter may be, whoever sets it.
pub(super) type Bounds = RangeInclusive<f64>;

pub(super) const TEMPERATURE: Bounds = 0.0..=2.0;
pub(super) const TOP_P: Bounds = 0.0..=1.0;
pub(super) const MIN_P: Bounds = 0.0..=1.0;
/// It divides: so small a number that the quotient overflows means nothing.
pub(super) const REPETITION_PENALTY: Bounds = 0.01..=10.0;

/// So many of the likeliest tokens; 0 = off, which is also said as -1. `None`: it may not be that.
pub(super) fn top_k(asked: i64) -> Option<u32> {
    if asked == -1 { Some(0) } else { u32::try_from(asked).ok() }
}

/// What bounds are called in errors.
pub(super) fn said(bounds: &Bounds) -> String {
    format!("{} to {}", bounds.start(), bounds.end())
}

/// Sampling of a model's requests that do not say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// 0 = greedy.
    pub temperature: f32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 0 = off.
    pub min_p: f32,
    /// 1 = off.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    /// OpenAI's.
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl fmt::Display for SamplingDefaults {
    /// As requests would have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { temperature, top_p, top_k, min_p, repetition_penalty } = self;
        write!(
            f,
            "temperature={temperature} top_p={top_p} top_k={top_k} min_p={min_p} repetition_penalty={repetition_penalty}"
        )
    }
}

impl SamplingDefaults {
    /// What a checkpoint suggests, and OpenAI's for the rest. A value that no request may have is an error: to pass over it, or
    /// to bend it, would be to serve another model than its makers meant.
    pub fn of(suggested: &SuggestedSampling) -> Result<Self, ModelError> {
        let refused = |suggestion: &Suggestion, expected| ModelError::Sampling {
            path: suggested.path.clone(),
            field: suggestion.field,
            value: suggestion.value.as_ref().map_or_else(String::clone, f64::to_string),
            expected,
        };
        let within = |suggestion: &Option<Suggestion>, default, bounds: Bounds| match suggestion {
            None => Ok(default),
            Some(Suggestion { value: Ok(value), .. }) if bounds.contains(value) => Ok(*value as f32),
            Some(outside) => Err(refused(outside, said(&bounds))),
        };
        let whole = |value: &f64| (value.fract() == 0.0).then_some(*value as i64);
        let openai = Self::default();
        Ok(Self {
            temperature: within(&suggested.temperature, openai.temperature, TEMPERATURE)?,
            top_p: within(&suggested.top_p, openai.top_p, TOP_P)?,
            top_k: match &suggested.top_k {
                None => openai.top_k,
                Some(suggestion) => (suggestion.value.as_ref().ok().and_then(whole))
                    .and_then(top_k)
                    .ok_or_else(|| refused(suggestion, format!("a whole number, 0 (off) to {}", u32::MAX)))?,
            },
            min_p: within(&suggested.min_p, openai.min_p, MIN_P)?,
            repetition_penalty: within(
                &suggested.repetition_penalty,
                openai.repetition_penalty,
                REPETITION_PENALTY,
            )?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suggested(change: impl FnOnce(&mut SuggestedSampling)) -> SuggestedSampling {
        let mut suggested = SuggestedSampling { path: "generation_config.json".into(), ..Default::default() };
        change(&mut suggested);
        suggested
    }

    fn of(field: &'static str, value: f64) -> Option<Suggestion> {
        Some(Suggestion { field, value: Ok(value) })
    }

    #[test]
    fn what_a_checkpoint_does_not_suggest_is_as_openai_has_it() {
        let openai = SamplingDefaults::default();
        assert_eq!(SamplingDefaults::of(&SuggestedSampling::default()).expect("is taken"), openai);
        // As Qwen3's.
        let qwen = suggested(|all| {
            all.temperature = of("temperature", 0.6);
            all.top_k = of("top_k", 20.0);
            all.top_p = of("top_p", 0.95);
        });
        let expected = SamplingDefaults { temperature: 0.6, top_k: 20, top_p: 0.95, ..openai };
        assert_eq!(SamplingDefaults::of(&qwen).expect("is taken"), expected);
        for off in [-1.0, 0.0] {
            let off = suggested(|all| all.top_k = of("top_k", off));
            assert_eq!(SamplingDefaults::of(&off).expect("is taken"), openai);
        }
    }

    #[test]
    fn what_no_request_may_have_is_refused_by_file_and_field() {
        type Change = fn(&mut SuggestedSampling);
        let cases: [(&str, &str, Change); 10] = [
            ("temperature", "0 to 2, got \"hot\"", |all| {
                all.temperature = Some(Suggestion { field: "temperature", value: Err("\"hot\"".into()) })
            }),
            ("top_k", "a whole number, 0 (off) to 4294967295, got [20]", |all| {
                all.top_k = Some(Suggestion { field: "top_k", value: Err("[20]".into()) })
            }),
            ("temperature", "0 to 2, got 2.5", |all| all.temperature = of("temperature", 2.5)),
            ("temperature", "0 to 2, got NaN", |all| all.temperature = of("temperature", f64::NAN)),
            ("top_p", "0 to 1, got -0.1", |all| all.top_p = of("top_p", -0.1)),
            ("top_k", "a whole number, 0 (off) to 4294967295, got 1.5", |all| all.top_k = of("top_k", 1.5)),
            ("top_k", "a whole number, 0 (off) to 4294967295, got -2", |all| all.top_k = of("top_k", -2.0)),
            ("top_k", "a whole number, 0 (off) to 4294967295, got inf", |all| {
                all.top_k = of("top_k", f64::INFINITY)
            }),
            ("min_p", "0 to 1, got 2", |all| all.min_p = of("min_p", 2.0)),
            ("repetition_penalty", "0.01 to 10, got 0", |all| {
                all.repetition_penalty = of("repetition_penalty", 0.0)
            }),
        ];
        for (field, expected, change) in cases {
            let error = SamplingDefaults::of(&suggested(change)).expect_err(field).to_string();
            let begins = format!("generation_config.json: {field} must be {expected}; ");
            assert!(error.starts_with(&begins), "{error}");
        }
    }
}
