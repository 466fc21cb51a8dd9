//! Whose request it is, as the stages after know it.

use std::{num::NonZeroU32, sync::Arc};

use baton_proto::{ApiKey, Band};
use baton_schedule::queue::Rank;

/// Bands lie this far apart among the priorities that instances go by.
const BAND_STEP: i32 = 1 << 30;
/// How far behind others of its band a request may ask to be.
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

    /// What instances, which know of no tenants, order its requests by, lower first: the band, and within it what a request
    /// asks for, if that is to be served after others. So nobody asks their way past anybody else. Without keys it is what is
    /// asked for.
    pub fn priority(&self, asked: i32) -> i32 {
        if self.name.is_empty() {
            return asked;
        }
        let band = match self.band {
            Band::Interactive => -BAND_STEP,
            Band::Standard => 0,
            Band::Batch => BAND_STEP,
        };
        band + asked.clamp(0, WITHIN_BAND)
    }

    /// Whom a request of it that asks for this priority goes before where it waits.
    pub fn rank(&self, asked: i32) -> Rank {
        let (band, tenant) = (self.band as u8, self.name.clone());
        Rank { band, tenant, weight: self.weight.get(), priority: asked }
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
        assert!(second.priority(i32::MAX) < last.priority(i32::MIN));
        assert!(first.rank(0).band < second.rank(0).band && second.rank(0).band < last.rank(0).band);
        for tenant in [first, second, last] {
            assert!(tenant.priority(-1) == tenant.priority(0) && tenant.priority(0) < tenant.priority(7));
            assert_eq!([tenant.rank(-1).priority, tenant.rank(7).priority], [-1, 7], "among its own");
        }
        let open = Tenant::default();
        assert_eq!([open.priority(i32::MIN), open.priority(3)], [i32::MIN, 3]);
    }
}
