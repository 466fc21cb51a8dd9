//! Versions of a protocol, and how two builds agree on one.
//!
//! Builds that follow each other have to work together while a deployment moves from one to the next. So each speaks a range
//! of versions, says so, and the newest that both speak is used. A version is given up one build after it was replaced, not
//! with it. Of more than two builds some may speak with some only: [`Protocols::meeting_points`] says who with whom,
//! [`Protocols::parties`] who had best keep to whom.

use std::fmt;

use crate::WireError;

/// The versions of a protocol that a build speaks: all from the oldest to the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Protocols {
    oldest: u32,
    newest: u32,
}

impl Protocols {
    /// What builds speak that do not say it.
    pub const FIRST: Self = Self::between(1, 1);

    /// # Panics
    /// If `newest` is below `oldest`, or that is 0: a constant that cannot be.
    pub const fn between(oldest: u32, newest: u32) -> Self {
        assert!(oldest > 0 && newest >= oldest, "versions begin with 1");
        Self { oldest, newest }
    }

    pub fn oldest(self) -> u32 {
        self.oldest
    }

    pub fn newest(self) -> u32 {
        self.newest
    }

    pub fn contains(self, version: u32) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }

    /// The versions that both speak; the newest of them is to be used.
    pub fn common(self, other: Self) -> Option<Self> {
        let (oldest, newest) = (self.oldest.max(other.oldest), self.newest.min(other.newest));
        (oldest <= newest).then_some(Self { oldest, newest })
    }

    /// From two fields; 0 in `oldest` is said by builds that know of version 1 only, 0 in `newest` by those that speak one.
    ///
    /// # Errors
    /// If the newest is older than the oldest.
    pub fn from_wire(oldest: u32, newest: u32) -> Result<Self, WireError> {
        let oldest = oldest.max(1);
        let newest = if newest == 0 { oldest } else { newest };
        if newest < oldest {
            Err(WireError::Versions { oldest, newest })
        } else {
            Ok(Self { oldest, newest })
        }
    }

    /// Versions by which to tell who understands whom, ascending: whoever speak one of them all understand each other, and
    /// whichever two understand each other both speak one. No more than there are different ranges.
    pub fn meeting_points(ranges: impl IntoIterator<Item = Self>) -> Vec<u32> {
        // What two have in common ends where one of them does.
        let mut points: Vec<u32> = ranges.into_iter().map(Self::newest).collect();
        points.sort_unstable();
        points.dedup();
        points
    }

    /// Versions by which to divide those who are there into as few parties as it goes, in each of which everyone understands
    /// everyone; ascending. Who speaks several of them is of the first's.
    pub fn parties(ranges: impl IntoIterator<Item = Self>) -> Vec<u32> {
        let mut ranges: Vec<Self> = ranges.into_iter().collect();
        ranges.sort_unstable_by_key(|range| range.newest);
        let mut versions: Vec<u32> = Vec::new();
        for range in ranges {
            // Who cannot speak with the party before begins the next.
            if versions.last().is_none_or(|last| range.oldest > *last) {
                versions.push(range.newest);
            }
        }
        versions
    }
}

impl fmt::Display for Protocols {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { oldest, newest } if oldest == newest => write!(f, "version {oldest}"),
            Self { oldest, newest } => write!(f, "versions {oldest} to {newest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn builds_meet_where_they_understand_each_other(ranges in prop::collection::vec((1u32..6, 0u32..4), 0..12)) {
            let ranges: Vec<_> = ranges.into_iter().map(|(oldest, more)| Protocols::between(oldest, oldest + more)).collect();
            let points = Protocols::meeting_points(ranges.iter().copied());
            let parties = Protocols::parties(ranges.iter().copied());
            let party = |range: &Protocols| parties.iter().position(|version| range.contains(*version));
            for (a, b) in ranges.iter().flat_map(|a| ranges.iter().map(move |b| (a, b))) {
                let meet = points.iter().any(|point| a.contains(*point) && b.contains(*point));
                prop_assert_eq!(meet, a.common(*b).is_some(), "{} and {}", a, b);
                prop_assert!(party(a).is_some());
                prop_assert!(party(a) != party(b) || a.common(*b).is_some(), "{} and {}", a, b);
            }
            // As few as can be: so many understand nobody of each other.
            let first = |version: &u32| ranges.iter().filter(|range| range.newest() == *version).max_by_key(|range| range.oldest());
            let apart: Vec<_> = parties.iter().filter_map(first).collect();
            prop_assert_eq!(apart.len(), parties.len());
            prop_assert!(apart.windows(2).all(|two| two[0].common(*two[1]).is_none()), "{:?}", apart);
        }
    }

    #[test]
    fn builds_that_say_nothing_speak_the_first() {
        assert_eq!(Protocols::from_wire(0, 0), Ok(Protocols::FIRST));
        assert_eq!(Protocols::from_wire(1, 0), Ok(Protocols::FIRST));
        assert_eq!(Protocols::from_wire(2, 0), Ok(Protocols::between(2, 2)));
        assert_eq!(Protocols::from_wire(3, 2), Err(WireError::Versions { oldest: 3, newest: 2 }));
    }

    #[test]
    fn they_are_said_as_people_say_them() {
        assert_eq!(Protocols::FIRST.to_string(), "version 1");
        assert_eq!(Protocols::between(2, 4).to_string(), "versions 2 to 4");
    }

    #[test]
    fn both_agree_on_what_both_speak() {
        let all =
            || (1..6).flat_map(|oldest| (oldest..6).map(move |newest| Protocols::between(oldest, newest)));
        for (a, b) in all().flat_map(|a| all().map(move |b| (a, b))) {
            let spoken: Vec<u32> =
                (1..6).filter(|version| a.contains(*version) && b.contains(*version)).collect();
            let common = a.common(b);
            assert_eq!(common.map(Protocols::newest), spoken.last().copied(), "{a} and {b}");
            assert_eq!(common.map(Protocols::oldest), spoken.first().copied(), "{a} and {b}");
        }
    }
}
