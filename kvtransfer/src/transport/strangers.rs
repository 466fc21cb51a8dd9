//! Room for those who have not shown yet what they belong to.
//!
//! Anybody can connect and say nothing. Were they refused over a bound, so many strangers would keep every peer out for as
//! long as they may take for their hello. So this room never refuses: over the bound, the one that has waited longest is
//! cut, and a peer shows its proof as soon as it has connected.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// See the module.
pub(crate) struct Strangers {
    most: usize,
    /// The oldest first: what cuts each of them.
    present: Mutex<VecDeque<Arc<CancellationToken>>>,
}

impl Strangers {
    /// At most so many at a time; at least 1.
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most: most.max(1), present: Mutex::default() })
    }

    /// One more, in place of the oldest if there is no room.
    pub(crate) fn enter(self: &Arc<Self>) -> Stranger {
        let cut = Arc::new(CancellationToken::new());
        let mut present = self.present.lock();
        if present.len() >= self.most
            && let Some(oldest) = present.pop_front()
        {
            oldest.cancel();
        }
        present.push_back(cut.clone());
        Stranger { strangers: self.clone(), cut }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.present.lock().len()
    }
}

/// One that has shown nothing yet; its place is given back when this is dropped.
pub(crate) struct Stranger {
    strangers: Arc<Strangers>,
    cut: Arc<CancellationToken>,
}

impl Stranger {
    /// Cancelled when it has to give way to newer ones; never once it has left.
    pub(crate) fn cut(&self) -> CancellationToken {
        CancellationToken::clone(&self.cut)
    }

    /// It is no stranger any more. Whether it was still there.
    pub(crate) fn leave(&self) -> bool {
        let mut present = self.strangers.present.lock();
        let at = present.iter().position(|other| Arc::ptr_eq(other, &self.cut));
        at.and_then(|at| present.remove(at)).is_some()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.leave();
    }
}
