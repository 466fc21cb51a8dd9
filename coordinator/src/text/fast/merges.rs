//! Byte-pair merging: which neighbours become one token, and in which order.
//!
//! The lowest rank is merged first, of equal ones the leftmost, until nothing more can be: what Hugging Face's
//! `tokenizers` do. [`Merges::cuts`] finds where a word can be cut without changing that.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::classes::decode;

/// Up to so many symbols are searched for the next merge; more are kept in a heap.
const SEARCHED_MOST: usize = 48;
/// No pair: the highest rank, to no token.
const NONE: u64 = u64::MAX;

/// The merges of one vocabulary.
#[derive(Debug)]
pub(super) struct Merges {
    /// The token of each byte; one that has none is dropped before anything merges.
    bytes: [Option<u32>; 256],
    pairs: Pairs,
    crossed: Crossed,
}

impl Merges {
    /// From the token of each byte, the merges (left, right, both) in their order, and the bytes of all tokens.
    pub(super) fn new<'a>(
        bytes: [Option<u32>; 256],
        merges: &[(u32, u32, u32)],
        tokens: impl Iterator<Item = &'a [u8]>,
    ) -> Self {
        let mut pairs = Pairs::new(merges.len());
        for (rank, &(left, right, both)) in merges.iter().enumerate() {
            pairs.insert(left, right, (rank as u64) << 32 | u64::from(both));
        }
        Self { bytes, pairs, crossed: Crossed::new(tokens) }
    }

    /// Appends the tokens of a word.
    pub(super) fn merge(&self, word: &[u8], tokens: &mut Vec<u32>) {
        match word.len() {
            ..=SEARCHED_MOST => self.search(word, tokens),
            _ => self.queue(word, tokens),
        }
    }

    fn symbols(&self, word: &[u8]) -> impl Iterator<Item = u32> {
        word.iter().filter_map(|&byte| self.bytes[usize::from(byte)])
    }

    fn search(&self, word: &[u8], tokens: &mut Vec<u32>) {
        let (mut symbols, mut count) = ([0; SEARCHED_MOST], 0);
        for symbol in self.symbols(word) {
            symbols[count] = symbol;
            count += 1;
        }
        if count <= 1 {
            return tokens.extend_from_slice(&symbols[..count]);
        }
        // Of each symbol with the next one.
        let mut merges = [NONE; SEARCHED_MOST];
        for at in 0..count - 1 {
            merges[at] = self.pairs.get(symbols[at], symbols[at + 1]);
        }
        loop {
            let (mut at, mut best) = (0, NONE);
            for (index, &merge) in merges[..count - 1].iter().enumerate() {
                if merge < best {
                    (at, best) = (index, merge);
                }
            }
            if best == NONE {
                break;
            }
            symbols[at] = best as u32;
            symbols.copy_within(at + 2..count, at + 1);
            merges.copy_within(at + 1..count - 1, at);
            count -= 1;
            merges[count - 1] = NONE;
            if at + 1 < count {
                merges[at] = self.pairs.get(symbols[at], symbols[at + 1]);
            }
            if at > 0 {
                merges[at - 1] = self.pairs.get(symbols[at - 1], symbols[at]);
            }
        }
        tokens.extend_from_slice(&symbols[..count]);
    }

    fn queue(&self, word: &[u8], tokens: &mut Vec<u32>) {
        const GONE: u32 = u32::MAX;
        let mut symbols: Vec<u32> = self.symbols(word).collect();
        let count = symbols.len();
        let mut next: Vec<usize> = (1..=count).collect();
        let mut before: Vec<usize> = (0..count).map(|at| at.wrapping_sub(1)).collect();
        let pair = |at: usize| (self.pairs.get(symbols[at], symbols[at + 1]), at);
        let mut queue: BinaryHeap<_> =
            (0..count.saturating_sub(1)).map(pair).filter(|(merge, _)| *merge != NONE).map(Reverse).collect();
        while let Some(Reverse((merge, at))) = queue.pop() {
            let right = next[at];
            // What was queued for symbols that have changed since is passed over.
            if symbols[at] == GONE || right >= count || self.pairs.get(symbols[at], symbols[right]) != merge {
                continue;
            }
            symbols[at] = merge as u32;
            symbols[right] = GONE;
            next[at] = next[right];
            let mut consider = |left: usize, right: usize| {
                let merge = self.pairs.get(symbols[left], symbols[right]);
                if merge != NONE {
                    queue.push(Reverse((merge, left)));
                }
            };
            if next[at] < count {
                before[next[at]] = at;
                consider(at, next[at]);
            }
            if before[at] < count {
                consider(before[at], at);
            }
        }
        tokens.extend(symbols.into_iter().filter(|&symbol| symbol != GONE));
    }

    /// Calls `part` with start and end of the parts of a word, valid UTF-8, between which nothing can merge: no token
    /// holds the end of the one and the beginning of the other.
    pub(super) fn cuts(&self, word: &[u8], mut part: impl FnMut(usize, usize)) {
        if word.iter().any(|&byte| self.bytes[usize::from(byte)].is_none()) {
            // Those on both sides of what is dropped are neighbours, too.
            return part(0, word.len());
        }
        let (mut begin, mut before) = (0, 0);
        let mut at = decode(word, 0).1;
        while at < word.len() {
            let end = at + decode(word, at).1;
            if !self.crossed.may_be(&word[before..at], &word[at..end]) {
                part(begin, at);
                begin = at;
            }
            (before, at) = (at, end);
        }
        part(begin, word.len());
    }
}

/// Which two symbols merge: open addressing, at most half full.
#[derive(Debug)]
struct Pairs {
    /// The pair, and rank and token of its merge in one number.
    slots: Vec<(u64, u64)>,
    shift: u32,
}

impl Pairs {
    fn new(count: usize) -> Self {
        let size = (count.max(1) * 2).next_power_of_two();
        Self { slots: vec![(NONE, NONE); size], shift: 64 - size.trailing_zeros() }
    }

    fn slot(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    /// The first merge of a pair counts: a lower one has been said before.
    fn insert(&mut self, left: u32, right: u32, merge: u64) {
        let key = u64::from(left) << 32 | u64::from(right);
        let mut slot = self.slot(key);
        while self.slots[slot].0 != NONE && self.slots[slot].0 != key {
            slot = (slot + 1) & (self.slots.len() - 1);
        }
        self.slots[slot] = (key, self.slots[slot].1.min(merge));
    }

    fn get(&self, left: u32, right: u32) -> u64 {
        let key = u64::from(left) << 32 | u64::from(right);
        let mut slot = self.slot(key);
        loop {
            let (found, merge) = self.slots[slot];
            if found == key {
                return merge;
            }
            if found == NONE {
                return NONE;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }
}

/// What tokens hold of two characters next to each other: the end of the first and the beginning of the second, whole or
/// in part. A filter of bits: it may say of some that they are crossed when they are not.
#[derive(Debug)]
struct Crossed {
    bits: Vec<u64>,
    /// The last byte of the first and the first of the second, where a token holds either of them in part.
    in_part: Vec<u64>,
}

const CROSSED_BITS: u32 = 20;

impl Crossed {
    fn new<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut crossed = Self { bits: vec![0; (1 << CROSSED_BITS) / 64], in_part: vec![0; (1 << 16) / 64] };
        for token in tokens {
            let is_start = |&at: &usize| token[at] & 0xc0 != 0x80;
            for at in (1..token.len()).filter(is_start) {
                // As much as there is of the character before, and of the one here.
                let from = (at.saturating_sub(4)..at).rev().find(is_start);
                let until = (at + 1..token.len().min(at + 4)).find(is_start);
                let (left, right) = (
                    &token[from.unwrap_or(at.saturating_sub(3))..at],
                    &token[at..until.unwrap_or(token.len().min(at + 4))],
                );
                set(&mut crossed.bits, bit(left, right));
                let whole = |bytes: &[u8]| std::str::from_utf8(bytes).is_ok();
                if !whole(left) || !whole(right) {
                    set(&mut crossed.in_part, bytes(left, right));
                }
            }
        }
        crossed
    }

    /// Whether a token may hold the border between these two characters.
    fn may_be(&self, left: &[u8], right: &[u8]) -> bool {
        is_set(&self.bits, bit(left, right))
            || self.may_be_in_part(left, right)
                && (0..left.len()).any(|from| {
                    (1..=right.len()).any(|until| is_set(&self.bits, bit(&left[from..], &right[..until])))
                })
    }

    /// The same, of tokens that hold either of them in part.
    fn may_be_in_part(&self, left: &[u8], right: &[u8]) -> bool {
        is_set(&self.in_part, bytes(left, right))
    }
}

fn set(bits: &mut [u64], bit: usize) {
    bits[bit / 64] |= 1 << (bit % 64);
}

fn is_set(bits: &[u64], bit: usize) -> bool {
    bits[bit / 64] >> (bit % 64) & 1 != 0
}

/// The two bytes at the border, in one number.
fn bytes(left: &[u8], right: &[u8]) -> usize {
    usize::from(left[left.len() - 1]) << 8 | usize::from(right[0])
}

/// Where the filter keeps these two: at most 4 bytes each.
fn bit(left: &[u8], right: &[u8]) -> usize {
    let number = |bytes: &[u8]| bytes.iter().fold(1u64, |number, &byte| number << 8 | u64::from(byte));
    let both = number(left).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number(right);
    (both.wrapping_mul(0xd6e8_feb8_6659_fd93) >> (64 - CROSSED_BITS)) as usize
}
