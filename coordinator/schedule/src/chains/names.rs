//! Chains of names in order, and how much two have in common, without comparing all of that. Pure but for the seed.
//!
//! Names are 64 bits that follow from all before them, and so short that somebody who wants to can find two that are alike behind
//! different beginnings: from an equal name nothing follows. So all names up to each 64th are folded into a number, under a seed
//! that nobody knows; where two of these are equal, so is what they stand for.

use std::{cmp::Ordering, ops::Deref, sync::LazyLock};

/// Names between two folds.
const STRIDE: usize = 64;

/// Of the process: names of all prompts are compared with each other. The second half is odd.
static SEED: LazyLock<(u64, u64)> = LazyLock::new(|| (rand::random(), rand::random::<u64>() | 1));

/// A chain of names, and their folds of 64 bits: two chains that differ are taken for the same only where these fall together.
#[derive(Debug, Default)]
pub struct Names {
    names: Box<[u64]>,
    /// Of the names up to each whole stride's end.
    folds: Box<[u64]>,
}

impl Names {
    /// How many names both begin with.
    pub fn common(&self, other: &Self) -> usize {
        let whole = self.whole_strides(other) * STRIDE;
        let rest = self.names[whole..].iter().zip(&other.names[whole..]);
        whole + rest.take_while(|(ours, theirs)| ours == theirs).count()
    }

    /// What they take, in bytes.
    pub fn held_bytes(&self) -> usize {
        size_of_val(&*self.names) + size_of_val(&*self.folds)
    }

    fn whole_strides(&self, other: &Self) -> usize {
        self.folds.iter().zip(&*other.folds).take_while(|(ours, theirs)| ours == theirs).count()
    }
}

impl FromIterator<u64> for Names {
    fn from_iter<I: IntoIterator<Item = u64>>(names: I) -> Self {
        let (names, seed): (Box<[u64]>, _) = (names.into_iter().collect(), *SEED);
        let (strides, _) = names.as_chunks::<STRIDE>();
        let mut fold = 0;
        let folds = strides.iter().map(|stride| {
            // Their places count; that they are added lets the processor work at many at once.
            let added = (0u64..).zip(stride).fold(0u64, |sum, (place, name)| {
                sum.wrapping_add(scrambled(
                    name.wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                    seed,
                ))
            });
            fold = scrambled(fold ^ added, seed);
            fold
        });
        let folds = folds.collect();
        Self { names, folds }
    }
}

impl From<&[u64]> for Names {
    fn from(names: &[u64]) -> Self {
        names.iter().copied().collect()
    }
}

impl Deref for Names {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        &self.names
    }
}

/// A number that follows from this one and the seed.
pub(crate) fn scrambled(number: u64, seed: (u64, u64)) -> u64 {
    let product = u128::from(number ^ seed.0) * u128::from(seed.1);
    product as u64 ^ (product >> 64) as u64
}

impl Ord for Names {
    fn cmp(&self, other: &Self) -> Ordering {
        let whole = self.whole_strides(other) * STRIDE;
        self.names[whole..].cmp(&other.names[whole..])
    }
}

impl PartialOrd for Names {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Names {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Names {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(names: &[u64]) -> Names {
        names.into()
    }

    proptest! {
        #[test]
        fn they_are_as_slices_are(
            shared in prop::collection::vec(any::<u64>(), 0..300),
            ends in prop::array::uniform2(prop::collection::vec(0u64..3, 0..150)),
            swapped in any::<bool>(),
        ) {
            let [mut a, mut b] = ends.map(|end| [shared.clone(), end].concat());
            // What is only in another order, and what is alike behind another beginning, is not the same.
            if swapped && shared.len() > 1 {
                a.swap(0, 1);
            }
            prop_assert_eq!(names(&a).cmp(&names(&b)), a.cmp(&b));
            let common = |a: &[u64], b: &[u64]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(names(&a).common(&names(&b)), common(&a, &b));
            b.clone_from(&a);
            prop_assert_eq!(names(&a), names(&b));
        }
    }
}
