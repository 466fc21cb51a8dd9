//! How long transports wait, and for what: all of it follows from a few of [`crate::Limits`], here and nowhere else.
//!
//! Whoever is to give something up by itself, and can say best why, has less time than whoever gives it up in its place:
//! `fence_grace < let_go <= given_up`, `stall < given_up`, `drain <= stall < destroy < fence`.

use std::time::Duration;

/// What a receiver that fetches is given to let go, in graces of the fence. It may be short of processors; the connection
/// carries other transfers, too.
const GRACES: u32 = 10;
/// What destroying is tried for, in stalls: after that the process ends, which should be the last thing to happen.
const STALLS: u32 = 3;
/// ... and for so long at least: a busy machine is no broken card.
const LEAST: Duration = Duration::from_secs(30);

/// See the module. The first four are limits themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Waits {
    /// For connecting and for a connection's hello, each.
    pub(crate) handshake: Duration,
    /// How long an aborted transfer lets a frame that is being written finish from its blocks.
    pub(crate) fence_grace: Duration,
    /// Without progress for this long, a frame's connection is given up, and so is a read of a peer's memory.
    pub(crate) stall: Duration,
    /// How often a quiet connection is asked for a sign of life.
    pub(crate) keep_alive: Duration,
    /// What a receiver that fetches has to be done with runs of a transfer that is over.
    pub(crate) let_go: Duration,
    /// What it has for a run of any other: it gives the read up before, by itself.
    pub(crate) given_up: Duration,
    /// How long a failed port of a card may take to give its reads up, before its queue pair is destroyed with them.
    pub(crate) drain: Duration,
    /// How long destroying a queue pair is tried.
    pub(crate) destroy: Duration,
    /// The longest that a thread may touch blocks of a transfer which is over: a read, and all that ends it.
    pub(crate) fence: Duration,
}

impl Waits {
    /// Those that follow from these.
    pub(crate) fn new(
        handshake: Duration,
        fence_grace: Duration,
        stall: Duration,
        keep_alive: Duration,
    ) -> Self {
        let given_up = stall.saturating_mul(2);
        let let_go = fence_grace.saturating_mul(GRACES).min(given_up);
        let (drain, destroy) = (let_go / 2, stall.saturating_mul(STALLS).max(LEAST));
        let fence = stall.saturating_add(drain).saturating_add(destroy);
        Self { handshake, fence_grace, stall, keep_alive, let_go, given_up, drain, destroy, fence }
    }

    /// Whether the order of the module's description holds.
    #[cfg(all(test, not(feature = "explore")))]
    pub(crate) fn in_order(&self) -> bool {
        let Self { fence_grace, stall, let_go, given_up, drain, destroy, fence, .. } = *self;
        fence_grace < let_go
            && let_go <= given_up
            && stall < given_up
            && drain <= stall
            && stall < destroy
            && destroy < fence
            && fence == stall + drain + destroy
    }
}
