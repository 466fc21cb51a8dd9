//! What the tests of others place with.

use super::*;
use crate::metrics::Metrics;

pub(crate) fn placer(board: Arc<Board>, attachments: Attachments) -> Placer {
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    Placer {
        board,
        attachments: Arc::new(attachments),
        handoffs: Arc::default(),
        breakers: Arc::new(Breakers::new(&metrics)),
        placements: metrics.placements.clone(),
        closed: CancellationToken::new(),
    }
}
