//! Words of up to 15 bytes as numbers, what they become as a whole, and what of that is remembered.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

/// Longer words are no number.
pub(super) const WORD_BYTES_MOST: usize = 15;

/// The bytes of a short word and its length in one number; never 0.
pub(super) type Key = u128;

/// The key of a word of 1 to 15 bytes of `text`.
#[inline]
pub(super) fn key(text: &[u8], start: usize, end: usize) -> Key {
    let length = end - start;
    let bytes = match text.get(start..start + 16) {
        Some(sixteen) => {
            let mut whole = [0; 16];
            whole.copy_from_slice(sixteen);
            u128::from_le_bytes(whole) & ((1 << (8 * length)) - 1)
        }
        None => {
            let mut whole = [0; 16];
            whole[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(whole)
        }
    };
    bytes | (length as u128) << 120
}

/// The key by which it is remembered: a word that is taken whole if it is a token is told from the part of a word.
#[inline]
pub(super) fn remembered_as(key: Key, takes_whole: bool) -> Key {
    key | Key::from(takes_whole) << 127
}

/// The word's own key, however it is taken.
#[inline]
pub(super) fn word_of(remembered: Key) -> Key {
    remembered & !(1 << 127)
}

#[inline]
fn mix(key: Key) -> u64 {
    let (low, high) = (key as u64, (key >> 64) as u64);
    let product = u128::from(low ^ 0x9e37_79b9_7f4a_7c15) * u128::from(high ^ 0xd6e8_feb8_6659_fd93);
    (product as u64) ^ (product >> 64) as u64
}

/// The tokens that are short words: open addressing, at most half full.
#[derive(Debug)]
pub(super) struct Tokens {
    slots: Vec<Slot>,
}

/// A word and its id, side by side in a line of the processor's cache; none if the key is 0.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    key: Key,
    id: u32,
}

impl Tokens {
    pub(super) fn new(count: usize) -> Self {
        let size = (count.max(1) * 2).next_power_of_two();
        Self { slots: vec![Slot::default(); size] }
    }

    pub(super) fn insert(&mut self, key: Key, id: u32) {
        let at = self.find(key);
        self.slots[at] = Slot { key, id };
    }

    #[inline]
    pub(super) fn get(&self, key: Key) -> Option<u32> {
        let slot = &self.slots[self.find(key)];
        (slot.key == key).then_some(slot.id)
    }

    /// Where the key is, or would be.
    #[inline]
    fn find(&self, key: Key) -> usize {
        let last = self.slots.len() - 1;
        let mut at = mix(key) as usize & last;
        while self.slots[at].key != key && self.slots[at].key != 0 {
            at = (at + 1) & last;
        }
        at
    }
}

/// Words that are split off and looked up in one go.
pub(super) const WORDS_AT_A_TIME: usize = 32;

/// More than a long text has, so that few are in each other's way.
const REMEMBERED: usize = 1 << 16;
const TOKENS_MOST: usize = 3;

/// One word and its tokens: two of them lie in a line of the processor's cache.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct Word {
    key: Key,
    tokens: [u32; TOKENS_MOST],
    count: u32,
}

const LONG_REMEMBERED: usize = 1 << 12;
const LONG_BYTES_MOST: usize = 128;

/// A word that is long, or has many tokens; none if empty. What it takes is used again for the next.
#[derive(Debug, Clone, Default)]
struct Long {
    word: Vec<u8>,
    tokens: Vec<u32>,
}

/// What was found for the last words; one forgets another. Up to 2 MiB, and 3 MiB for those that are long.
#[derive(Debug)]
pub(super) struct Remembered {
    words: Vec<Word>,
    long: Vec<Long>,
    hasher: RandomState,
}

/// Where a word is remembered.
#[inline]
fn slot(key: Key) -> usize {
    mix(key) as usize % REMEMBERED
}

impl Remembered {
    pub(super) fn new() -> Self {
        let none = Word { key: 0, tokens: [0; TOKENS_MOST], count: 0 };
        let long = vec![Long::default(); LONG_REMEMBERED];
        Self { words: vec![none; REMEMBERED], long, hasher: RandomState::default() }
    }

    /// Appends the tokens of a long word, or of a part that is not `whole`, or else what `merge` makes of it.
    pub(super) fn long(
        &mut self,
        word: &[u8],
        whole: bool,
        tokens: &mut Vec<u32>,
        merge: impl FnOnce(&mut Self, &mut Vec<u32>),
    ) {
        if word.len() > LONG_BYTES_MOST {
            return merge(self, tokens);
        }
        let slot = self.hasher.hash_one((word, whole)) as usize % LONG_REMEMBERED;
        // Whole words are told from parts by where they are kept.
        let slot = slot & !1 | usize::from(whole);
        if self.long[slot].word == word {
            return tokens.extend_from_slice(&self.long[slot].tokens);
        }
        let before = tokens.len();
        merge(self, tokens);
        let kept = &mut self.long[slot];
        kept.word.clear();
        kept.word.extend_from_slice(word);
        kept.tokens.clear();
        kept.tokens.extend_from_slice(&tokens[before..]);
    }

    #[inline]
    pub(super) fn knows(&self, key: Key) -> bool {
        self.words[slot(key)].key == key
    }

    /// Appends the tokens of all of these, if each is remembered, or else nothing. A key may be 0, for a word that is not. What is
    /// looked up for one does not wait for another, and nothing is guessed of how many tokens each has.
    #[inline]
    pub(super) fn recall_all(
        &self,
        keys: &[Key; WORDS_AT_A_TIME],
        count: usize,
        tokens: &mut Vec<u32>,
    ) -> bool {
        let keys = &keys[..count];
        let (mut slots, mut known) = ([0; WORDS_AT_A_TIME], true);
        for (at, &key) in slots.iter_mut().zip(keys) {
            *at = slot(key);
            known &= key != 0 && self.words[*at].key == key;
        }
        if !known {
            return false;
        }
        let (mut found, mut length) = ([0; WORDS_AT_A_TIME * TOKENS_MOST], 0);
        for &at in &slots[..count] {
            let word = &self.words[at];
            found[length..length + TOKENS_MOST].copy_from_slice(&word.tokens);
            length += word.count as usize;
        }
        tokens.extend_from_slice(&found[..length]);
        true
    }

    /// Appends the tokens of a word, if it is remembered.
    #[inline]
    pub(super) fn recall(&self, key: Key, tokens: &mut Vec<u32>) -> bool {
        let word = &self.words[slot(key)];
        if word.key != key {
            return false;
        }
        if word.count == 1 {
            tokens.push(word.tokens[0]);
        } else {
            tokens.extend_from_slice(&word.tokens[..word.count as usize]);
        }
        true
    }

    /// Keeps what a word has become, if it is short.
    pub(super) fn keep(&mut self, key: Key, tokens: &[u32]) {
        if tokens.len() <= TOKENS_MOST {
            let mut kept = [0; TOKENS_MOST];
            kept[..tokens.len()].copy_from_slice(tokens);
            let word = Word { key, tokens: kept, count: tokens.len() as u32 };
            self.words[slot(key)] = word;
        }
    }
}
