//! The transfers of one direction: those alive, and the last of those that ended.
//!
//! Remembering the ended ones is what keeps an id from being used twice and tells a late message from a wrong one.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use baton_proto::{InstanceId, TransferId};
use parking_lot::Mutex;

use crate::TransferError;

/// How a transfer ended.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    /// The other side, if it ever was known.
    pub(super) peer: Option<InstanceId>,
    /// `None` = released.
    pub(super) reason: Option<TransferError>,
}

#[derive(Debug)]
pub(super) struct Table<T> {
    state: Mutex<State<T>>,
    remember: usize,
}

#[derive(Debug)]
struct State<T> {
    live: HashMap<TransferId, Arc<T>>,
    ended: HashMap<TransferId, Ended>,
    /// Ended ids, oldest first.
    order: VecDeque<TransferId>,
}

/// What an id stands for.
pub(super) enum Lookup<T> {
    Live(Arc<T>),
    Ended(Ended),
    Unknown,
}

impl<T> Table<T> {
    pub(super) fn new(remember: usize) -> Self {
        let state = State { live: HashMap::new(), ended: HashMap::new(), order: VecDeque::new() };
        Self { state: Mutex::new(state), remember }
    }

    pub(super) fn get(&self, id: &TransferId) -> Lookup<T> {
        self.state.lock().get(id)
    }

    /// Looks an id up; if it is unknown, `make` may add it. Nobody else can add it in between. `make` gets the number of
    /// live transfers and must not come back to this table.
    pub(super) fn get_or_add(
        &self,
        id: TransferId,
        make: impl FnOnce(usize) -> Result<Arc<T>, TransferError>,
    ) -> Result<Lookup<T>, TransferError> {
        let mut state = self.state.lock();
        let found = state.get(&id);
        if matches!(found, Lookup::Unknown) {
            let live = state.live.len();
            state.live.insert(id, make(live)?);
        }
        Ok(found)
    }

    /// Moves a transfer to the ended ones; also for ids that were never alive.
    pub(super) fn end(&self, id: TransferId, how: Ended) {
        let mut state = self.state.lock();
        state.live.remove(&id);
        if state.ended.insert(id, how).is_none() {
            state.order.push_back(id);
        }
        while state.order.len() > self.remember {
            if let Some(oldest) = state.order.pop_front() {
                state.ended.remove(&oldest);
            }
        }
    }

    /// Takes back an addition as if it had not been.
    pub(super) fn forget(&self, id: &TransferId) {
        self.state.lock().live.remove(id);
    }

    pub(super) fn live(&self) -> Vec<Arc<T>> {
        self.state.lock().live.values().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.state.lock().live.len()
    }
}

impl<T> State<T> {
    fn get(&self, id: &TransferId) -> Lookup<T> {
        match (self.live.get(id), self.ended.get(id)) {
            (Some(live), _) => Lookup::Live(live.clone()),
            (None, Some(ended)) => Lookup::Ended(ended.clone()),
            (None, None) => Lookup::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_the_oldest_and_never_adds_an_ended_id() {
        let table = Table::<u32>::new(2);
        let ids: Vec<_> = (0..3).map(|_| TransferId::generate()).collect();
        for &id in &ids {
            assert!(matches!(table.get_or_add(id, |_| Ok(Arc::new(1))), Ok(Lookup::Unknown)));
            table.end(id, Ended { peer: None, reason: None });
        }
        assert_eq!(table.len(), 0);
        assert!(matches!(table.get(&ids[0]), Lookup::Unknown));
        assert!(matches!(table.get_or_add(ids[2], |_| panic!("must not be made")), Ok(Lookup::Ended(_))));
    }
}
