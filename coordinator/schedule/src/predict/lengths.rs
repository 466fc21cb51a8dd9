//! How long answers turn out, by model: nobody says beforehand. Pure.

use std::collections::HashMap;

/// Weight of an answer in the mean.
const FRESH: f64 = 1.0 / 64.0;
/// Taken for the mean before there were answers.
const UNKNOWN_TOKENS: f64 = 128.0;

/// The mean length of answers of late, by the revision of their model.
#[derive(Debug, Default)]
pub struct Lengths(HashMap<String, f64>);

impl Lengths {
    /// An answer has ended, with so many tokens.
    pub fn learn(&mut self, revision: &str, tokens: u32) {
        if !self.0.contains_key(revision) {
            self.0.insert(revision.to_owned(), UNKNOWN_TOKENS);
        }
        if let Some(mean) = self.0.get_mut(revision) {
            *mean += FRESH * (f64::from(tokens) - *mean);
        }
    }

    /// What the next is expected to have.
    pub fn tokens(&self, revision: &str) -> u32 {
        self.0.get(revision).copied().unwrap_or(UNKNOWN_TOKENS).ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_the_answers_of_each_model() {
        let mut lengths = Lengths::default();
        assert_eq!(lengths.tokens("a"), 128);
        (0..1_000).for_each(|_| lengths.learn("a", 700));
        assert_eq!((lengths.tokens("a"), lengths.tokens("b")), (700, 128));
        lengths.learn("a", 0);
        assert_eq!(lengths.tokens("a"), 690);
    }
}
