//! One choice's way from tokens in order to text: detokenised as it comes, stopped at stop strings, counted, and each
//! token told together with the text that it begins in.

use std::{collections::VecDeque, mem, sync::Arc};

use baton_process::prefetch::prefetch;
use smallvec::SmallVec;

use crate::{
    dispatch::{Assignment, Fresh},
    fleet::{StopReason, TokenLogprobs},
    prepare::{PreparedPrompt, TextReader},
};

/// What a choice keeps memory for after more than that was written at once.
const TEXT_BYTES_KEPT: usize = 1 << 10;
const TOKENS_KEPT: usize = 64;

/// What reading brought of one choice since it was last written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Delta {
    pub text: String,
    /// The tokens that begin in `text`, and those without text between them; only if log probabilities were asked for.
    pub tokens: VecDeque<ScoredToken>,
    /// With the choice's last delta: why it ended.
    pub finish: Option<StopReason>,
}

impl Delta {
    /// There is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty() && self.finish.is_none()
    }

    /// There is text to write, and nothing else.
    pub fn is_text_alone(&self) -> bool {
        !self.text.is_empty() && self.tokens.is_empty() && self.finish.is_none()
    }

    /// Empties it, and keeps its buffers, unless they are large.
    pub fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(TEXT_BYTES_KEPT);
        self.tokens.clear();
        self.tokens.shrink_to(TOKENS_KEPT);
        self.finish = None;
    }

    /// So much of it has been written, from its beginning.
    pub fn told(&mut self, text_bytes: usize, tokens: usize) {
        if text_bytes >= self.text.len() && tokens >= self.tokens.len() {
            return self.clear();
        }
        self.text.drain(..text_bytes);
        self.tokens.drain(..tokens.min(self.tokens.len()));
    }
}

/// A token of the answer with what the model held of it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredToken {
    pub token: u32,
    /// Characters of the choice's text before it.
    pub text_offset: u32,
    pub logprobs: TokenLogprobs,
}

/// See the module.
pub struct Reading {
    reader: Box<dyn TextReader>,
    /// Ascending.
    ends_sequence: SmallVec<[u32; 4]>,
    /// A token that ends the sequence is shown as any other.
    shows_end: bool,
    /// Text that comes before that of the tokens.
    echo: Arc<str>,
    /// Most tokens of the answer.
    max_tokens: u32,
    /// The answer so far, as another instance can go on from it.
    tokens: Vec<u32>,
    scored: bool,
    /// Tokens whose text has not begun to be shown.
    waiting: VecDeque<ScoredToken>,
    /// Characters that have been shown.
    shown: u32,
    finished: bool,
}

impl Reading {
    /// `shows_end`: tokens that end the sequence are shown if they have text.
    pub fn new(reader: Box<dyn TextReader>, assignment: &Assignment, shows_end: bool) -> Self {
        let PreparedPrompt { sampling, echo, .. } = &assignment.prompt;
        Self {
            reader,
            ends_sequence: (&*sampling.stop_token_ids).into(),
            shows_end,
            echo: echo.clone(),
            max_tokens: sampling.max_tokens,
            tokens: Vec::new(),
            scored: sampling.top_logprobs.is_some(),
            waiting: VecDeque::new(),
            shown: 0,
            finished: false,
        }
    }

    /// Has the processor fetch what `token` is read with.
    pub(super) fn prefetch_token(&self, token: u32) {
        self.reader.prefetch(token);
    }

    /// Has the processor fetch what the next token touches, whichever it is.
    pub(super) fn prefetch(&self) {
        prefetch(&*self.reader);
        self.tokens.last().iter().for_each(|last| prefetch(*last));
    }

    /// Number of tokens of the answer so far.
    pub(super) fn consumed(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Tokens of the answer so far.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Nothing of the answer has come.
    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Why the answer ends with its last token, whoever was to say so.
    pub(super) fn complete(&self) -> Option<StopReason> {
        match self.tokens.last() {
            Some(last) if self.ends_sequence.binary_search(last).is_ok() => Some(StopReason::Stop),
            Some(_) if self.consumed() >= self.max_tokens => Some(StopReason::Length),
            _ => None,
        }
    }

    pub(super) fn finished(&self) -> bool {
        self.finished
    }

    /// Takes tokens in. True: a stop string has matched, and the choice ends with what is in `delta`.
    pub(super) fn take(&mut self, fresh: Fresh<'_>, delta: &mut Delta) -> bool {
        if !fresh.tokens.is_empty() && !self.echo.is_empty() {
            delta.text.push_str(&mem::take(&mut self.echo));
        }
        let mut logprobs = fresh.logprobs.into_iter();
        for &token in fresh.tokens {
            self.tokens.push(token);
            let logprobs = logprobs.next();
            // A token that ends the sequence is counted and has no text.
            if !self.shows_end && self.ends_sequence.binary_search(&token).is_ok() {
                continue;
            }
            let (text_offset, before) = (self.reader.characters(), delta.text.len());
            let stopped = self.reader.push(token, &mut delta.text);
            if self.scored {
                let scored = logprobs.map(|logprobs| ScoredToken { token, text_offset, logprobs });
                self.waiting.extend(scored);
                self.shown += delta.text[before..].chars().count() as u32;
                self.show(delta);
            }
            if stopped {
                return true;
            }
        }
        false
    }

    /// Moves the tokens whose text has begun to be shown to `delta`.
    fn show(&mut self, delta: &mut Delta) {
        let begun = self.waiting.iter().take_while(|token| token.text_offset < self.shown).count();
        delta.tokens.extend(self.waiting.drain(..begun));
    }

    /// No more tokens come. What was held back is shown, unless it is part of a stop string that has matched.
    pub(super) fn finish(&mut self, reason: StopReason, stopped: bool, delta: &mut Delta) {
        if !stopped {
            self.reader.finish(&mut delta.text);
            delta.tokens.extend(self.waiting.drain(..));
        }
        delta.finish = Some(reason);
        self.finished = true;
    }
}

#[cfg(test)]
mod tests {
    use baton_process::telemetry::TraceContext;

    use super::*;
    use crate::{
        prepare::{
            Endpoint, parse, prepare,
            tests::{LIMITS, served},
        },
        text::{Detokenizer, Reader, TextStops, TokenTexts},
    };

    /// "a", "☕" in two tokens, "bc", "d", one without text that does not end the sequence, and one that does.
    const TOKENS: [&[u8]; 7] = [b"a", b"\xe2\x98", b"\x95", b"bc", b"d", b"", b""];
    const END: u32 = 6;

    fn reading(stops: TextStops) -> Reading {
        let body =
            br#"{"model": "tiny", "prompt": "x", "logprobs": 0, "ignore_eos": true, "stop_token_ids": [6]}"#;
        let request = parse(body).expect("is JSON");
        let mut prepared = prepare(&served(), Endpoint::Text, &request, LIMITS, 1).expect("is taken");
        let texts = TokenTexts::new(TOKENS.map(<[u8]>::to_vec));
        let reader = Reader::new(Detokenizer::new(Arc::new(texts)), &stops);
        let assignment = Assignment {
            request: baton_proto::RequestId::adopt("r"),
            trace: TraceContext::default(),
            prompt: prepared.prompts.remove(0),
            generated: Arc::default(),
            priority: 0,
            wanted: tokio::time::Instant::now(),
            deadline: tokio::time::Instant::now(),
            in_batches: false,
        };
        Reading::new(Box::new(reader), &assignment, false)
    }

    /// What each token brings: text, and offsets of the tokens told with it; then what the end brings.
    fn read(stop: &str, tokens: &[u32]) -> Vec<(String, Vec<(u32, u32)>)> {
        let strings = if stop.is_empty() { vec![] } else { vec![stop.to_owned()] };
        let mut reading = reading(TextStops::new(&strings, false, 0));
        let mut deltas = Vec::new();
        let mut stopped = false;
        for token in tokens {
            let mut delta = Delta::default();
            let logprobs = vec![TokenLogprobs { logprob: -(*token as f32), top: vec![] }];
            stopped = reading.take(Fresh { tokens: &[*token], logprobs }, &mut delta);
            deltas.push(delta);
            if stopped {
                break;
            }
        }
        deltas.push(Delta::default());
        reading.finish(StopReason::Stop, stopped, deltas.last_mut().expect("pushed"));
        let told = |scored: &ScoredToken| {
            assert_eq!(scored.logprobs.logprob, -(scored.token as f32), "told with another's figures");
            (scored.token, scored.text_offset)
        };
        deltas.iter().map(|delta| (delta.text.clone(), delta.tokens.iter().map(told).collect())).collect()
    }

    fn delta(text: &str, tokens: &[(u32, u32)]) -> (String, Vec<(u32, u32)>) {
        (text.to_owned(), tokens.to_vec())
    }

    #[test]
    fn what_had_much_to_tell_keeps_little_memory() {
        let scored =
            ScoredToken { token: 0, text_offset: 0, logprobs: TokenLogprobs { logprob: 0.0, top: vec![] } };
        let mut delta =
            Delta { text: "a".repeat(1 << 20), tokens: vec![scored; 1 << 10].into(), ..Delta::default() };
        delta.told(1 << 20, 1000);
        assert_eq!((delta.text.len(), delta.tokens.len()), (0, 24));
        delta.told(0, 1000);
        assert!(delta.is_empty());
        assert!(delta.text.capacity() <= TEXT_BYTES_KEPT && delta.tokens.capacity() <= 2 * TOKENS_KEPT);
    }

    #[test]
    fn tokens_are_told_with_the_text_they_begin_in() {
        let whole = read("", &[0, 1, 2, 3, END]);
        let expected = [
            delta("a", &[(0, 0)]),
            delta("", &[]),
            delta("☕", &[(1, 1), (2, 1)]),
            delta("bc", &[(3, 2)]),
            delta("", &[]),
            delta("", &[]),
        ];
        assert_eq!(whole, expected);
    }

    #[test]
    fn text_held_back_holds_its_tokens_back() {
        let held = read("cdx", &[0, 3, 4, 0]);
        let expected =
            [delta("a", &[(0, 0)]), delta("b", &[(3, 1)]), delta("", &[]), delta("cda", &[(4, 3), (0, 4)])];
        assert_eq!(held[..4], expected);
    }

    #[test]
    fn a_stop_string_takes_the_tokens_that_begin_in_it() {
        // "cd": the token "bc" begins before it, "d" within it.
        assert_eq!(
            read("cd", &[0, 3, 4]),
            [delta("a", &[(0, 0)]), delta("b", &[(3, 1)]), delta("", &[]), delta("", &[])]
        );
    }

    #[test]
    fn tokens_without_text_are_told_in_their_place_or_at_the_end() {
        assert_eq!(
            read("", &[0, 5, 4]),
            [delta("a", &[(0, 0)]), delta("", &[]), delta("d", &[(5, 1), (4, 1)]), delta("", &[])]
        );
        assert_eq!(read("", &[0, 5])[1..], [delta("", &[]), delta("", &[(5, 1)])]);
        // A character that never comes whole.
        assert_eq!(read("", &[0, 1])[1..], [delta("", &[]), delta("\u{fffd}", &[(1, 1)])]);
    }
}
