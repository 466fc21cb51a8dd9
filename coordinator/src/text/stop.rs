//! Ends an answer before the first stop string, without ever having shown part of one.
//!
//! Text comes in pieces cut anywhere. What has been shown cannot be taken back, so the end of the text is held back for
//! as long as it may be the beginning of a stop string, and no longer. The stop string that is complete first wins; of
//! several complete at the same place, the longest. One that is complete too early (`min_tokens`) is text like any other.

/// One stop string with its Knuth-Morris-Pratt table.
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each length of a matched beginning, the length of the longest shorter beginning that also ends there.
    fallback: Vec<usize>,
    /// Bytes of the pattern that the text so far ends with.
    matched: usize,
}

impl Pattern {
    fn new(pattern: &str) -> Self {
        let bytes = pattern.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut length = 0;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[length] {
                length = fallback[length];
            }
            length += usize::from(bytes[at] == bytes[length]);
            fallback[at + 1] = length;
        }
        Self { bytes, fallback, matched: 0 }
    }

    /// Takes one byte of the text; true if the pattern is complete with it.
    fn step(&mut self, byte: u8) -> bool {
        if self.matched == self.bytes.len() {
            // Complete before, when it did not count.
            self.matched = self.fallback[self.matched];
        }
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

/// The state of one answer. Constant time a byte and stop string.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// Text that may be the beginning of a stop string.
    held: String,
    matched: bool,
    /// The stop string itself is shown.
    included: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored. `included`: the text ends after the stop string, not before it.
    pub fn new(stops: &[String], included: bool) -> Self {
        let patterns = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| Pattern::new(stop)).collect();
        Self { patterns, held: String::new(), matched: false, included }
    }

    /// Whether nothing it is given is ever held back.
    pub fn are_none(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Takes more text and appends to `out` what is certain to come before any stop string. True: a stop string is
    /// complete, everything before it is in `out`, and nothing more will be appended. Unless `counts`, stop strings that
    /// are complete within `text` stop nothing.
    pub fn push(&mut self, text: &str, counts: bool, out: &mut String) -> bool {
        if self.matched {
            return true;
        }
        if self.patterns.is_empty() {
            out.push_str(text);
            return false;
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for pattern in &mut self.patterns {
                if pattern.step(byte) {
                    longest = longest.max(pattern.bytes.len());
                }
            }
            if longest > 0 && counts {
                self.matched = true;
                // A stop string begins where a character does: its first byte is a character's first.
                let end = before + at + 1;
                out.push_str(&self.held[..if self.included { end } else { end - longest }]);
                self.held.clear();
                return true;
            }
        }
        let begun = |pattern: &Pattern| match pattern.matched {
            whole if whole == pattern.bytes.len() => pattern.fallback[whole],
            part => part,
        };
        let keep = self.patterns.iter().map(begun).max().unwrap_or(0);
        let certain = self.held.len() - keep;
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        false
    }

    /// Appends what was held back: no more text comes.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is shown after each piece, and whether a stop string has matched by then.
    fn read(stops: &[&str], pieces: &[&str]) -> Vec<(String, bool)> {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops, false);
        let push = |piece: &&str| {
            let mut out = String::new();
            let matched = matcher.push(piece, true, &mut out);
            (out, matched)
        };
        pieces.iter().map(push).collect()
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_shown() {
        let shown = read(&["END"], &["one E", "N", "D two"]);
        assert_eq!(shown, [("one ".into(), false), (String::new(), false), (String::new(), true)]);
    }

    #[test]
    fn what_cannot_become_a_stop_string_any_more_is_shown_at_once() {
        let shown = read(&["END"], &["E", "N", "N", "x"]);
        let shown: Vec<&str> = shown.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(shown, ["", "", "ENN", "x"]);
    }

    #[test]
    fn a_false_start_may_hold_the_true_one() {
        assert_eq!(
            read(&["aab"], &["aa", "ab", "z"]),
            [(String::new(), false), ("a".into(), true), (String::new(), true)]
        );
    }

    #[test]
    fn the_first_complete_wins_then_the_longest() {
        assert_eq!(read(&["abcd", "bc"], &["xabcd"]), [("xa".into(), true)]);
        assert_eq!(read(&["c", "abc"], &["xabc"]), [("x".into(), true)]);
    }

    #[test]
    fn empty_stop_strings_stop_nothing() {
        assert_eq!(read(&[""], &["abc"]), [("abc".into(), false)]);
    }

    #[test]
    fn one_that_is_complete_too_early_is_text() {
        let mut matcher = StopMatcher::new(&["abab".to_owned()], false);
        let mut out = String::new();
        assert!(!matcher.push("xabab", false, &mut out));
        assert_eq!(out, "xab", "the second half may begin another");
        assert!(matcher.push("abz", true, &mut out));
        assert_eq!(out, "xab");
        let mut matcher = StopMatcher::new(&["b".to_owned()], false);
        let mut out = String::new();
        assert!(!matcher.push("ab", false, &mut out) && matcher.push("cb", true, &mut out));
        assert_eq!(out, "abc");
    }

    #[test]
    fn an_included_one_is_the_end_of_the_text() {
        let mut matcher = StopMatcher::new(&["END".to_owned()], true);
        let mut out = String::new();
        assert!(!matcher.push("one EN", true, &mut out));
        assert_eq!(out, "one ");
        assert!(matcher.push("D two", true, &mut out) && matcher.push("three", true, &mut out));
        assert_eq!(out, "one END");
    }

    /// Where the text ends by the definition: the shortest beginning that ends with a stop string, without it.
    fn naive(stops: &[String], text: &str) -> Option<usize> {
        (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            let complete =
                stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            complete.map(|stop| end - stop.len()).min()
        })
    }

    /// The most of `text` that may be shown: all but the longest ending that is the beginning of a stop string.
    fn certain(stops: &[String], text: &str) -> usize {
        let begins = |tail: &str| stops.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail));
        (0..=text.len()).find(|&at| text.is_char_boundary(at) && begins(&text[at..])).unwrap_or(text.len())
    }

    /// A small alphabet, so that stop strings overlap with themselves, each other and the text.
    fn word(most: usize) -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!['a', 'b', 'é', '☕']), 0..most)
            .prop_map(|letters| letters.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn equals_a_naive_search(
            stops in prop::collection::vec(word(5), 0..4),
            pieces in prop::collection::vec(word(5), 0..12),
        ) {
            let mut matcher = StopMatcher::new(&stops, false);
            let (mut shown, mut whole) = (String::new(), String::new());
            for piece in &pieces {
                whole.push_str(piece);
                let matched = matcher.push(piece, true, &mut shown);
                match naive(&stops, &whole) {
                    Some(end) => {
                        prop_assert!(matched);
                        prop_assert_eq!(&shown, &whole[..end]);
                        return Ok(());
                    }
                    None => {
                        prop_assert!(!matched);
                        prop_assert_eq!(&shown, &whole[..certain(&stops, &whole)]);
                    }
                }
            }
            matcher.finish(&mut shown);
            prop_assert_eq!(shown, whole);
        }
    }
}
