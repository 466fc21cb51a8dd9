//! A transport with its counts: whatever leaves by it or comes in by it is counted where it is reported.

use std::sync::Arc;

use baton_proto::TransferId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Admission, Destination, Found, Inbox, LinkId, Opening, Outbox, Transport, TransportKind, TransportStats,
    counts::Counts,
};

/// See the module.
pub(crate) struct Observed {
    transport: Box<dyn Transport>,
    counts: Arc<Counts>,
}

impl Observed {
    /// `slice_bytes` are those of this node's slices.
    pub(crate) fn new(transport: Box<dyn Transport>, slice_bytes: u64) -> Self {
        let counts = Arc::new(Counts::new(transport.kind(), slice_bytes));
        Self { transport, counts }
    }

    pub(crate) fn stats(&self) -> TransportStats {
        self.counts.stats()
    }
}

impl Transport for Observed {
    fn kind(&self) -> TransportKind {
        self.transport.kind()
    }

    fn address(&self) -> String {
        self.transport.address()
    }

    fn receive(&self, inbox: Arc<dyn Inbox>, tasks: &TaskTracker, stop: CancellationToken) {
        self.transport.receive(Arc::new(CountedInbox { inbox, counts: self.counts.clone() }), tasks, stop);
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let opening = self.transport.open(to, outbox.counted_by(self.counts.clone()), tasks, stop);
        let counts = self.counts.clone();
        Box::pin(async move {
            let opened = opening.await;
            counts.tried(opened.is_ok());
            opened
        })
    }
}

struct CountedInbox {
    inbox: Arc<dyn Inbox>,
    counts: Arc<Counts>,
}

impl Inbox for CountedInbox {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        self.inbox.link(id)
    }

    fn find(&self, id: &TransferId) -> Found {
        match self.inbox.find(id) {
            Found::Live(live) => Found::Live(live.counted_by(self.counts.clone())),
            Found::Over => Found::Over,
        }
    }
}
