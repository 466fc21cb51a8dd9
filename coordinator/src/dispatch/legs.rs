//! What is open of a request at its instances.

use baton_schedule::Side;

use crate::fleet::LegGuard;

/// The guards of the open legs.
#[derive(Default)]
pub(super) struct Legs {
    pub(super) whole: Option<LegGuard>,
    pub(super) prefill: Option<LegGuard>,
    pub(super) decode: Option<LegGuard>,
}

impl Legs {
    pub(super) fn of(&mut self, side: Side) -> &mut Option<LegGuard> {
        match side {
            Side::Whole => &mut self.whole,
            Side::Prefill => &mut self.prefill,
            Side::Decode => &mut self.decode,
        }
    }

    /// The leg that generates.
    pub(super) fn generates(&self) -> Option<&LegGuard> {
        self.decode.as_ref().or(self.whole.as_ref())
    }

    /// The leg that computes the prompt.
    pub(super) fn computes(&self) -> Option<&LegGuard> {
        self.prefill.as_ref().or(self.whole.as_ref())
    }
}
