//! Names of blocks that were computed before, a stride at a time: of a chat that goes on, whole strides are looked up, and what is
//! new is named block by block, with what was in no whole stride before.
//!
//! What a stride of blocks is called follows from the name before it and the tokens in it. Both are looked up by 64 bits of a
//! hash several times as fast, under a seed that nobody knows; that two strides fall together costs a misprediction, as with names
//! themselves. Bounded; what has not been asked for while half of that was written is forgotten.

use std::{collections::HashMap, hash::BuildHasher, sync::Arc};

use baton_proto::BlockHash;
use foldhash::quality::RandomState;
use parking_lot::Mutex;

/// Blocks of a stride.
pub(super) const STRIDE: usize = 64;
/// Strides that are kept in each of two halves: with what a table takes some 5 MiB together, names of 8 million tokens in
/// blocks of 16.
const HALF: usize = 4096;

/// The names of a stride's blocks, and the whole of the last.
#[derive(Debug)]
pub(super) struct Stride {
    pub(super) names: [u64; STRIDE],
    pub(super) last: BlockHash,
}

impl Stride {
    fn of(mut last: BlockHash, tokens: &[u32]) -> Self {
        let mut blocks = tokens.chunks_exact(tokens.len() / STRIDE);
        let names = std::array::from_fn(|_| {
            blocks.by_ref().take(1).for_each(|block| last = last.child(block));
            last.key()
        });
        Self { names, last }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct KnownStrides {
    hasher: RandomState,
    kept: Mutex<Kept>,
}

/// By 64 bits that say where they stand and of what they are.
type Half = HashMap<u64, Arc<Stride>>;

#[derive(Debug, Default)]
struct Kept {
    /// Written, or asked for, since the others.
    young: Half,
    old: Half,
}

impl KnownStrides {
    /// Of the blocks that `tokens` are cut into, as many as a stride has, which come behind `last`.
    pub(super) fn of(&self, last: BlockHash, tokens: &[u32]) -> Arc<Stride> {
        let hash = self.hasher.hash_one((last, tokens));
        if let Some(known) = self.get(hash) {
            return known;
        }
        let stride = Arc::new(Stride::of(last, tokens));
        let forgotten = self.kept.lock().keep(hash, stride.clone());
        drop(forgotten);
        stride
    }

    fn get(&self, hash: u64) -> Option<Arc<Stride>> {
        let mut kept = self.kept.lock();
        if let Some(stride) = kept.young.get(&hash) {
            return Some(stride.clone());
        }
        let stride = kept.old.remove(&hash)?;
        let forgotten = kept.keep(hash, stride.clone());
        drop(kept);
        drop(forgotten);
        Some(stride)
    }
}

impl Kept {
    /// What is forgotten for it is given back: to drop so much takes a while, and is not to be done while this is locked.
    #[must_use]
    fn keep(&mut self, hash: u64, stride: Arc<Stride>) -> Option<Half> {
        let full = self.young.len() >= HALF;
        let forgotten = full.then(|| std::mem::replace(&mut self.old, std::mem::take(&mut self.young)));
        self.young.insert(hash, stride);
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stride(seed: u32) -> Vec<u32> {
        (0..4 * STRIDE as u32).map(|at| at ^ seed).collect()
    }

    #[test]
    fn a_stride_is_named_once_behind_each_name() {
        let (known, root) = (KnownStrides::default(), BlockHash::root("layout", ""));
        let first = known.of(root, &stride(1));
        assert!(Arc::ptr_eq(&first, &known.of(root, &stride(1))));
        let again = known.of(first.last, &stride(1));
        assert_ne!((first.names, first.last), (again.names, again.last));
        assert_ne!(known.of(root, &stride(2)).names, first.names);
        let mut last = root;
        let names: Vec<u64> = stride(1)
            .chunks(4)
            .map(|block| {
                last = last.child(block);
                last.key()
            })
            .collect();
        assert_eq!((&first.names[..], first.last), (&names[..], last));
    }

    #[test]
    fn what_is_forgotten_is_given_back_whole() {
        let (mut kept, stride) =
            (Kept::default(), Arc::new(Stride { names: [0; STRIDE], last: BlockHash::root("l", "") }));
        let mut given = (0..3 * HALF as u64 + 1).filter_map(|hash| kept.keep(hash, stride.clone()));
        assert_eq!(given.next().map(|half| half.len()), Some(0));
        assert_eq!(given.next().map(|half| half.len()), Some(HALF));
        assert_eq!(given.next().map(|half| half.contains_key(&(HALF as u64))), Some(true));
        assert!(given.next().is_none());
    }

    #[test]
    fn what_is_asked_for_stays_and_what_is_not_goes() {
        let (known, root) = (KnownStrides::default(), BlockHash::root("layout", ""));
        let (wanted, other) = (known.of(root, &stride(0)), known.of(root, &stride(1)));
        for seed in 2..3 * HALF as u32 {
            known.of(root, &stride(seed));
            known.of(root, &stride(0));
            let kept = known.kept.lock();
            assert!(kept.young.len() <= HALF && kept.old.len() <= HALF);
        }
        assert!(Arc::ptr_eq(&wanted, &known.of(root, &stride(0))));
        assert!(!Arc::ptr_eq(&other, &known.of(root, &stride(1))), "it has been named anew");
    }
}
