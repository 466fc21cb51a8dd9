//! One id that several threads add, refuse, wait for and end at once.

use std::{future::poll_fn, pin::pin, task::Poll};

use shuttle::{future::block_on, thread};

use super::*;

/// Waits, or gives up after the first look.
fn wait(table: &Table<u32>, patient: bool) {
    block_on(async {
        let mut known = pin!(table.known(id(1)));
        poll_fn(|context| match known.as_mut().poll(context) {
            Poll::Pending if patient => Poll::Pending,
            _ => Poll::Ready(()),
        })
        .await;
    });
}

fn one_id() {
    let table = Arc::new(Table::<u32>::new(Bounds { remember: 4, hold: 8 }));
    let refusal = || Ended { peer: None, reason: Some(TransferError::ShuttingDown) };
    let adding = [1, 2].map(|value| {
        let table = table.clone();
        thread::spawn(move || table.add(id(1), |_| Ok(Arc::new(value))).is_ok())
    });
    let refusing = {
        let table = table.clone();
        thread::spawn(move || {
            let live = table.end_unless_live(id(1), refusal()).pop()?;
            // As `KvNode::refuse`: it is cancelled, and its shell ends it.
            table.end(id(1), refusal());
            Some(*live)
        })
    };
    let waiting = [true, true, false].map(|patient| {
        let table = table.clone();
        thread::spawn(move || wait(&table, patient))
    });
    let added = adding.map(|thread| thread.join().expect("no panic"));
    let given = refusing.join().expect("no panic");
    waiting.into_iter().for_each(|thread| thread.join().expect("no panic"));
    assert!(!(added[0] && added[1]), "alive twice");
    match given {
        Some(value) => assert!(added[value as usize - 1], "what is ended is what was added"),
        None => assert_eq!(added, [false; 2], "an id that was refused came alive"),
    }
    assert!(matches!(table.get(&id(1)), Lookup::Ended(Ended { reason: Some(_), .. })));
    assert_eq!((table.len(), table.awaited()), (0, 0));
}

#[test]
fn in_any_order_an_id_comes_alive_once_or_never_and_who_waits_is_woken() {
    explore(one_id);
}
