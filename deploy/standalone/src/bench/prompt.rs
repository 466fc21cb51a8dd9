//! Prompts of a wanted length in tokens, without knowing the endpoint's tokeniser: two trial requests tell how many
//! tokens a word and the chat template cost.

use super::{BenchError, request::Endpoint};

/// Common short words: one token each in practically every vocabulary.
const WORDS: [&str; 48] = [
    "time", "year", "people", "way", "day", "man", "thing", "world", "life", "hand", "part", "child", "eye",
    "woman", "place", "work", "week", "case", "point", "company", "number", "group", "problem", "fact",
    "water", "money", "story", "month", "lot", "right", "study", "book", "word", "issue", "side", "kind",
    "head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law",
];

/// Makes prompts; the same number gives the same prompt.
#[derive(Debug, Clone)]
pub(super) struct Prompts {
    words: usize,
    seed: u64,
}

impl Prompts {
    /// Finds how many words make `tokens` tokens of prompt.
    pub(super) async fn calibrate(endpoint: &Endpoint, tokens: u32, seed: u64) -> Result<Self, BenchError> {
        let (few, many) = (8usize, 72usize);
        let mut counts = [0f64; 2];
        for (count, words) in counts.iter_mut().zip([few, many]) {
            let timing = endpoint.ask(&words_of(seed, u64::MAX, words), 1).await;
            if let Some(error) = timing.error {
                return Err(BenchError::Trial(error));
            }
            *count = timing.prompt_tokens.into();
        }
        Ok(Self { words: words_for(tokens.into(), [few as f64, many as f64], counts), seed })
    }

    /// The `index`-th prompt; no two share their first words.
    pub(super) fn make(&self, index: u64) -> String {
        words_of(self.seed, index, self.words)
    }
}

/// Solves the line through two points (words, tokens) for the number of words.
fn words_for(tokens: f64, words: [f64; 2], counts: [f64; 2]) -> usize {
    let per_word = ((counts[1] - counts[0]) / (words[1] - words[0])).max(0.1);
    let overhead = counts[0] - words[0] * per_word;
    ((tokens - overhead) / per_word).round().max(1.0) as usize
}

fn words_of(seed: u64, index: u64, words: usize) -> String {
    let mut state = mix(seed ^ mix(index));
    let mut text = String::with_capacity(words * 6);
    for i in 0..words {
        if i > 0 {
            text.push(' ');
        }
        state = mix(state);
        text.push_str(WORDS[(state % WORDS.len() as u64) as usize]);
    }
    text
}

/// SplitMix64's output function: a fixed scrambling of 64 bits.
pub(super) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_by_number_and_differ_between_numbers() {
        let prompts = Prompts { words: 50, seed: 3 };
        assert_eq!(prompts.make(1), prompts.make(1));
        assert_ne!(prompts.make(1), prompts.make(2));
        assert_eq!(prompts.make(1).split(' ').count(), 50);
    }

    #[test]
    fn calibration_solves_for_words() {
        // 30 tokens of template, 1 token a word.
        assert_eq!(words_for(128.0, [8.0, 72.0], [38.0, 102.0]), 98);
        // Two tokens a word.
        assert_eq!(words_for(130.0, [8.0, 72.0], [46.0, 174.0]), 50);
        // Less than the template costs: one word, the least there is.
        assert_eq!(words_for(10.0, [8.0, 72.0], [38.0, 102.0]), 1);
    }
}
