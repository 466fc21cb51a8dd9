//! Ends an answer before the first stop string, without ever having shown part of one.
//!
//! Text comes in pieces cut anywhere. What has been shown cannot be taken back, so the end of the text is held back for
//! as long as it may be the beginning of a stop string, and no longer. The stop string that is complete first wins; of
//! several complete at the same place, the longest. One that is complete too early (`min_tokens`) is text like any other.

use std::sync::Arc;

/// Most bytes of a stop string.
pub const STOP_BYTES_MOST: usize = 1024;
const _: () = assert!(STOP_BYTES_MOST <= u16::MAX as usize, "lengths are kept in 16 bits");

/// What ends an answer's text: made once for a request, whose answers share it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextStops {
    /// `None`: no strings, so that nothing is shared, or counted, for an answer without.
    patterns: Option<Arc<[Pattern]>>,
    /// The text ends after the stop string, not before it.
    pub included: bool,
    /// Within this many tokens stop strings stop nothing.
    pub min_tokens: u32,
}

impl TextStops {
    /// Empty strings are ignored.
    ///
    /// # Panics
    /// If a string has more than [`STOP_BYTES_MOST`] bytes.
    pub fn new(strings: &[String], included: bool, min_tokens: u32) -> Self {
        let strings = strings.iter().filter(|stop| !stop.is_empty());
        let patterns: Arc<[Pattern]> = strings.map(|stop| Pattern::new(stop)).collect();
        Self { patterns: (!patterns.is_empty()).then_some(patterns), included, min_tokens }
    }

    /// No string stops anything.
    pub fn are_none(&self) -> bool {
        self.patterns.is_none()
    }

    /// The strings that stop.
    pub fn strings(&self) -> impl Iterator<Item = &str> {
        self.patterns.iter().flat_map(|patterns| patterns.iter()).map(|pattern| &*pattern.text)
    }

    /// What they take for so many answers, in bytes: tables once, for each answer where it is in them and the text that is held
    /// back, in a string that doubles.
    pub fn held_bytes(&self, answers: usize) -> usize {
        let Some(patterns) = &self.patterns else { return 0 };
        let longest = patterns.iter().map(|pattern| pattern.text.len()).max().unwrap_or(0);
        let each = patterns.len() * size_of::<u16>() + 2 * longest;
        let tables: usize = patterns.iter().map(Pattern::held_bytes).sum();
        tables.saturating_add(each.saturating_mul(answers))
    }
}

/// One stop string with its Knuth-Morris-Pratt table.
#[derive(Debug, PartialEq, Eq)]
struct Pattern {
    text: Box<str>,
    /// For each length of a matched beginning, the length of the longest shorter beginning that also ends there.
    fallback: Box<[u16]>,
}

impl Pattern {
    fn new(text: &str) -> Self {
        assert!(text.len() <= STOP_BYTES_MOST, "a stop string of {} bytes", text.len());
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut length = 0_u16;
        for at in 1..bytes.len() {
            while length > 0 && bytes[at] != bytes[usize::from(length)] {
                length = fallback[usize::from(length)];
            }
            length += u16::from(bytes[at] == bytes[usize::from(length)]);
            fallback[at + 1] = length;
        }
        Self { text: text.into(), fallback: fallback.into() }
    }

    /// Takes one byte of a text that ends with `matched` bytes of the pattern; with how many it ends then.
    fn step(&self, mut matched: u16, byte: u8) -> u16 {
        loop {
            // Past its end if it was complete before, when it did not count.
            match self.text.as_bytes().get(usize::from(matched)) {
                Some(&next) if next == byte => return matched + 1,
                _ if matched == 0 => return 0,
                _ => matched = self.fallback[usize::from(matched)],
            }
        }
    }

    fn is_complete(&self, matched: u16) -> bool {
        usize::from(matched) == self.text.len()
    }

    /// How much of its beginning a text ends with that does not end with all of it.
    fn begun(&self, matched: u16) -> usize {
        usize::from(if self.is_complete(matched) { self.fallback[usize::from(matched)] } else { matched })
    }

    fn held_bytes(&self) -> usize {
        size_of::<Self>() + self.text.len() + size_of_val(&*self.fallback)
    }
}

/// The state of one answer. Constant time a byte and stop string.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Option<Arc<[Pattern]>>,
    /// Bytes of each pattern that the text so far ends with.
    matched: Box<[u16]>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
    /// The stop string itself is shown.
    included: bool,
}

impl StopMatcher {
    /// At the beginning of an answer.
    pub fn new(stops: &TextStops) -> Self {
        let patterns = stops.patterns.clone();
        let matched = patterns.iter().flat_map(|patterns| patterns.iter()).map(|_| 0).collect();
        Self { patterns, matched, held: String::new(), stopped: false, included: stops.included }
    }

    /// Whether nothing it is given is ever held back.
    pub fn are_none(&self) -> bool {
        self.patterns.is_none()
    }

    /// Takes more text and appends to `out` what is certain to come before any stop string. True: a stop string is
    /// complete, everything before it is in `out`, and nothing more will be appended. Unless `counts`, stop strings that
    /// are complete within `text` stop nothing.
    pub fn push(&mut self, text: &str, counts: bool, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        let Some(patterns) = &self.patterns else {
            out.push_str(text);
            return false;
        };
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for (pattern, matched) in patterns.iter().zip(&mut self.matched) {
                *matched = pattern.step(*matched, byte);
                if pattern.is_complete(*matched) {
                    longest = longest.max(pattern.text.len());
                }
            }
            if longest > 0 && counts {
                self.stopped = true;
                // A stop string begins where a character does: its first byte is a character's first.
                let end = before + at + 1;
                out.push_str(&self.held[..if self.included { end } else { end - longest }]);
                self.held.clear();
                return true;
            }
        }
        let begun = patterns.iter().zip(&self.matched).map(|(pattern, &matched)| pattern.begun(matched));
        let certain = self.held.len() - begun.max().unwrap_or(0);
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

    fn matcher_of(stop: &str, included: bool) -> StopMatcher {
        StopMatcher::new(&TextStops::new(&[stop.to_owned()], included, 0))
    }

    /// What is shown after each piece, and whether a stop string has matched by then.
    fn read(stops: &[&str], pieces: &[&str]) -> Vec<(String, bool)> {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut matcher = StopMatcher::new(&TextStops::new(&stops, false, 0));
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
        let mut matcher = matcher_of("abab", false);
        let mut out = String::new();
        assert!(!matcher.push("xabab", false, &mut out));
        assert_eq!(out, "xab", "the second half may begin another");
        assert!(matcher.push("abz", true, &mut out));
        assert_eq!(out, "xab");
        let mut matcher = matcher_of("b", false);
        let mut out = String::new();
        assert!(!matcher.push("ab", false, &mut out) && matcher.push("cb", true, &mut out));
        assert_eq!(out, "abc");
    }

    #[test]
    fn an_included_one_is_the_end_of_the_text() {
        let mut matcher = matcher_of("END", true);
        let mut out = String::new();
        assert!(!matcher.push("one EN", true, &mut out));
        assert_eq!(out, "one ");
        assert!(matcher.push("D two", true, &mut out) && matcher.push("three", true, &mut out));
        assert_eq!(out, "one END");
    }

    #[test]
    fn answers_share_the_tables_of_the_longest_stop_strings() {
        let longest = ["ab".repeat(STOP_BYTES_MOST / 2), "b".repeat(STOP_BYTES_MOST)];
        let stops = TextStops::new(&longest, false, 0);
        let matchers: Vec<StopMatcher> = (0..32).map(|_| StopMatcher::new(&stops)).collect();
        let tables = stops.patterns.as_ref().expect("there are two");
        assert!(matchers.iter().all(|one| one.patterns.as_ref().is_some_and(|of| Arc::ptr_eq(of, tables))));
        // Text and 16 bits a byte of it, once; all but nothing for each answer beside the text that it holds back.
        let once = stops.held_bytes(0);
        assert!((6 * STOP_BYTES_MOST..6 * STOP_BYTES_MOST + 100).contains(&once), "{once} bytes");
        assert_eq!(stops.held_bytes(32) - once, 32 * (2 * STOP_BYTES_MOST + 4));
        assert_eq!(TextStops::default().held_bytes(128), 0);
        for (mut matcher, early) in matchers.into_iter().zip(0..) {
            let mut shown = String::new();
            let text = format!("{}{}", "b".repeat(early), longest[0]);
            assert!(matcher.push(&text, true, &mut shown));
            assert_eq!(shown, "b".repeat(early));
        }
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
            let mut matcher = StopMatcher::new(&TextStops::new(&stops, false, 0));
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
