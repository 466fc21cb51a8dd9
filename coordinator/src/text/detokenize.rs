//! From token ids to text as they come: never part of a character, constant time a token.
//!
//! A token of a byte-level or byte-fallback tokeniser stands for bytes, which need not be whole characters. The
//! deltas put together are exactly the lossy UTF-8 reading of all bytes together.

use std::{borrow::Cow, sync::Arc};

use baton_process::prefetch::prefetch;

/// One token of a tokeniser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenText {
    /// Stands for these bytes of text.
    Shown(Vec<u8>),
    /// Has no text, only a name, such as `<|im_end|>`.
    Hidden(String),
}

impl From<Vec<u8>> for TokenText {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Shown(bytes)
    }
}

/// Every token of a model. Tokens come in no order, and the table is larger than what a processor keeps at hand: so all of a
/// short one lies in one place.
#[derive(Debug)]
pub struct TokenTexts {
    /// By id.
    slots: Vec<Slot>,
    /// Bytes of tokens that are too long for their slots.
    long: Vec<u8>,
}

/// Bytes that lie in a slot.
const SHORT: usize = 15;
/// In a slot's `kind`: the bytes are a name.
const HIDDEN: u8 = 0x80;
/// In a slot's `kind`: `bytes` begins with where in `long` the bytes begin and end, 4 bytes each.
const LONG: u8 = 0x40;

/// One token.
#[derive(Debug, Clone, Copy)]
#[repr(align(16))]
struct Slot {
    bytes: [u8; SHORT],
    /// Flags, and how many of `bytes` there are.
    kind: u8,
}

impl TokenTexts {
    /// From each token in the order of ids.
    pub fn new<P: Into<TokenText>>(tokens: impl IntoIterator<Item = P>) -> Self {
        let mut long = Vec::new();
        let slot = |token: P| {
            let (bytes, flag) = match token.into() {
                TokenText::Shown(bytes) => (bytes, 0),
                TokenText::Hidden(name) => (name.into_bytes(), HIDDEN),
            };
            let mut slot = Slot { bytes: [0; SHORT], kind: flag };
            if bytes.len() <= SHORT {
                slot.bytes[..bytes.len()].copy_from_slice(&bytes);
                slot.kind |= bytes.len() as u8;
            } else {
                let begins = long.len() as u32;
                long.extend_from_slice(&bytes);
                slot.bytes[..4].copy_from_slice(&begins.to_le_bytes());
                slot.bytes[4..8].copy_from_slice(&(long.len() as u32).to_le_bytes());
                slot.kind |= LONG;
            }
            slot
        };
        let slots = tokens.into_iter().map(slot).collect();
        Self { slots, long }
    }

    /// Number of tokens.
    pub fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes of text that a token stands for; none for one that has no text, or that the tokeniser does not know.
    pub fn get(&self, id: u32) -> &[u8] {
        let shown = self.slots.get(id as usize).filter(|slot| slot.kind & HIDDEN == 0);
        shown.map_or(&[], |slot| self.spelt(slot))
    }

    /// The name of a token without text; `None` if it has text.
    pub fn name(&self, id: u32) -> Option<Cow<'_, str>> {
        let Some(slot) = self.slots.get(id as usize) else {
            return Some(format!("token_id:{id}").into());
        };
        (slot.kind & HIDDEN != 0).then(|| String::from_utf8_lossy(self.spelt(slot)))
    }

    fn spelt<'a>(&'a self, slot: &'a Slot) -> &'a [u8] {
        if slot.kind & LONG == 0 {
            return slot.bytes.get(..usize::from(slot.kind & !HIDDEN)).unwrap_or_default();
        }
        let [a, b, c, d, e, f, g, h, ..] = slot.bytes;
        let [begins, ends] = [[a, b, c, d], [e, f, g, h]].map(|at| u32::from_le_bytes(at) as usize);
        self.long.get(begins..ends).unwrap_or_default()
    }
}

/// The state of one answer: at most three bytes of a character whose end is still to come.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    texts: Arc<TokenTexts>,
    held: Vec<u8>,
}

impl Detokenizer {
    pub fn new(texts: Arc<TokenTexts>) -> Self {
        Self { texts, held: Vec::new() }
    }

    /// Has the processor fetch what is read of a token.
    pub fn prefetch(&self, token: u32) {
        self.texts.slots.get(token as usize).into_iter().for_each(prefetch);
    }

    /// Appends the text that `token` completes; may be none.
    pub fn push(&mut self, token: u32, text: &mut String) {
        let bytes = self.texts.get(token);
        if self.held.is_empty() {
            let rest = append_characters(bytes, text);
            self.held.extend_from_slice(rest);
            return;
        }
        self.held.extend_from_slice(bytes);
        let rest = append_characters(&self.held, text).len();
        self.held.drain(..self.held.len() - rest);
    }

    /// Appends a replacement character if the last character never came whole.
    pub fn finish(&mut self, text: &mut String) {
        if !self.held.is_empty() {
            self.held.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends whole characters, and a replacement for what can never become one; returns what may yet, up to 3 bytes.
fn append_characters<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(whole) => {
                text.push_str(whole);
                return &[];
            }
            Err(error) => {
                let (whole, rest) = bytes.split_at(error.valid_up_to());
                // Valid up to here, by the error's own word.
                text.push_str(&String::from_utf8_lossy(whole));
                let Some(wrong) = error.error_len() else { return rest };
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[wrong..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(tokens: &[Vec<u8>]) -> Vec<String> {
        let texts = Arc::new(TokenTexts::new(tokens.to_vec()));
        let mut detokenizer = Detokenizer::new(texts);
        let mut deltas = Vec::new();
        for id in 0..tokens.len() as u32 {
            let mut delta = String::new();
            detokenizer.push(id, &mut delta);
            deltas.push(delta);
        }
        let mut last = String::new();
        detokenizer.finish(&mut last);
        deltas.push(last);
        deltas
    }

    #[test]
    fn characters_wait_for_their_last_byte() {
        // "é☕" in four pieces.
        let pieces = [vec![0xc3], vec![0xa9, 0xe2], vec![0x98], vec![0x95, b'!']];
        assert_eq!(read(&pieces), ["", "é", "", "☕!", ""]);
    }

    #[test]
    fn a_character_that_never_comes_is_replaced() {
        assert_eq!(read(&[vec![b'a', 0xe2, 0x98]]), ["a", "\u{fffd}"]);
        assert_eq!(read(&[vec![0xe2], vec![b'b']]), ["", "\u{fffd}b", ""]);
    }

    #[test]
    fn hidden_tokens_have_a_name_and_no_text() {
        let texts = TokenTexts::new([
            TokenText::Shown(b"a".to_vec()),
            TokenText::Hidden("<end>".into()),
            TokenText::Shown(b"b".to_vec()),
        ]);
        assert_eq!([0, 1, 2, 3].map(|id| texts.get(id)), [b"a".as_slice(), b"", b"b", b""]);
        let names = [0, 1, 2, 3].map(|id| texts.name(id).map(Cow::into_owned));
        assert_eq!(names, [None, Some("<end>".into()), None, Some("token_id:3".into())]);
    }

    #[test]
    fn tokens_of_any_length_are_what_they_were() {
        assert_eq!(size_of::<Slot>(), 16);
        let tokens: Vec<Vec<u8>> = (0..40).map(|length| vec![b'a' + length as u8 % 26; length]).collect();
        let names = tokens.iter().map(|name| TokenText::Hidden(String::from_utf8_lossy(name).into()));
        let texts = TokenTexts::new(tokens.iter().cloned().map(TokenText::Shown).chain(names));
        for (id, token) in (0..).zip(&tokens) {
            assert_eq!((texts.get(id), texts.name(id)), (token.as_slice(), None));
            let hidden = texts.len() / 2 + id;
            assert_eq!(texts.get(hidden), b"");
            assert_eq!(texts.name(hidden), Some(String::from_utf8_lossy(token)));
        }
    }

    #[test]
    fn unknown_ids_have_no_text() {
        let texts = TokenTexts::new([b"a".to_vec(), Vec::new(), b"bc".to_vec()]);
        assert_eq!(
            (texts.get(0), texts.get(1), texts.get(2)),
            (b"a".as_slice(), b"".as_slice(), b"bc".as_slice())
        );
        assert!(texts.get(3).is_empty() && texts.get(u32::MAX).is_empty());
    }

    /// Bytes that are often parts of characters.
    fn byte() -> impl Strategy<Value = u8> {
        prop_oneof![any::<u8>(), prop::sample::select(b"\xc3\xa9\xe2\x98\x95\xf0\x9f\x8c\x8da".to_vec())]
    }

    proptest! {
        #[test]
        fn deltas_together_are_the_lossy_reading(tokens in prop::collection::vec(prop::collection::vec(byte(), 0..5), 0..20)) {
            let whole = tokens.concat();
            prop_assert_eq!(read(&tokens).concat(), String::from_utf8_lossy(&whole));
        }
    }
}
