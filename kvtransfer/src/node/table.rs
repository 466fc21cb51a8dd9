//! The transfers of one direction: those alive, and the last of those that ended.
//!
//! Remembering the ended ones is what keeps an id from being used twice and tells a late message from a wrong one.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
};

use baton_proto::{InstanceId, TransferId};
use tokio_util::sync::CancellationToken;

use crate::{TransferError, sync::Mutex};

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

/// One who waits for an id to come alive or to be refused. The signal is cancelled when it is.
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
            let awaited = state.no_longer_awaited(&id);
            // Not under the lock: who is woken may come straight back here.
            drop(state);
            wake(awaited);
        }
        Ok(found)
    }

    /// Resolves once `id` is known, at once if it is: alive, or ended.
    pub(super) async fn known(&self, id: TransferId) {
        let Some(waiter) = self.wait(id) else { return };
        if let Some(signal) = &waiter.signal {
            signal.cancelled().await;
        }
    }

    /// `None` if `id` is known already.
    fn wait(&self, id: TransferId) -> Option<Waiter<'_, T>> {
        let mut state = self.state.lock();
        if !matches!(state.get(&id), Lookup::Unknown) {
            return None;
        }
        let signal = state.awaited.get(&id).and_then(Weak::upgrade).unwrap_or_default();
        state.awaited.insert(id, Arc::downgrade(&signal));
        Some(Waiter { table: self, id, signal: Some(signal) })
    }

    /// Moves a transfer to the ended ones.
    pub(super) fn end(&self, id: TransferId, how: Ended) {
        let mut state = self.state.lock();
        state.live.remove(&id);
        state.remember(id, how, self.remember);
    }

    /// Has an id that is not known ended before it was ever alive; one that has ended stays as it is. A live transfer is
    /// returned instead, for the caller to end: it cannot come alive unseen in between.
    pub(super) fn end_unless_live(&self, id: TransferId, how: Ended) -> Option<Arc<T>> {
        let mut state = self.state.lock();
        match state.get(&id) {
            Lookup::Live(live) => return Some(live),
            Lookup::Ended(_) => {}
            Lookup::Unknown => {
                state.remember(id, how, self.remember);
                let awaited = state.no_longer_awaited(&id);
                drop(state);
                wake(awaited);
            }
        }
        None
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

    /// Ids that somebody waits for.
    #[cfg(test)]
    pub(super) fn awaited(&self) -> usize {
        self.state.lock().awaited.len()
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

    /// The signal of those who wait for an id that is known now.
    fn no_longer_awaited(&mut self, id: &TransferId) -> Option<Arc<CancellationToken>> {
        self.awaited.remove(id).and_then(|signal| signal.upgrade())
    }

    fn remember(&mut self, id: TransferId, how: Ended, most: usize) {
        if self.ended.insert(id, how).is_none() {
            self.order.push_back(id);
        }
        while self.order.len() > most {
            if let Some(oldest) = self.order.pop_front() {
                self.ended.remove(&oldest);
            }
        }
    }
}

fn wake(awaited: Option<Arc<CancellationToken>>) {
    if let Some(signal) = awaited {
        signal.cancel();
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

#[cfg(all(test, not(feature = "explore")))]
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
        let awaited = || table.awaited();
        {
            let (mut first, mut second) = (pin!(table.known(id)), Box::pin(table.known(id)));
            let mut stranger = pin!(table.known(other));
            assert!(!ready(first.as_mut()) && !ready(second.as_mut()) && !ready(stranger.as_mut()));
            assert_eq!(awaited(), 2);
            drop(second);
            assert_eq!(awaited(), 2, "the first still waits");
            assert!(matches!(table.get_or_add(id, |_| Ok(Arc::new(1))), Ok(Lookup::Unknown)));
            assert!(ready(first.as_mut()), "alive");
            assert!(!ready(stranger.as_mut()), "its id is not");
        }
        assert_eq!(awaited(), 0);
        assert!(ready(pin!(table.known(id))), "alive already");
        table.end(id, Ended { peer: None, reason: None });
        assert!(ready(pin!(table.known(id))), "ended");
        let refused = TransferId::generate();
        let mut waits = pin!(table.known(refused));
        assert!(!ready(waits.as_mut()));
        assert!(table.end_unless_live(refused, Ended { peer: None, reason: None }).is_none());
        assert!(ready(waits.as_mut()), "ended before it was ever alive");
        assert_eq!(awaited(), 0);
    }

    #[test]
    fn an_id_either_comes_alive_and_is_seen_or_never_does() {
        let table = Table::<u32>::new(4);
        let refused = || Ended { peer: None, reason: Some(TransferError::ShuttingDown) };
        for _ in 0..2000 {
            let id = TransferId::generate();
            let barrier = std::sync::Barrier::new(2);
            let (added, seen) = std::thread::scope(|scope| {
                let adding = scope.spawn(|| {
                    barrier.wait();
                    matches!(table.get_or_add(id, |_| Ok(Arc::new(1))), Ok(Lookup::Unknown))
                });
                barrier.wait();
                let seen = table.end_unless_live(id, refused()).is_some();
                (adding.join().expect("no panic"), seen)
            });
            assert_eq!(added, seen, "whoever ends an id is given what was added");
            assert_eq!(table.len(), usize::from(added), "nothing is taken away behind its owner's back");
            table.forget(&id);
        }
        let id = TransferId::generate();
        table.end(id, Ended { peer: None, reason: None });
        assert!(table.end_unless_live(id, refused()).is_none());
        assert!(matches!(table.get(&id), Lookup::Ended(Ended { reason: None, .. })), "the first end stays");
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
