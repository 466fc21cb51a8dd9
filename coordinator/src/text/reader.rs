//! One answer's way from tokens to the text a client sees: detokenised, then stopped.

use super::{Detokenizer, StopMatcher};

/// The state of one answer.
#[derive(Debug, Clone)]
pub struct Reader {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Reused for every token.
    fresh: String,
}

impl Reader {
    pub fn new(detokenizer: Detokenizer, stops: StopMatcher) -> Self {
        Self { detokenizer, stops, fresh: String::new() }
    }

    /// Appends text that has become certain. True: a stop string has matched and the answer ends before it.
    pub fn push(&mut self, token: u32, text: &mut String) -> bool {
        self.fresh.clear();
        self.detokenizer.push(token, &mut self.fresh);
        self.stops.push(&self.fresh, text)
    }

    /// Appends what was held back: no more tokens come.
    pub fn finish(&mut self, text: &mut String) {
        self.fresh.clear();
        self.detokenizer.finish(&mut self.fresh);
        if !self.stops.push(&self.fresh, text) {
            self.stops.finish(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::text::TokenTexts;

    #[test]
    fn a_stop_string_within_characters_split_over_tokens_is_found() {
        // "a☕b" with "☕" in two tokens; "☕b" stops.
        let texts = TokenTexts::new([b"a\xe2".to_vec(), b"\x98\x95".to_vec(), b"b".to_vec()]);
        let mut reader =
            Reader::new(Detokenizer::new(Arc::new(texts)), StopMatcher::new(vec!["☕b".to_owned()]));
        let mut text = String::new();
        assert!(!reader.push(0, &mut text));
        assert!(!reader.push(1, &mut text));
        assert_eq!(text, "a");
        assert!(reader.push(2, &mut text));
        reader.finish(&mut text);
        assert_eq!(text, "a");
    }

    #[test]
    fn what_was_held_comes_out_at_the_end() {
        let texts = TokenTexts::new([b"ab".to_vec(), b"\xe2".to_vec()]);
        let mut reader =
            Reader::new(Detokenizer::new(Arc::new(texts)), StopMatcher::new(vec!["bc".to_owned()]));
        let mut text = String::new();
        reader.push(0, &mut text);
        reader.push(1, &mut text);
        assert_eq!(text, "a");
        reader.finish(&mut text);
        assert_eq!(text, "ab\u{fffd}");
    }
}
