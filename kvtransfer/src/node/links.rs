//! The control streams to the peers that this node sends to: one each, opened when it is needed.

use std::{collections::HashMap, sync::Arc};

use super::link::{Destination, Link};
use crate::{TransferError, sync::Mutex};

pub(super) struct Links {
    by_peer: Mutex<HashMap<Destination, Arc<Link>>>,
    most: usize,
}

impl Links {
    pub(super) fn new(most: usize) -> Self {
        Self { by_peer: Mutex::default(), most }
    }

    /// The link to a peer; `start` is given a new one if there is none that has not ended. Over the limit, the one that has
    /// been idle longest ends.
    ///
    /// # Errors
    /// `Limit`: there are as many as there may be, and all have transfers.
    pub(super) fn to(
        &self,
        to: &Destination,
        start: impl FnOnce(Arc<Link>),
    ) -> Result<Arc<Link>, TransferError> {
        let mut links = self.by_peer.lock();
        if let Some(link) = links.get(to).filter(|link| !link.ended()) {
            return Ok(link.clone());
        }
        links.retain(|_, link| !link.ended());
        if links.len() >= self.most {
            let idle = links.iter().filter_map(|(at, link)| Some((link.idle_since()?, at.clone())));
            let longest = idle.min().map(|(_, at)| at).filter(|at| links[at].end_if_empty());
            let full = TransferError::Limit { what: "peers to send to", limit: self.most };
            links.remove(&longest.ok_or(full)?);
        }
        let link = Link::new(to.clone());
        links.insert(to.clone(), link.clone());
        start(link.clone());
        Ok(link)
    }

    /// Forgets a link that has ended, unless another has taken its place.
    pub(super) fn forget(&self, to: &Destination, link: &Arc<Link>) {
        let mut links = self.by_peer.lock();
        if links.get(to).is_some_and(|current| Arc::ptr_eq(current, link)) {
            links.remove(to);
        }
    }

    /// Puts one in place that nothing runs.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn put(&self, to: Destination, link: Arc<Link>) {
        self.by_peer.lock().insert(to, link);
    }
}
