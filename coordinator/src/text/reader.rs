//! One answer's way from tokens to the text a client sees: detokenised, then stopped.

use super::{Detokenizer, StopMatcher, TextStops};

/// The state of one answer.
#[derive(Debug, Clone)]
pub struct Reader {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    min_tokens: u32,
    tokens: u32,
    /// Characters that the tokens so far stand for.
    characters: u32,
    /// Reused for every token.
    fresh: String,
}

impl Reader {
    pub fn new(detokenizer: Detokenizer, stops: &TextStops) -> Self {
        Self {
            detokenizer,
            stops: StopMatcher::new(stops),
            min_tokens: stops.min_tokens,
            tokens: 0,
            characters: 0,
            fresh: String::new(),
        }
    }

    /// Has the processor fetch what is read of a token.
    pub fn prefetch(&self, token: u32) {
        self.detokenizer.prefetch(token);
    }

    /// Appends text that has become certain. True: a stop string has matched and the answer ends there.
    pub fn push(&mut self, token: u32, text: &mut String) -> bool {
        if self.stops.are_none() {
            let before = text.len();
            self.detokenizer.push(token, text);
            self.tokens += 1;
            self.characters += text[before..].chars().count() as u32;
            return false;
        }
        self.fresh.clear();
        self.detokenizer.push(token, &mut self.fresh);
        self.tokens += 1;
        self.characters += self.fresh.chars().count() as u32;
        self.stops.push(&self.fresh, self.tokens > self.min_tokens, text)
    }

    /// Characters that the tokens so far stand for, those held back counted, and a character that is not whole not.
    pub fn characters(&self) -> u32 {
        self.characters
    }

    /// Appends what was held back: no more tokens come.
    pub fn finish(&mut self, text: &mut String) {
        self.fresh.clear();
        self.detokenizer.finish(&mut self.fresh);
        if !self.stops.push(&self.fresh, self.tokens > self.min_tokens, text) {
            self.stops.finish(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::text::TokenTexts;

    fn stops(string: &str) -> TextStops {
        TextStops::new(&[string.to_owned()], false, 0)
    }

    #[test]
    fn a_stop_string_within_characters_split_over_tokens_is_found() {
        // "a☕b" with "☕" in two tokens; "☕b" stops.
        let texts = TokenTexts::new([b"a\xe2".to_vec(), b"\x98\x95".to_vec(), b"b".to_vec()]);
        let mut reader = Reader::new(Detokenizer::new(Arc::new(texts)), &stops("☕b"));
        let mut text = String::new();
        assert!(!reader.push(0, &mut text));
        assert!(!reader.push(1, &mut text));
        assert_eq!(text, "a");
        assert!(reader.push(2, &mut text));
        reader.finish(&mut text);
        assert_eq!(text, "a");
    }

    #[test]
    fn stop_strings_count_only_after_min_tokens() {
        let texts = Arc::new(TokenTexts::new([b"ab".to_vec(), b"b".to_vec()]));
        for (min_tokens, expected) in [(0, ("a", true)), (1, ("ab", true)), (2, ("abb", false))] {
            let stops = TextStops::new(&["b".to_owned()], false, min_tokens);
            let mut reader = Reader::new(Detokenizer::new(texts.clone()), &stops);
            let mut text = String::new();
            let stopped = reader.push(0, &mut text) || reader.push(1, &mut text);
            reader.finish(&mut text);
            assert_eq!((text.as_str(), stopped), expected, "min_tokens {min_tokens}");
        }
    }

    #[test]
    fn what_was_held_comes_out_at_the_end() {
        let texts = TokenTexts::new([b"ab".to_vec(), b"\xe2".to_vec()]);
        let mut reader = Reader::new(Detokenizer::new(Arc::new(texts)), &stops("bc"));
        let mut text = String::new();
        reader.push(0, &mut text);
        reader.push(1, &mut text);
        assert_eq!(text, "a");
        reader.finish(&mut text);
        assert_eq!(text, "ab\u{fffd}");
    }
}
