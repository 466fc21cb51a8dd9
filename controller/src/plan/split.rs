//! Numbers of instances, with prefill and decode apart.

/// So many instances prefill and so many decode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Split {
    pub prefill: usize,
    pub decode: usize,
}

impl Split {
    /// What `of` makes of both numbers of prefill, and of both of decode.
    pub(crate) fn with(self, other: Self, of: impl Fn(usize, usize) -> usize) -> Self {
        Self { prefill: of(self.prefill, other.prefill), decode: of(self.decode, other.decode) }
    }
}
