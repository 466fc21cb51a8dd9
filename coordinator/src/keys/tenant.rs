//! Whose request it is, as the stages after know it.

use std::{num::NonZeroU32, sync::Arc};

use baton_proto::{ApiKey, Band};
use baton_schedule::queue::Rank;

/// Bands lie this far apart among the priorities that instances go by.
const BAND_STEP: i32 = 1 << 30;
/// What a request may ask for within its band, either way.
const WITHIN_BAND: i32 = (1 << 29) - 1;

/// Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Empty where no keys are asked for: all are one.
    pub name: Arc<str>,
    pub band: Band,
    /// Among those of its band.
    pub weight: NonZeroU32,
}

impl Default for Tenant {
    fn default() -> Self {
        Self { name: Arc::default(), band: Band::default(), weight: ApiKey::WEIGHT }
    }
}

impl Tenant {
    /// Whose key it is. Of several keys of a tenant each may have a band and a weight of its own.
    pub fn of(key: &ApiKey) -> Self {
        Self { name: key.tenant.as_str().into(), band: key.band, weight: key.weight }
    }

    /// What instances order its requests by, lower first: the band, and within it what a request asks for. So nobody asks
    /// their way into another band. Without keys it is what is asked for.
    pub fn priority(&self, asked: i32) -> i32 {
        if self.name.is_empty() {
            return asked;
        }
        let band = match self.band {
            Band::Interactive => -BAND_STEP,
            Band::Standard => 0,
            Band::Batch => BAND_STEP,
        };
        band + asked.clamp(-WITHIN_BAND, WITHIN_BAND)
    }

    /// Whom a request of it that asks for this priority outranks where there is no place for both.
    pub fn rank(&self, asked: i32) -> Rank<'_> {
        Rank { tenant: &self.name, priority: self.priority(asked), band_ends: self.priority(i32::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_priority_leaves_its_band() {
        let of = |band| Tenant { name: "a".into(), band, ..Tenant::default() };
        let (first, second, last) = (of(Band::Interactive), of(Band::Standard), of(Band::Batch));
        assert!(first.priority(i32::MAX) < second.priority(i32::MIN));
        assert!((first.rank(9).priority..second.priority(i32::MIN)).contains(&first.rank(9).band_ends));
        assert!(second.priority(i32::MAX) < last.priority(i32::MIN));
        for tenant in [first, second, last] {
            assert!(tenant.priority(-1) < tenant.priority(0) && tenant.priority(0) < tenant.priority(7));
        }
        let open = Tenant::default();
        assert_eq!([open.priority(i32::MIN), open.priority(3)], [i32::MIN, 3]);
        assert_eq!((open.rank(3).priority, open.rank(3).band_ends), (3, i32::MAX));
    }
}
