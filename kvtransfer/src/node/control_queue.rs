//! Messages that wait to go out on a control stream, at either of its ends.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::peak::Peak;

/// A stream's bounded queue.
#[derive(Debug, Clone)]
pub(super) struct ControlQueue<T> {
    messages: mpsc::Sender<T>,
    /// Of all streams of this node's.
    peak: Arc<Peak>,
}

impl<T> ControlQueue<T> {
    pub(super) fn new(messages: mpsc::Sender<T>, peak: Arc<Peak>) -> Self {
        Self { messages, peak }
    }

    /// Puts a message in line, at once; false if the line is full or nobody takes from it any more.
    pub(super) fn put(&self, message: T) -> bool {
        let put = self.messages.try_send(message).is_ok();
        self.peak.saw((self.messages.max_capacity() - self.messages.capacity()) as u64);
        put
    }

    /// Puts the last message in line once there is room.
    pub(super) async fn put_last(&self, message: T) {
        let _ = self.messages.send(message).await;
    }

    /// Resolves once nobody takes from it any more.
    pub(super) async fn closed(&self) {
        self.messages.closed().await;
    }
}
