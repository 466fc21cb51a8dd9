//! The task that places those who wait in one line.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    task::yield_now,
    time::{Instant, sleep, timeout},
};

use super::Desk;
use crate::place::Placer;

/// Those that wait are looked at no more often than this, and no less.
pub(super) const LOOK_LEAST: Duration = Duration::from_millis(1);
pub(super) const LOOK_MOST: Duration = Duration::from_millis(100);
/// Placed in one go before others have their turn at the core; no longer than [`LOOK_LEAST`] either, once one is placed.
const PLACED_AT_ONCE_MOST: usize = 64;
/// Once nobody fits, others have it for so many times as long as it took to see that: in a large fleet, loads come all the time.
const OTHERS_SHARE: u32 = 4;

/// Places those who wait, until nobody does.
pub(super) async fn attend(desk: Arc<Desk>, placer: Arc<Placer>) {
    let _attending = Attending(&desk);
    loop {
        let mut freed = pin!(placer.board.freed());
        freed.as_mut().enable();
        let (began, mut placed, mut all) = (Instant::now(), 0, false);
        while !all && placed < PLACED_AT_ONCE_MOST && (placed == 0 || began.elapsed() < LOOK_LEAST) {
            all = !desk.place_next(&placer);
            placed += usize::from(!all);
        }
        let took = began.elapsed();
        if desk.is_left() {
            return;
        }
        if !all {
            yield_now().await;
            continue;
        }
        let event = async {
            tokio::select! {
                () = freed => {}
                () = desk.changed.notified() => {}
            }
        };
        let _ = timeout(LOOK_MOST, event).await;
        sleep(LOOK_LEAST.max(took * OTHERS_SHARE)).await;
    }
}

/// If a bug ends it, the next who comes has the line attended to again.
struct Attending<'a>(&'a Desk);

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state.lock().attended = false;
        }
    }
}
