//! Rotary positions: base, scaling for long contexts, and how the checkpoint orders the pairs it rotates.
//!
//! The formulas are those of Hugging Face transformers' `modeling_rope_utils`, in f32 as there, so that angles agree.

use std::f32::consts::PI;

/// Which two elements of a head are rotated together, as the rows of the Q and K projections are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeOrder {
    /// Elements `i` and `i + head_dim / 2`: Hugging Face directories.
    Halves,
    /// Elements `2 i` and `2 i + 1`: GGUF files of the llama architecture.
    Interleaved,
}

impl RopeOrder {
    /// Where in a head as stored the row lies that belongs at `row` of a head in [`RopeOrder::Halves`] order.
    ///
    /// Applies to weights and biases of Q and K: canonical row `h * head_dim + r` of the projection is stored row
    /// `h * head_dim + order.stored_row(r, head_dim)`.
    pub const fn stored_row(self, row: usize, head_dim: usize) -> usize {
        match self {
            Self::Halves => row,
            Self::Interleaved => {
                let half = head_dim / 2;
                if row < half { 2 * row } else { 2 * (row - half) + 1 }
            }
        }
    }
}

/// How the frequencies are changed for contexts longer than the model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f32,
    },
    /// LLaMA 3.1: low frequencies divided, high ones kept, a smooth passage between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context_tokens: u32,
    },
    /// YaRN (arXiv 2309.00071). `attention_factor` scales sine and cosine.
    Yarn {
        factor: f32,
        original_context_tokens: u32,
        beta_fast: f32,
        beta_slow: f32,
        attention_factor: f32,
        /// Round the bounds of the ramp to whole dimensions.
        truncate: bool,
    },
    /// One divisor for each of the `head_dim / 2` frequencies, as GGUF stores LLaMA 3.1's scaling.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// YaRN's scale of sine and cosine for a stretch by `factor`; `mscale` is 1 unless the model says otherwise.
    pub(crate) fn yarn_attention_factor(factor: f32, mscale: f32) -> f32 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }
}

/// Rotary positions of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    pub scaling: RopeScaling,
    pub order: RopeOrder,
}

/// What a kernel needs: the angle of pair `i` at position `p` is `p * inverse[i]`; sine and cosine are multiplied by
/// `scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    /// `head_dim / 2` values, in radians per token.
    pub inverse: Vec<f32>,
    pub scale: f32,
}

impl Rope {
    /// The frequencies for heads of `head_dim` elements, scaling applied.
    pub fn frequencies(&self, head_dim: u32) -> RopeFrequencies {
        let pairs = (0..head_dim / 2).map(|pair| (2 * pair) as f32);
        let plain: Vec<f32> = pairs.map(|i| 1.0 / self.theta.powf(i / head_dim as f32)).collect();
        let (inverse, scale) = match &self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Divisors(divisors) => {
                (plain.iter().zip(divisors).map(|(f, d)| f / d).collect(), 1.0)
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context_tokens,
            } => {
                let original = original_context_tokens as f32;
                (plain.into_iter().map(|f| llama3(f, factor, low, high, original)).collect(), 1.0)
            }
            &RopeScaling::Yarn { attention_factor, .. } => (self.yarn(plain, head_dim), attention_factor),
        };
        RopeFrequencies { inverse, scale }
    }

    fn yarn(&self, plain: Vec<f32>, head_dim: u32) -> Vec<f32> {
        let RopeScaling::Yarn { factor, original_context_tokens, beta_fast, beta_slow, truncate, .. } =
            self.scaling
        else {
            return plain;
        };
        let dimension = f64::from(head_dim);
        let correction = |rotations: f32| {
            let turns =
                f64::from(original_context_tokens) / (f64::from(rotations) * 2.0 * std::f64::consts::PI);
            dimension * turns.ln() / (2.0 * f64::from(self.theta).ln())
        };
        let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dimension - 1.0));
        if low == high {
            high += 0.001;
        }
        let ramp = |pair: usize| (((pair as f64 - low) / (high - low)) as f32).clamp(0.0, 1.0);
        let blend = |(pair, f): (usize, f32)| f / factor * ramp(pair) + f * (1.0 - ramp(pair));
        plain.into_iter().enumerate().map(blend).collect()
    }

    /// Checks that the numbers are usable.
    pub(crate) fn check(&self, head_dim: u32) -> Result<(), String> {
        let positive = |name: &str, value: f32| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(format!("{name} {value} is not positive"))
            }
        };
        positive("base", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", *factor),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_tokens } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("original context", original_context_tokens as f32)?;
                positive("high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)
            }
            &RopeScaling::Yarn {
                factor,
                original_context_tokens,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                positive("factor", factor)?;
                positive("original context", original_context_tokens as f32)?;
                positive("beta_slow", beta_slow)?;
                positive("beta_fast - beta_slow", beta_fast - beta_slow)?;
                positive("attention_factor", attention_factor)
            }
            RopeScaling::Divisors(divisors) if divisors.len() != head_dim as usize / 2 => {
                Err(format!("{} frequency divisors, {} wanted", divisors.len(), head_dim / 2))
            }
            RopeScaling::Divisors(divisors) => divisors.iter().try_for_each(|&d| positive("divisor", d)),
        }
    }
}

/// One frequency after LLaMA 3.1's scaling.
fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * PI / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_come_back_as_halves() {
        let head_dim = 8;
        let stored: Vec<usize> =
            (0..head_dim).map(|r| RopeOrder::Interleaved.stored_row(r, head_dim)).collect();
        assert_eq!(stored, [0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(RopeOrder::Halves.stored_row(5, head_dim), 5);
    }

    #[test]
    fn unscaled_frequencies_fall_from_one() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::None, order: RopeOrder::Halves };
        let frequencies = rope.frequencies(4);
        assert_eq!(frequencies.inverse, [1.0, 0.01]);
        assert_eq!(frequencies.scale, 1.0);
    }

    #[test]
    fn hostile_scaling_is_refused() {
        let bad = [
            RopeScaling::Linear { factor: 0.0 },
            RopeScaling::Linear { factor: f32::NAN },
            RopeScaling::Divisors(vec![1.0; 3]),
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 4.0,
                high_freq_factor: 1.0,
                original_context_tokens: 8192,
            },
        ];
        for scaling in bad {
            let rope = Rope { theta: 1e4, scaling, order: RopeOrder::Halves };
            assert!(rope.check(64).is_err(), "{rope:?} was taken");
        }
    }
}
