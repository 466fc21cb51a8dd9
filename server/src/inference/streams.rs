//! The open streams: what the engine tells reaches the outbox of each through here.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use super::outbox::{Outbox, Report};
use crate::engine::{load::Load, sequence::StreamId, thread::Delivery};

/// Streams at a time; more are refused.
pub const STREAMS_MOST: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub struct Streams {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<StreamId, Arc<Outbox>>,
    /// As last told, for streams to come.
    load: Load,
}

impl Streams {
    /// The outbox of a new stream; `None` if there are [`STREAMS_MOST`] already.
    pub fn open(&self, stream: StreamId) -> Option<Arc<Outbox>> {
        let mut state = self.state.lock();
        if state.open.len() >= STREAMS_MOST {
            return None;
        }
        let outbox = Arc::new(Outbox::new(state.load));
        state.open.insert(stream, outbox.clone());
        Some(outbox)
    }

    pub fn close(&self, stream: StreamId) {
        self.state.lock().open.remove(&stream);
    }

    /// Takes in what the engine tells; updates for a stream that is gone are dropped. Never blocks for long: it takes the
    /// lock of one outbox at a time, each held for as long as a vector takes to be swapped.
    pub fn deliver(&self, mut delivery: Delivery<'_>) {
        let state = &mut *self.state.lock();
        state.load = *delivery.load;
        for (stream, outbox) in &state.open {
            let updates = delivery.updates.remove(stream).unwrap_or_default();
            let seen_leg = delivery.seen.get(stream).copied().unwrap_or_default();
            outbox.tell(updates, Report { load: *delivery.load, seen_leg });
        }
    }
}
