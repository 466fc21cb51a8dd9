//! Packed weights and where they are kept: in memory of this process, or in a [`copy`] on disk that is mapped.

mod copy;
mod pack;

use std::io;

use self::copy::{Reader, Writer};
pub(crate) use self::{
    copy::{Found, Place},
    pack::{Packed, pack},
};
use super::{
    memory::{Arena, Bytes},
    threads::Pool,
};
use crate::RuntimeError;

/// Keeps the weights of one model as they are loaded, one matrix after the other.
#[derive(Default)]
pub(crate) struct Store {
    arena: Arena,
    /// Where packed weights are taken from instead of packing.
    reader: Option<Reader>,
    /// What they are written to besides.
    writer: Option<Writer>,
}

impl From<Reader> for Store {
    fn from(reader: Reader) -> Self {
        Self { reader: Some(reader), ..Self::default() }
    }
}

impl From<Writer> for Store {
    fn from(writer: Writer) -> Self {
        Self { writer: Some(writer), ..Self::default() }
    }
}

impl Store {
    /// The bytes of the next matrix, which `what` describes: those that the copy has, or what `fill` makes of zeros.
    fn put(
        &mut self,
        what: &str,
        length: usize,
        pool: &mut Pool,
        fill: &mut dyn FnMut(&mut [u8], &mut Pool),
    ) -> Result<Bytes, RuntimeError> {
        if let Some(reader) = &mut self.reader {
            return reader.next(what, length, pool);
        }
        let bytes = self.arena.filled(length, |bytes| fill(bytes, pool))?;
        if let Some(writer) = &mut self.writer
            && let Err(error) = writer.append(what, bytes.as_slice(), pool)
        {
            self.give_up(&error);
        }
        Ok(bytes)
    }

    /// Says that all matrices are there; gives whether they have just been written to a copy.
    pub(crate) fn finish(&mut self) -> bool {
        match self.writer.take().map(Writer::finish) {
            None => false,
            Some(Ok(())) => true,
            Some(Err(error)) => {
                self.give_up(&error);
                false
            }
        }
    }

    fn give_up(&mut self, error: &io::Error) {
        tracing::warn!("no packed copy of the weights is kept, it cannot be written: {error}");
        self.writer = None;
    }
}
