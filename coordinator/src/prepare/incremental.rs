//! Tokenises the long strings of a body while the rest of it is still on its way.
//!
//! [`crate::http`] hands over the body each time more of it has come. What is found goes into the text model's cache, and
//! nowhere else: the request is parsed, rendered and tokenised as any other once it is whole, and finds most of it done. So
//! an answer never depends on what was done here, nor on how the body came in pieces; JSON that is none is given up here
//! and told there.
//!
//! Any string of the body that is long enough is taken for text, whatever its field: which strings the template takes is
//! not known before all is there, and those are the ones that are long.

use std::{str, sync::Arc};

use super::TextModel;

/// Bodies that are shorter when they are whole gain nothing.
pub const AHEAD_FROM_BYTES: usize = 16 << 10;
/// So much is worked on between two other tasks' turns: a millisecond or two of text that was never seen.
const STEP_BYTES: usize = 16 << 10;
/// A string is tokenised each time so much of it has come, up to where it may be cut.
const STRING_BYTES: usize = 16 << 10;
/// A string that cannot be cut within so much is left to the end.
const HELD_BYTES_MOST: usize = 48 << 10;

/// How far a body has been read.
pub struct Ahead {
    text: Arc<dyn TextModel>,
    /// Bytes of the body that are done with.
    at: usize,
    state: State,
    /// What has come of the string that `at` is in, without its escapes, and is not tokenised yet.
    string: Vec<u8>,
    /// `string` is looked at again when it is so long.
    enough: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Outside,
    Inside,
    /// In a string that is left to the end.
    Passing,
    /// It is no JSON.
    GivenUp,
}

impl Ahead {
    /// For a body that asks this model.
    pub fn new(text: Arc<dyn TextModel>) -> Self {
        Self { text, at: 0, state: State::Outside, string: Vec::new(), enough: STRING_BYTES }
    }

    /// Works on a part of what has come; true: there is more to do. `body` is the whole body so far.
    pub fn read(&mut self, body: &[u8]) -> bool {
        let until = body.len().min(self.at.saturating_add(STEP_BYTES));
        while self.at < until && self.state != State::GivenUp {
            let rest = &body[self.at..until];
            if self.state == State::Outside {
                match memchr::memchr(b'"', rest) {
                    None => self.at = until,
                    Some(quote) => self.enter(self.at + quote + 1),
                }
                continue;
            }
            let plain = memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
            self.take(&rest[..plain]);
            self.at += plain;
            match rest.get(plain) {
                None => {}
                Some(b'"') => {
                    self.at += 1;
                    self.state = State::Outside;
                }
                Some(_) => match escaped(&body[self.at..]) {
                    Escaped::Character(character, length) => {
                        self.take(character.encode_utf8(&mut [0; 4]).as_bytes());
                        self.at += length;
                    }
                    Escaped::Unfinished => return false,
                    Escaped::Wrong => self.state = State::GivenUp,
                },
            }
        }
        self.state != State::GivenUp && self.at < body.len()
    }

    /// Whether what has come ends outside of any string, as JSON that is whole does.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn is_outside(&self) -> bool {
        self.state == State::Outside
    }

    fn enter(&mut self, at: usize) {
        self.at = at;
        self.state = State::Inside;
        self.string.clear();
        self.enough = STRING_BYTES;
    }

    /// More of the string.
    fn take(&mut self, bytes: &[u8]) {
        if self.state != State::Inside {
            return;
        }
        self.string.extend_from_slice(bytes);
        if self.string.len() < self.enough {
            return;
        }
        let whole = match str::from_utf8(&self.string) {
            Ok(whole) => whole,
            // The last character may be on its way.
            Err(error) if error.error_len().is_none() => {
                str::from_utf8(&self.string[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return self.state = State::GivenUp,
        };
        let done = self.text.remember(whole);
        self.string.drain(..done);
        self.enough = self.string.len() + STRING_BYTES;
        if self.string.len() > HELD_BYTES_MOST {
            self.state = State::Passing;
            self.string = Vec::new();
        }
    }
}

/// What a backslash begins.
#[derive(Debug, PartialEq, Eq)]
enum Escaped {
    /// And how long it is written.
    Character(char, usize),
    /// Its end has not come yet.
    Unfinished,
    Wrong,
}

fn escaped(bytes: &[u8]) -> Escaped {
    let Some(kind) = bytes.get(1) else { return Escaped::Unfinished };
    let short = match kind {
        b'"' | b'\\' | b'/' => char::from(*kind),
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return of_code(bytes),
        _ => return Escaped::Wrong,
    };
    Escaped::Character(short, 2)
}

/// `\u` and four digits, twice for what is beyond U+FFFF.
fn of_code(bytes: &[u8]) -> Escaped {
    let unit = |at: usize| {
        let digits = str::from_utf8(bytes.get(at..at + 4)?).ok()?;
        u16::from_str_radix(digits, 16).ok()
    };
    let Some(first) = unit(2) else {
        return if bytes.len() < 6 { Escaped::Unfinished } else { Escaped::Wrong };
    };
    if let Some(character) = char::from_u32(first.into()) {
        return Escaped::Character(character, 6);
    }
    let Some(second) = unit(8).filter(|_| bytes[6..].starts_with(br"\u")) else {
        return if bytes.len() < 12 { Escaped::Unfinished } else { Escaped::Wrong };
    };
    match char::decode_utf16([first, second]).next() {
        Some(Ok(character)) => Escaped::Character(character, 12),
        _ => Escaped::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use baton_checkpoint::ModelRoot;
    use parking_lot::Mutex;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        prepare::{Endpoint, Served, Spelling, TextReader, parse, prepare, tests::LIMITS},
        text::{TextCache, TextStops},
    };

    /// Keeps what it is to remember, up to the last space.
    #[derive(Default)]
    struct Listener(Mutex<Vec<String>>);

    impl TextModel for Listener {
        fn remember(&self, text: &str) -> usize {
            let to = text.rfind(' ').unwrap_or(0);
            self.0.lock().push(text[..to].to_owned());
            to
        }
        fn tokenise_text(&self, _: &str) -> Result<Vec<u32>, baton_proto::ApiError> {
            Ok(Vec::new())
        }
        fn tokenise_chat(
            &self,
            _: &[crate::text::ChatMessage<'_>],
            _: &crate::text::Variables,
        ) -> Result<Vec<u32>, baton_proto::ApiError> {
            Ok(Vec::new())
        }
        fn reader(&self, _: &TextStops) -> Box<dyn TextReader> {
            unreachable!("nothing is read")
        }
        fn spelling(&self, _: u32) -> Spelling<'_> {
            Spelling::Bytes(b"")
        }
        fn vocabulary(&self) -> u32 {
            0
        }
    }

    /// Reads a body that comes in pieces of these lengths, in turn.
    fn read(text: Arc<dyn TextModel>, body: &[u8], lengths: &[usize]) -> Ahead {
        let (mut ahead, mut come) = (Ahead::new(text), 0);
        for length in lengths.iter().cycle() {
            come = body.len().min(come + length);
            while ahead.read(&body[..come]) {}
            if come == body.len() {
                break;
            }
        }
        ahead
    }

    /// Words that differ, and now and then a special token.
    fn sentence(n: u64) -> String {
        let odd = ["plain words", "a \"quoted\" \\ word", "new\nline\ttab", "日本語 😀", "naïve", "1234 5"];
        let letters: String = n.to_string().bytes().map(|digit| char::from(digit - b'0' + b'k')).collect();
        let special = if n.is_multiple_of(997) { "<|im_end|>" } else { "" };
        format!("{} {letters} {special}", odd[(n * n % 6) as usize])
    }

    fn long(count: u64) -> String {
        (0..count).map(sentence).collect()
    }

    fn body(content: &str, ascii: bool) -> String {
        let body = serde_json::json!({"messages": [{"role": "user", "content": content}], "model": "m"});
        let body = body.to_string();
        if !ascii {
            return body;
        }
        let mut units = [0; 2];
        let escape = |character: char| match character.is_ascii() {
            true => character.to_string(),
            false => character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
        };
        body.chars().map(escape).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn strings_are_read_as_they_are_however_the_body_comes(
            lengths in prop::collection::vec(1..9000usize, 1..20), ascii in any::<bool>()
        ) {
            let (listener, content) = (Arc::new(Listener::default()), long(8000));
            let ahead = read(listener.clone(), body(&content, ascii).as_bytes(), &lengths);
            prop_assert_eq!(ahead.state, State::Outside);
            let heard = listener.0.lock().concat();
            prop_assert!(content.starts_with(&heard));
            prop_assert!(content.len() - heard.len() < 2 * STRING_BYTES, "{} of {}", heard.len(), content.len());
        }
    }

    #[test]
    fn tokens_do_not_depend_on_what_was_read_ahead_and_most_are_found() {
        let path = std::env::var_os("BATON_TEST_MODEL").expect("BATON_TEST_MODEL: `deploy/run test` sets it");
        let config = crate::config::ModelConfig { path: path.into(), ..Default::default() };
        let open = |bytes| {
            let cache = TextCache::new(bytes);
            let served = Served::open(&config, &ModelRoot::anywhere(), &cache).expect("the model opens");
            (Served { context_tokens: u32::MAX, ..served }, cache)
        };
        let tokens = |served: &Served, body: &str| {
            let request = parse(body.as_bytes()).expect("is JSON");
            let prepared = prepare(served, Endpoint::Chat, &request, LIMITS, 1).expect("is taken");
            prepared.prompts[0].tokens.to_vec()
        };
        let (plain, _) = open(0);
        let (served, cache) = open(16 << 20);
        let body = body(&long(12_000), true);
        read(served.text.clone(), body.as_bytes(), &[1460, 7, 9000]);
        let kept = cache.bytes();
        assert!(kept > 100_000, "only {kept} bytes were kept");
        assert_eq!(tokens(&served, &body), tokens(&plain, &body));
        assert!(cache.bytes() - kept < kept / 5, "most was found: {kept} bytes, then {}", cache.bytes());
    }

    #[test]
    fn what_cannot_be_cut_is_held_within_bounds_and_what_is_no_json_is_given_up() {
        let listener = || Arc::new(Listener::default());
        let uncut = format!(r#"["{}", "{}"]"#, "x".repeat(1 << 20), "a b ".repeat(20_000));
        let heard = listener();
        let mut ahead = Ahead::new(heard.clone());
        while ahead.read(uncut.as_bytes()) {
            assert!(ahead.string.capacity() <= 2 * (HELD_BYTES_MOST + STEP_BYTES));
        }
        assert!(heard.0.lock().concat().starts_with("a b "), "the next string is read again");
        for wrong in [r#"["\x"#, r#"["\ud800abcdefghi"#, r#"["\ud800\u0041 "#, r#"["\u12g4 "#] {
            assert_eq!(read(listener(), wrong.as_bytes(), &[3]).state, State::GivenUp, "{wrong}");
        }
        let broken = [br#"[""#.as_slice(), &[0xff; 20_000]].concat();
        assert_eq!(read(listener(), &broken, &[5000]).state, State::GivenUp);
        assert_eq!(escaped(br"\"), Escaped::Unfinished);
        assert_eq!(escaped(br"\ud83d\ude0"), Escaped::Unfinished);
        assert_eq!(escaped(br"\ud83d\ude00"), Escaped::Character('😀', 12));
    }
}
