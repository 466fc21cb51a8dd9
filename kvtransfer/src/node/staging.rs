//! Memory for slices on their way in from peers that lay their cache out otherwise: they come here whole, are checked, and
//! are then mapped into the blocks they belong to.
//!
//! One run at a time for each data connection takes room, a frame's worth; what has been given back is used again. All of
//! it together is bounded (`Limits::staging_bytes`), and no run takes more than a part of it. A run that finds no room
//! waits, and its connection with it, until one that is there already has been mapped or given up.

use std::sync::Arc;

use tokio::sync::Notify;

use crate::{Region, Slices, TransferError, session::SliceRun, sync::Mutex};

/// Rooms are of powers of two, this one at least, so that runs of one frame more or less fit each other's.
const LEAST: usize = 64 << 10;
/// Rooms that are kept for the next run.
const KEPT: usize = 16;
/// No run takes more than this part of all: no peer takes it all with one frame.
const SHARE_OF_ONE: usize = 8;

/// A node's staging memory. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Staging {
    rooms: Arc<Mutex<Rooms>>,
    limit: usize,
    /// Held by who waits for room; the others wait behind.
    turns: Arc<tokio::sync::Mutex<()>>,
    /// Some have been given back.
    freed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Rooms {
    /// Bytes of all rooms, lent or kept.
    bytes: usize,
    /// The most there were.
    peak: usize,
    kept: Vec<Region>,
}

impl Staging {
    pub(super) fn new(limit: usize) -> Self {
        Self { rooms: Arc::default(), limit, turns: Arc::default(), freed: Arc::default() }
    }

    /// Most bytes of all rooms at a time, lent or kept.
    pub(super) fn peak(&self) -> u64 {
        self.rooms.lock().peak as u64
    }

    /// Room for a run of slices of this size, until it is dropped; waits for it.
    ///
    /// # Errors
    /// `Limit`: the run is more than one may take. A run of one slice may always take all there is.
    pub(super) async fn take(&self, run: SliceRun, slice_bytes: usize) -> Result<Staged, TransferError> {
        let most = (self.limit / SHARE_OF_ONE).max(slice_bytes);
        let limit = TransferError::Limit { what: "bytes of slices to be mapped in one frame", limit: most };
        let needed = slice_bytes.checked_mul(run.count as usize).filter(|needed| *needed <= most);
        let size = needed.and_then(usize::checked_next_power_of_two).ok_or(limit)?.max(LEAST);
        // First come, first served: else small runs would for ever take the room that a large one waits for.
        let _turn = self.turns.lock().await;
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable(); // before looking, so that nothing is missed
            if let Some(lent) = self.lend(size) {
                let slices = lent.room.cut(slice_bytes, 1, run.count)?;
                return Ok(Staged { run, slices, _lent: lent });
            }
            freed.await;
        }
    }

    /// A room of this size, if there is one.
    fn lend(&self, size: usize) -> Option<Lent> {
        let found = {
            let mut rooms = self.rooms.lock();
            let fitting = rooms.kept.iter().position(|room| room.len() == size);
            let found = fitting.map(|at| rooms.kept.swap_remove(at));
            if found.is_none() {
                if size > self.limit.saturating_sub(rooms.bytes) {
                    let kept = std::mem::take(&mut rooms.kept);
                    rooms.bytes -= kept.iter().map(Region::len).sum::<usize>();
                }
                // One that is larger than all may have it to itself.
                if rooms.bytes > 0 && size > self.limit.saturating_sub(rooms.bytes) {
                    return None;
                }
                rooms.bytes += size;
                rooms.peak = rooms.peak.max(rooms.bytes);
            }
            found
        };
        let room = found.unwrap_or_else(|| Region::zeroed(size));
        Some(Lent { room, staging: self.clone() })
    }
}

/// Room for one run.
#[derive(Debug)]
pub(super) struct Staged {
    run: SliceRun,
    slices: Slices,
    /// Goes last: nobody else has the room before.
    _lent: Lent,
}

impl Staged {
    pub(super) fn slices(&self) -> &Slices {
        &self.slices
    }

    /// Which of the slices one of the run is.
    pub(super) fn index(&self, layer: u32, block: u32) -> Result<u32, TransferError> {
        match block.checked_sub(self.run.first) {
            Some(index) if layer == self.run.layer && index < self.run.count => Ok(index),
            _ => Err(TransferError::Invalid(format!("block {block} of layer {layer} was not claimed"))),
        }
    }
}

/// Gives the room back when it is dropped.
#[derive(Debug)]
struct Lent {
    room: Region,
    staging: Staging,
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut rooms = self.staging.rooms.lock();
        if rooms.kept.len() < KEPT {
            rooms.kept.push(self.room.clone());
        } else {
            rooms.bytes -= self.room.len();
        }
        drop(rooms);
        self.staging.freed.notify_waiters();
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn run(first: u32, count: u32) -> SliceRun {
        SliceRun { layer: 3, first, count }
    }

    #[tokio::test]
    async fn rooms_are_bounded_used_again_and_make_way_for_others() {
        let staging = Staging::new(16 * LEAST);
        let address = |staged: &Staged| staged.slices().place(0, 0).expect("there");
        let mut held = Vec::new();
        for first in 0..8 {
            held.push(staging.take(run(first, 2), LEAST).await.expect("room"));
        }
        let mut waits = std::pin::pin!(staging.take(run(20, 2), LEAST - 7));
        assert!(waits.as_mut().now_or_never().is_none(), "there is no room");
        let place = address(&held.remove(3));
        assert_eq!(address(&waits.await.expect("the same room")), place);
        let other = staging.take(run(4, 1), 10).await.expect("what is kept makes way");
        drop((held, other));
        for (count, slice_bytes) in [(3, LEAST), (u32::MAX, usize::MAX)] {
            let refused = staging.take(run(0, count), slice_bytes).await.map(drop);
            assert!(matches!(refused, Err(TransferError::Limit { .. })), "{count} of {slice_bytes}");
        }
        staging.take(run(0, 1), 15 * LEAST).await.expect("one slice may have all of it");
        assert!(staging.rooms.lock().bytes <= 16 * LEAST);
    }

    #[tokio::test]
    async fn whoever_came_later_does_not_take_the_room_that_a_larger_run_waits_for() {
        let staging = Staging::new(16 * LEAST);
        let mut held: Vec<_> = Vec::new();
        for first in 0..16 {
            held.push(staging.take(run(first, 1), LEAST).await.expect("room"));
        }
        let mut large = std::pin::pin!(staging.take(run(20, 1), 4 * LEAST));
        assert!(large.as_mut().now_or_never().is_none());
        let mut small = std::pin::pin!(staging.take(run(21, 1), LEAST));
        for _ in 0..3 {
            held.pop();
            assert!(large.as_mut().now_or_never().is_none() && small.as_mut().now_or_never().is_none());
        }
        held.pop();
        let _large = large.as_mut().now_or_never().expect("four are free").expect("room");
        assert!(small.as_mut().now_or_never().is_none());
        held.pop();
        small.now_or_never().expect("its turn").expect("room");
    }

    #[tokio::test]
    async fn only_what_was_claimed_can_be_named() {
        let staged = Staging::new(LEAST).take(run(7, 2), 100).await.expect("room");
        assert_eq!((staged.index(3, 7), staged.index(3, 8)), (Ok(0), Ok(1)));
        for (layer, block) in [(3, 6), (3, 9), (2, 7)] {
            staged.index(layer, block).expect_err("not of the run");
        }
    }
}
