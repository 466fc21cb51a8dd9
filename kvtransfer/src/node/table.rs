//! The transfers of one direction: those alive, and the last of those that ended.
//!
//! Remembering the ended ones is what keeps an id from being used twice and tells a late message from a wrong one.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::{Arc, Weak},
};

use baton_proto::{InstanceId, TransferId};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

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
    /// Ids that somebody waits for; an entry goes with the last of those who wait.
    awaited: HashMap<TransferId, Weak<CancellationToken>>,
}

/// One who waits for an id to come alive. The signal is cancelled when it does.
struct Waiter<'a, T> {
    table: &'a Table<T>,
    id: TransferId,
    /// `None` only while it is dropped.
    signal: Option<Arc<CancellationToken>>,
}

/// What an id stands for.
pub(super) enum Lookup<T> {
    Live(Arc<T>),
    Ended(Ended),
    Unknown,
}

impl<T> Table<T> {
    pub(super) fn new(remember: usize) -> Self {
        let state = State {
            live: HashMap::new(),
            ended: HashMap::new(),
            order: VecDeque::new(),
            awaited: HashMap::new(),
        };
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
            let signal = state.awaited.remove(&id).and_then(|signal| signal.upgrade());
            // Not under the lock: who is woken may come straight back here.
            drop(state);
            if let Some(signal) = signal {
                signal.cancel();
            }
        }
        Ok(found)
    }

    /// Resolves once `id` is alive, at once if it is; also when it has ended again by the time this is polled.
    pub(super) fn alive(&self, id: TransferId) -> impl Future<Output = ()> + Send + '_
    where
        T: Send + Sync,
    {
        async move {
            let Some(waiter) = self.wait(id) else { return };
            if let Some(signal) = &waiter.signal {
                signal.cancelled().await;
            }
        }
    }

    /// `None` if `id` is alive already.
    fn wait(&self, id: TransferId) -> Option<Waiter<'_, T>> {
        let mut state = self.state.lock();
        if state.live.contains_key(&id) {
            return None;
        }
        let signal = state.awaited.get(&id).and_then(Weak::upgrade).unwrap_or_default();
        state.awaited.insert(id, Arc::downgrade(&signal));
        Some(Waiter { table: self, id, signal: Some(signal) })
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

impl<T> Drop for Waiter<'_, T> {
    fn drop(&mut self) {
        let Some(signal) = self.signal.take() else { return };
        let mut state = self.table.state.lock();
        // Signals are shared out and given back under the lock only, so the last one knows that it is.
        let own = state.awaited.get(&self.id).is_some_and(|held| held.as_ptr() == Arc::as_ptr(&signal));
        if own && Arc::strong_count(&signal) == 1 {
            state.awaited.remove(&self.id);
        }
        drop(signal);
        drop(state);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    /// Polls once: whether the future is ready.
    fn ready(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
    }

    #[test]
    fn those_who_wait_for_an_id_are_woken_when_it_comes_alive_and_leave_nothing_behind() {
        let table = Table::<u32>::new(2);
        let (id, other) = (TransferId::generate(), TransferId::generate());
        let awaited = || table.state.lock().awaited.len();
        {
            let (mut first, mut second) = (pin!(table.alive(id)), Box::pin(table.alive(id)));
            let mut stranger = pin!(table.alive(other));
            assert!(!ready(first.as_mut()) && !ready(second.as_mut()) && !ready(stranger.as_mut()));
            assert_eq!(awaited(), 2);
            drop(second);
            assert_eq!(awaited(), 2, "the first still waits");
            assert!(matches!(table.get_or_add(id, |_| Ok(Arc::new(1))), Ok(Lookup::Unknown)));
            assert!(ready(first.as_mut()), "alive");
            assert!(!ready(stranger.as_mut()), "its id is not");
        }
        assert_eq!(awaited(), 0);
        assert!(ready(pin!(table.alive(id))), "alive already");
        table.end(id, Ended { peer: None, reason: None });
        assert!(!ready(pin!(table.alive(id))), "ended");
        assert_eq!(awaited(), 0);
    }

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
