//! The clock of a node: drives leases and deadlines, and ends everything at shutdown.

use std::{sync::Arc, time::Duration};

use super::Node;
use crate::TransferError;

/// For messages on their way out when a node stops.
const FAREWELL: Duration = Duration::from_millis(5);

/// Tells every transfer the time, often enough for leases to be renewed and deadlines to be kept within a tenth of a
/// lease. Sleeps while there are none. At shutdown it aborts them all.
pub(super) async fn keep_time(node: Arc<Node>) {
    let interval = (node.lease / 10).clamp(Duration::from_millis(3), Duration::from_millis(500));
    let time = async {
        loop {
            while node.incoming.len() + node.outgoing.len() == 0 {
                node.activity.notified().await;
            }
            tokio::time::sleep(interval).await;
            let now = node.now();
            node.incoming.all().iter().for_each(|inbound| inbound.tick(now));
            node.outgoing.all().iter().for_each(|outbound| outbound.tick(now));
        }
    };
    let _: Option<()> = node.lifetime.shutdown.run_until_cancelled(time).await;
    node.incoming.all().iter().for_each(|inbound| inbound.cancel(TransferError::ShuttingDown));
    node.outgoing.all().iter().for_each(|outbound| outbound.cancel(TransferError::ShuttingDown));
    // Streams stand a moment longer, so that peers hear why and open frames end in order.
    let by = tokio::time::Instant::now() + node.limits.fence_grace;
    tokio::time::sleep(FAREWELL).await;
    while node.incoming.len() + node.outgoing.len() > 0 && tokio::time::Instant::now() < by {
        tokio::time::sleep(FAREWELL).await;
    }
    node.lifetime.stop.cancel();
}
