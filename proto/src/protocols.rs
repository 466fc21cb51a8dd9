//! Versions of a protocol, and how two builds agree on one.
//!
//! Builds that follow each other have to work together while a deployment moves from one to the next. So each speaks a range
//! of versions, says so, and the newest that both speak is used. A version is given up one build after it was replaced, not
//! with it.

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
    use super::*;

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
