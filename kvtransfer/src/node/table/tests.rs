//! Ids that come alive, are waited for, end and are forgotten.

use std::pin::pin;

use super::*;

/// Polls once: whether the future is ready.
fn ready(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready()
}

#[test]
fn those_who_wait_for_an_id_are_woken_when_it_comes_alive_and_leave_nothing_behind() {
    let table = Table::<u32>::new(Bounds { remember: 2, hold: 8 });
    let (id, other) = (TransferId::generate(), TransferId::generate());
    let awaited = || table.awaited();
    {
        let (mut first, mut second) = (pin!(table.known(id)), Box::pin(table.known(id)));
        let mut stranger = pin!(table.known(other));
        assert!(!ready(first.as_mut()) && !ready(second.as_mut()) && !ready(stranger.as_mut()));
        assert_eq!(awaited(), 2);
        drop(second);
        assert_eq!(awaited(), 2, "the first still waits");
        assert!(table.add(id, |_| Ok(Arc::new(1))).is_ok());
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
    assert!(table.end_unless_live(refused, Ended { peer: None, reason: None }).is_empty());
    assert!(ready(waits.as_mut()), "ended before it was ever alive");
    assert_eq!(awaited(), 0);
}

#[test]
fn an_id_either_comes_alive_and_is_seen_or_never_does() {
    let table = Table::<u32>::new(Bounds { remember: 4, hold: 8 });
    let refused = || Ended { peer: None, reason: Some(TransferError::ShuttingDown) };
    for _ in 0..2000 {
        let id = TransferId::generate();
        let barrier = std::sync::Barrier::new(2);
        let (added, seen) = std::thread::scope(|scope| {
            let adding = scope.spawn(|| {
                barrier.wait();
                table.add(id, |_| Ok(Arc::new(1))).is_ok()
            });
            barrier.wait();
            let seen = !table.end_unless_live(id, refused()).is_empty();
            (adding.join().expect("no panic"), seen)
        });
        assert_eq!(added, seen, "whoever ends an id is given what was added");
        assert_eq!(table.len(), usize::from(added), "nothing is taken away behind its owner's back");
        table.forget(&id);
    }
    let id = TransferId::generate();
    table.end(id, Ended { peer: None, reason: None });
    assert!(table.end_unless_live(id, refused()).is_empty());
    assert!(matches!(table.get(&id), Lookup::Ended(Ended { reason: None, .. })), "the first end stays");
}

#[test]
fn forgets_the_oldest_and_never_adds_an_ended_id() {
    let table = Table::<u32>::new(Bounds { remember: 2, hold: 8 });
    let ids: Vec<_> = (0..3).map(|_| TransferId::generate()).collect();
    for &id in &ids {
        assert!(table.add(id, |_| Ok(Arc::new(1))).is_ok());
        table.end(id, Ended { peer: None, reason: None });
    }
    assert_eq!(table.len(), 0);
    assert!(matches!(table.get(&ids[0]), Lookup::Unknown));
    let again = table.add(ids[2], |_| panic!("must not be made"));
    assert_eq!(again, Err(TransferError::AlreadyExists(ids[2])));
}
