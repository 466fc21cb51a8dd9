//! A transport that is watched: whatever leaves by it or comes in by it is counted and traced where it is reported.

use std::sync::Arc;

use baton_proto::TransferId;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Admission, Destination, Found, Inbox, LinkId, Opening, Outbox, Transport, TransportKind, TransportStats,
    meter::Meter,
};

/// See the module.
pub(crate) struct Observed {
    transport: Box<dyn Transport>,
    meter: Arc<Meter>,
}

impl Observed {
    /// `slice_bytes` are those of this node's slices.
    pub(crate) fn new(transport: Box<dyn Transport>, slice_bytes: u64) -> Self {
        let meter = Arc::new(Meter::new(transport.kind(), slice_bytes));
        Self { transport, meter }
    }

    pub(crate) fn stats(&self) -> TransportStats {
        self.meter.stats()
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
        self.transport.receive(Arc::new(ObservedInbox { inbox, meter: self.meter.clone() }), tasks, stop);
    }

    fn open(
        &self,
        to: Destination,
        outbox: Outbox,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Opening {
        let opening = self.transport.open(to, outbox.observed_by(self.meter.clone()), tasks, stop);
        let meter = self.meter.clone();
        Box::pin(async move {
            let opened = opening.await;
            meter.tried(opened.is_ok());
            opened
        })
    }
}

struct ObservedInbox {
    inbox: Arc<dyn Inbox>,
    meter: Arc<Meter>,
}

impl Inbox for ObservedInbox {
    fn link(&self, id: &LinkId) -> Option<Admission> {
        self.inbox.link(id)
    }

    fn find(&self, id: &TransferId) -> Found {
        match self.inbox.find(id) {
            Found::Live(live) => Found::Live(live.observed_by(self.meter.clone())),
            Found::Over => Found::Over,
        }
    }
}
