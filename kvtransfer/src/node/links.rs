//! The control streams to the peers that this node sends to, by endpoint: one each, opened when it is needed.

use std::{collections::HashMap, sync::Arc};

use baton_proto::InstanceId;

use super::link::Link;
use crate::{TransferError, sync::Mutex};

pub(super) struct Links {
    by_endpoint: Mutex<HashMap<String, Arc<Link>>>,
    most: usize,
}

impl Links {
    pub(super) fn new(most: usize) -> Self {
        Self { by_endpoint: Mutex::default(), most }
    }

    /// The link to an endpoint, at which this receiver should be; `start` is given a new one if there is none that has not ended. Over the limit, the one that
    /// has been idle longest ends.
    ///
    /// # Errors
    /// `Limit`: there are as many as there may be, and all have transfers.
    pub(super) fn to(
        &self,
        (endpoint, receiver): (&str, &InstanceId),
        start: impl FnOnce(Arc<Link>),
    ) -> Result<Arc<Link>, TransferError> {
        let mut links = self.by_endpoint.lock();
        if let Some(link) = links.get(endpoint).filter(|link| !link.ended()) {
            link.is_to(receiver);
            return Ok(link.clone());
        }
        links.retain(|_, link| !link.ended());
        if links.len() >= self.most {
            let idle = links.iter().filter_map(|(at, link)| Some((link.idle_since()?, at.clone())));
            let longest = idle.min().map(|(_, at)| at).filter(|at| links[at].end_if_empty());
            let full = TransferError::Limit { what: "peers to send to", limit: self.most };
            links.remove(&longest.ok_or(full)?);
        }
        let link = Link::new(endpoint.to_owned(), receiver.clone());
        links.insert(endpoint.to_owned(), link.clone());
        start(link.clone());
        Ok(link)
    }

    /// Forgets a link that has ended, unless another has taken its place.
    pub(super) fn forget(&self, endpoint: &str, link: &Arc<Link>) {
        let mut links = self.by_endpoint.lock();
        if links.get(endpoint).is_some_and(|current| Arc::ptr_eq(current, link)) {
            links.remove(endpoint);
        }
    }

    /// Puts one in place that nothing runs.
    #[cfg(any(test, feature = "fuzz"))]
    pub(super) fn put(&self, endpoint: &str, link: Arc<Link>) {
        self.by_endpoint.lock().insert(endpoint.to_owned(), link);
    }
}
