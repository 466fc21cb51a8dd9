//! Packed weights and where they are kept: in memory of this process, or in a [`copy`] on disk that is mapped.

mod copy;
mod pack;

use baton_checkpoint::Checkpoint;

use self::copy::{Copy, Found};
pub(crate) use self::pack::{Packed, pack};
use super::{
    memory::{Arena, Bytes},
    threads::Pool,
};
use crate::{LoadOptions, RuntimeError};

/// Keeps the weights of one model as they are loaded, one matrix after the other.
#[derive(Default)]
pub(crate) struct Store {
    arena: Arena,
    copy: Option<Copy>,
}

impl Store {
    /// Uses the packed copy if there is to be one. Where that cannot be, weights are kept in memory, and the log says why.
    /// `waiting(bytes)` is called while another process writes the copy.
    pub(crate) fn open(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        waiting: &mut dyn FnMut(u64),
    ) -> Result<Self, RuntimeError> {
        let Some(folder) = &options.packed_copies else { return Ok(Self::default()) };
        let found = copy::open(folder, checkpoint, options.exact_bf16, waiting);
        let copy = match found? {
            Found::Copy(copy) => Some(copy),
            Found::Unusable(reason) => {
                let folder = folder.display();
                tracing::warn!("no packed copy of the weights is kept in {folder}: {reason}");
                None
            }
        };
        Ok(Self { arena: Arena::default(), copy })
    }

    /// The bytes of the next matrix, which `what` describes: those that the copy has, or what `fill` makes of zeros.
    fn put(
        &mut self,
        what: &str,
        length: usize,
        pool: &mut Pool,
        fill: &mut dyn FnMut(&mut [u8], &mut Pool),
    ) -> Result<Bytes, RuntimeError> {
        match &mut self.copy {
            Some(Copy::Whole(reader)) => return reader.next(what, length, pool),
            Some(Copy::Begun(writer)) => match writer.append(what, length, pool, fill) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    let path = writer.path().display();
                    tracing::warn!("the packed copy {path} is given up, it cannot be written: {error}");
                    self.copy = None;
                }
            },
            None => {}
        }
        self.arena.filled(length, |bytes| fill(bytes, pool))
    }

    /// Says that all matrices are there.
    pub(crate) fn finish(&mut self) {
        self.arena = Arena::default();
        if let Some(Copy::Begun(writer)) = self.copy.take() {
            let path = writer.path().to_owned();
            match writer.finish() {
                Ok(bytes) => tracing::info!(path = %path.display(), bytes, "packed copy written"),
                Err(error) => tracing::warn!("the packed copy {} is not kept: {error}", path.display()),
            }
        }
    }
}
