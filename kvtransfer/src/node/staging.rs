//! Memory for slices on their way in from peers that lay their cache out otherwise: they come here whole, are checked, and
//! are then mapped into the blocks they belong to.
//!
//! One run at a time for each data connection takes room, a frame's worth; what has been given back is used again. All of
//! it together is bounded (`Limits::staging_bytes`): who finds no room is refused, not waited for.

use std::sync::Arc;

use crate::{Region, Slices, TransferError, session::SliceRun, sync::Mutex};

/// Rooms are of powers of two, this one at least, so that runs of one frame more or less fit each other's.
const LEAST: usize = 64 << 10;
/// Rooms that are kept for the next run.
const KEPT: usize = 16;

/// A node's staging memory. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Staging {
    rooms: Arc<Mutex<Rooms>>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Rooms {
    /// Bytes of all rooms, lent or kept.
    bytes: usize,
    kept: Vec<Region>,
}

impl Staging {
    pub(super) fn new(limit: usize) -> Self {
        Self { rooms: Arc::default(), limit }
    }

    /// Room for a run of slices of this size, until it is dropped.
    pub(super) fn take(&self, run: SliceRun, slice_bytes: usize) -> Result<Staged, TransferError> {
        let full = TransferError::Limit { what: "bytes of slices to be mapped", limit: self.limit };
        let needed = slice_bytes.checked_mul(run.count as usize).ok_or_else(|| full.clone())?;
        let size = needed.checked_next_power_of_two().ok_or_else(|| full.clone())?.max(LEAST);
        let found = {
            let mut rooms = self.rooms.lock();
            let fitting = rooms.kept.iter().position(|room| room.len() == size);
            let found = fitting.map(|at| rooms.kept.swap_remove(at));
            if found.is_none() {
                if size > self.limit.saturating_sub(rooms.bytes) {
                    let kept = std::mem::take(&mut rooms.kept);
                    rooms.bytes -= kept.iter().map(Region::len).sum::<usize>();
                }
                if size > self.limit.saturating_sub(rooms.bytes) {
                    return Err(full);
                }
                rooms.bytes += size;
            }
            found
        };
        let room = found.unwrap_or_else(|| Region::zeroed(size));
        let lent = Lent { room: Some(room.clone()), rooms: self.rooms.clone() };
        let slices = room.cut(slice_bytes, 1, run.count)?;
        Ok(Staged { run, slices, _lent: lent })
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
    room: Option<Region>,
    rooms: Arc<Mutex<Rooms>>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(room) = self.room.take() else { return };
        let mut rooms = self.rooms.lock();
        if rooms.kept.len() < KEPT {
            rooms.kept.push(room);
        } else {
            rooms.bytes -= room.len();
        }
    }
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> SliceRun {
        SliceRun { layer: 3, first, count }
    }

    #[test]
    fn rooms_are_bounded_used_again_and_make_way_for_others() {
        let staging = Staging::new(4 * LEAST);
        let address = |staged: &Staged| staged.slices().place(0, 0).expect("there");
        let first = staging.take(run(0, 2), LEAST).expect("room");
        let second = staging.take(run(2, 2), LEAST - 7).expect("room");
        let refused = staging.take(run(4, 1), 10).expect_err("full");
        assert!(matches!(refused, TransferError::Limit { limit, .. } if limit == 4 * LEAST), "{refused}");
        let place = address(&first);
        drop(first);
        assert_eq!(address(&staging.take(run(9, 2), LEAST).expect("the same room")), place);
        let _other = staging.take(run(4, 1), 10).expect("what is kept makes way");
        drop(second);
        staging.take(run(0, 5), LEAST).expect_err("more than all of it");
        staging.take(run(0, u32::MAX), usize::MAX).expect_err("overflows");
    }

    #[test]
    fn only_what_was_claimed_can_be_named() {
        let staged = Staging::new(LEAST).take(run(7, 2), 100).expect("room");
        assert_eq!((staged.index(3, 7), staged.index(3, 8)), (Ok(0), Ok(1)));
        for (layer, block) in [(3, 6), (3, 9), (2, 7)] {
            staged.index(layer, block).expect_err("not of the run");
        }
    }
}
