//! Long texts in pieces, and what pieces became: a turn that a client sends again is compared, not tokenised.
//!
//! A text without added tokens is cut between a letter and a space, the end of a line or a comma of Chinese. Every
//! expression that [`super::fast`] knows ends a word there, and none looks across: so the pieces' tokens, one after the
//! other, are those of the whole. Which of these places are taken depends on the bytes right before them, and on the last cut,
//! which must be some way behind: where a text has been cut once as before, it goes on so. A chat's own turns begin where they
//! began; of a text behind another beginning some 10 KB go by before, as a rule.
//!
//! A [`TextCache`] is exact: it keeps the pieces' text and compares it. It is bounded in bytes; what has not been asked for
//! while half of that was written is forgotten.

use std::{
    collections::HashMap,
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use foldhash::quality::RandomState;
use parking_lot::Mutex;

use super::fast::is_letter;

/// From one cut to the next at least: so much of a text is not looked at for where it may be cut.
const CUT_BYTES_LEAST: usize = 2 << 10;
/// Shorter pieces, at the end of a text, are not kept: to tokenise them takes no longer than to find them.
const PIECE_BYTES_LEAST: usize = 1 << 10;
/// A piece beside its text and tokens.
const OVERHEAD_BYTES: usize = 128;

/// Places where `text` is cut, ascending.
fn cuts(text: &str) -> impl Iterator<Item = usize> {
    let mut from = 0;
    std::iter::from_fn(move || {
        from = cut_behind(text, from + CUT_BYTES_LEAST)?;
        Some(from)
    })
}

/// The first place from `from` on where a text may be cut.
fn cut_behind(text: &str, from: usize) -> Option<usize> {
    /// What a place is judged by.
    const BEFORE: usize = 8;
    /// Of places before a space one in so many is taken; spaces are much more frequent than the others.
    const SPACES_BITS: u32 = 5;
    const OTHERS_BITS: u32 = 3;
    let bytes = text.as_bytes();
    let places = memchr::memchr3_iter(b' ', b'\n', COMMA.as_bytes()[0], bytes.get(from..)?);
    places.map(|at| from + at).find(|&at| {
        let bits = if bytes[at] == b' ' { SPACES_BITS } else { OTHERS_BITS };
        let before = at.checked_sub(BEFORE).and_then(|from| bytes[from..at].first_chunk::<BEFORE>());
        let mixed = |before| u64::from_le_bytes(before).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        before.is_some_and(|&before| mixed(before) >> (64 - bits) == 0) && is_border(text, at)
    })
}

/// Where a text is cut last, if more may come behind it.
pub(super) fn last_cut(text: &str) -> Option<usize> {
    cuts(text).last()
}

/// Of Chinese.
const COMMA: &str = "，";

/// Whether every expression ends a word here, whatever stands before and behind. `at` begins a character.
pub(super) fn is_border(text: &str, at: usize) -> bool {
    let (before, behind) = text.split_at(at);
    (behind.starts_with([' ', '\n']) || behind.starts_with(COMMA))
        && before.chars().next_back().is_some_and(is_letter)
}

/// See the module.
#[derive(Debug)]
pub struct TextCache {
    hasher: RandomState,
    bytes_most: usize,
    tokenisers: AtomicU32,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Written, or asked for, since the others.
    young: HashMap<u64, Arc<Piece>>,
    young_bytes: usize,
    old: HashMap<u64, Arc<Piece>>,
}

#[derive(Debug)]
struct Piece {
    tokeniser: u32,
    text: Box<str>,
    tokens: Box<[u32]>,
}

impl Piece {
    fn bytes(&self) -> usize {
        self.text.len() + size_of_val(&*self.tokens) + OVERHEAD_BYTES
    }
}

impl TextCache {
    /// Keeps up to so many bytes, of all models together.
    pub fn new(bytes_most: usize) -> Arc<Self> {
        let hasher = RandomState::default();
        Arc::new(Self { hasher, bytes_most, tokenisers: AtomicU32::default(), kept: Mutex::default() })
    }

    /// What it keeps of that now.
    pub fn bytes(&self) -> usize {
        let kept = self.kept.lock();
        kept.young_bytes + kept.old.values().map(|piece| piece.bytes()).sum::<usize>()
    }

    fn get(&self, hash: u64) -> Option<Arc<Piece>> {
        let mut kept = self.kept.lock();
        if let Some(piece) = kept.young.get(&hash) {
            return Some(piece.clone());
        }
        let piece = kept.old.remove(&hash)?;
        self.keep(&mut kept, hash, piece.clone());
        Some(piece)
    }

    /// What does not fit into a half is not kept.
    fn keep(&self, kept: &mut Kept, hash: u64, piece: Arc<Piece>) {
        let (half, bytes) = (self.bytes_most / 2, piece.bytes());
        if bytes > half {
            return;
        }
        if kept.young_bytes + bytes > half {
            kept.old = std::mem::take(&mut kept.young);
            kept.young_bytes = 0;
        }
        kept.young_bytes += bytes;
        if let Some(other) = kept.young.insert(hash, piece) {
            kept.young_bytes -= other.bytes();
        }
    }
}

/// The cache as one tokeniser uses it.
#[derive(Debug)]
pub(super) struct Memo {
    cache: Arc<TextCache>,
    tokeniser: u32,
}

impl Memo {
    /// For a tokeniser of its own.
    pub(super) fn new(cache: Arc<TextCache>) -> Self {
        let tokeniser = cache.tokenisers.fetch_add(1, Ordering::Relaxed);
        Self { cache, tokeniser }
    }

    /// Whether anything is kept at all.
    pub(super) fn keeps(&self) -> bool {
        self.cache.bytes_most > 0
    }

    /// Appends the tokens of a text without added tokens, from the cache where they are there, else by `encode`.
    pub(super) fn each(
        &self,
        text: &str,
        tokens: &mut Vec<u32>,
        mut encode: impl FnMut(&str, &mut Vec<u32>),
    ) {
        if !self.keeps() || text.len() < PIECE_BYTES_LEAST {
            return encode(text, tokens);
        }
        let mut from = 0;
        for to in cuts(text).chain([text.len()]) {
            let piece = &text[from..to];
            from = to;
            if piece.len() < PIECE_BYTES_LEAST {
                encode(piece, tokens);
                continue;
            }
            let hash = self.cache.hasher.hash_one((self.tokeniser, piece));
            let same = |found: &Arc<Piece>| found.tokeniser == self.tokeniser && *found.text == *piece;
            if let Some(found) = self.cache.get(hash).filter(same) {
                tokens.extend_from_slice(&found.tokens);
                continue;
            }
            let before = tokens.len();
            encode(piece, tokens);
            let (text, tokens) = (piece.into(), tokens[before..].into());
            let piece = Arc::new(Piece { tokeniser: self.tokeniser, text, tokens });
            self.cache.keep(&mut self.cache.kept.lock(), hash, piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text of words that repeat only after long.
    fn prose(bytes: usize) -> String {
        let words =
            (0..).map(|n: u64| format!("w{} ", "abcdefghij".repeat(1 + (n * n % 3) as usize) + &letters(n)));
        let mut text = String::new();
        for word in words {
            if text.len() >= bytes {
                return text;
            }
            text.push_str(&word);
        }
        text
    }

    fn letters(n: u64) -> String {
        n.to_string().bytes().map(|digit| char::from(digit - b'0' + b'k')).collect()
    }

    /// Tokens are bytes; counts the bytes that were encoded.
    fn encode(memo: &Memo, text: &str) -> usize {
        let (mut tokens, mut encoded) = (Vec::new(), 0);
        memo.each(text, &mut tokens, |piece, tokens| {
            encoded += piece.len();
            tokens.extend(piece.bytes().map(u32::from));
        });
        assert_eq!(tokens, text.bytes().map(u32::from).collect::<Vec<_>>());
        encoded
    }

    #[test]
    fn a_text_that_comes_again_is_not_encoded_again_wherever_it_stands() {
        let cache = TextCache::new(16 << 20);
        let memo = Memo::new(cache.clone());
        let text = prose(200_000);
        assert!(cuts(&text).count() > 10, "it is cut");
        assert_eq!(encode(&memo, &text), text.len());
        let again = encode(&memo, &text);
        assert!(again < text.len() / 10, "{again} bytes were encoded again");
        let longer = format!("user\n{text} and more");
        let again = encode(&memo, &longer);
        assert!(again < text.len() / 4, "{again} bytes were encoded again");
        let elsewhere = format!("{}{text}", "Something else comes before. ".repeat(100));
        let again = encode(&memo, &elsewhere);
        assert!(again < text.len() / 2, "{again} bytes were encoded again");
        assert_eq!(encode(&Memo::new(cache), &text), text.len(), "it is another tokeniser's");
    }

    #[test]
    fn the_cache_keeps_within_its_bytes_and_what_is_asked_for() {
        let cache = TextCache::new(256 << 10);
        let memo = Memo::new(cache.clone());
        let hot = "x".repeat(PIECE_BYTES_LEAST);
        for n in 0..1000 {
            encode(&memo, &format!("{n:0>width$}", width = 4000));
            assert_eq!(encode(&memo, &hot), if n == 0 { hot.len() } else { 0 });
            let kept = cache.kept.lock();
            let bytes =
                |pieces: &HashMap<u64, Arc<Piece>>| pieces.values().map(|one| one.bytes()).sum::<usize>();
            assert_eq!(bytes(&kept.young), kept.young_bytes);
            assert!(kept.young_bytes + bytes(&kept.old) <= cache.bytes_most);
        }
        let large = "y".repeat(cache.bytes_most);
        assert_eq!((encode(&memo, &large), encode(&memo, &large)), (large.len(), large.len()));
    }

    #[test]
    fn two_pieces_of_one_hash_are_told_apart() {
        let cache = TextCache::new(1 << 20);
        let memo = Memo::new(cache.clone());
        let text = "z".repeat(PIECE_BYTES_LEAST);
        let hash = cache.hasher.hash_one((memo.tokeniser, text.as_str()));
        let other = Piece { tokeniser: memo.tokeniser, text: "other".into(), tokens: [1].into() };
        cache.keep(&mut cache.kept.lock(), hash, Arc::new(other));
        assert_eq!(encode(&memo, &text), text.len());
        assert_eq!(encode(&memo, &text), 0);
    }
}
