//! A transport with faults that come by a seed: paths that do not open, connections that break in the middle of a run,
//! bytes that arrive other than they were sent. For tests of what stands above a transport.

use std::{
    io::{self, IoSliceMut},
    ptr::NonNull,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
};

use baton_proto::TransferId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Admission, DataKey, Destination, Found, Inbox, Landing, LinkId, Opening, Outbox, Room, Transport,
    TransportKind, splitmix,
};
use crate::{
    TransferError,
    session::{Claim, SliceRun},
};

/// How often things go wrong, each 0 (never) to 1 (always). The same seed gives the same faults in the same order of
/// events.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Faults {
    pub seed: u64,
    /// Of attempts to open a path to a peer.
    pub closed: f64,
    /// Of runs of slices that come in: their connection breaks.
    pub broken: f64,
    /// Of slices that come in: a bit is flipped before they are looked at.
    pub damaged: f64,
}

/// See the module.
pub(crate) struct Faulty {
    transport: Box<dyn Transport>,
    chance: Arc<Chance>,
}

/// What goes wrong next.
#[derive(Debug)]
struct Chance {
    faults: Faults,
    drawn: AtomicU64,
}

impl Chance {
    fn strikes(&self, odds: f64) -> bool {
        let drawn = self.drawn.fetch_add(1, Relaxed).wrapping_add(1);
        (splitmix::output(self.faults.seed, drawn) as f64) < odds * u64::MAX as f64
    }
}

impl Faulty {
    pub(crate) fn new(transport: Box<dyn Transport>, faults: Faults) -> Self {
        Self { transport, chance: Arc::new(Chance { faults, drawn: AtomicU64::new(0) }) }
    }
}

impl Transport for Faulty {
    fn kind(&self) -> TransportKind {
        self.transport.kind()
    }

    fn address(&self) -> String {
        self.transport.address()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken) {
        self.transport.receive(Arc::new(FaultyInbox { inbox, chance: self.chance.clone() }), tasks, stop);
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        if self.chance.strikes(self.chance.faults.closed) {
            return Box::pin(async { Err(io::Error::other("a fault was asked for")) });
        }
        self.transport.open(to, outbox, tasks, stop)
    }
}

struct FaultyInbox {
    inbox: Arc<dyn Inbox>,
    chance: Arc<Chance>,
}

impl Inbox for FaultyInbox {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        self.inbox.link(id)
    }

    fn find(&self, id: &TransferId) -> Found {
        match self.inbox.find(id) {
            Found::Live(live) => {
                let broken = self.chance.strikes(self.chance.faults.broken);
                let chance = self.chance.clone();
                Found::Live(live.behind(|landing| Arc::new(FaultyLanding { landing, broken, chance })))
            }
            Found::Over => Found::Over,
        }
    }
}

/// A transfer, for one run of its slices.
struct FaultyLanding {
    landing: Arc<dyn Landing>,
    /// The connection breaks before the run is in place.
    broken: bool,
    chance: Arc<Chance>,
}

impl FaultyLanding {
    fn check(&self) -> Result<(), TransferError> {
        if self.broken { Err(TransferError::DataPath("a fault was asked for".into())) } else { Ok(()) }
    }

    /// Flips a bit of a slice now and then.
    fn damage(&self, layer: u32, block: u32) -> Result<(), TransferError> {
        if self.chance.strikes(self.chance.faults.damaged)
            && let Some(byte) = self.landing.target(layer, block, 0)?.first_mut()
        {
            *byte ^= 1;
        }
        Ok(())
    }
}

impl Landing for FaultyLanding {
    fn data_key(&self) -> &DataKey {
        self.landing.data_key()
    }

    fn slice_bytes(&self) -> u64 {
        self.landing.slice_bytes()
    }

    fn span(&self) -> &tracing::Span {
        self.landing.span()
    }

    fn room(&self, run: SliceRun) -> Option<Room<'_>> {
        self.landing.room(run)
    }

    fn claim(&self, run: SliceRun, sums: &[u32]) -> Claim {
        self.landing.claim(run, sums)
    }

    fn arrived(&self, layer: u32, block: u32) -> Result<(), TransferError> {
        self.landing.arrived(layer, block)
    }

    fn landed(&self, run: SliceRun) {
        self.landing.landed(run);
    }

    fn damaged(&self, run: SliceRun, block: u32) {
        self.landing.damaged(run, block);
    }

    fn interrupted(&self, run: SliceRun, why: &str) {
        self.landing.interrupted(run, why);
    }

    fn target(&self, layer: u32, block: u32, skip: usize) -> Result<IoSliceMut<'_>, TransferError> {
        self.check()?;
        self.landing.target(layer, block, skip)
    }

    fn place(&self, layer: u32, block: u32) -> Result<NonNull<u8>, TransferError> {
        self.check()?;
        self.landing.place(layer, block)
    }

    fn content(&self, layer: u32, block: u32, skip: usize) -> Result<&[u8], TransferError> {
        if skip == 0 {
            self.damage(layer, block)?;
        }
        self.landing.content(layer, block, skip)
    }

    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError> {
        if from == 0 {
            self.damage(layer, block)?;
        }
        self.landing.copy_out(layer, block, from, into)
    }

    fn revoked(&self) -> &CancellationToken {
        self.landing.revoked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_faults_and_odds_are_kept() {
        let draw = |seed, odds| {
            let chance = Chance { faults: Faults { seed, ..Faults::default() }, drawn: AtomicU64::new(0) };
            (0..10_000).map(|_| chance.strikes(odds)).collect::<Vec<_>>()
        };
        let count = |drawn: Vec<bool>| drawn.into_iter().filter(|strikes| *strikes).count();
        assert_eq!(draw(7, 0.3), draw(7, 0.3));
        assert_ne!(draw(7, 0.3), draw(8, 0.3));
        assert_eq!((count(draw(1, 0.0)), count(draw(1, 1.0))), (0, 10_000));
        assert!((2_800..3_200).contains(&count(draw(1, 0.3))));
    }
}
