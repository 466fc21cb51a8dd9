//! Which pool blocks transfers are touching: a block is written by one transfer or read by any number, never both.
//!
//! The owner's own accounting should see to that already; this check is what keeps a mistake there from becoming one
//! request reading another's cache.

use std::{fmt, sync::Arc};

use crate::{TransferError, sync::Mutex};

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Claims {
    /// By block: 0 = free, `WRITER` = being written, otherwise the number of readers.
    blocks: Arc<Mutex<Vec<u32>>>,
}

const WRITER: u32 = u32::MAX;

impl Claims {
    pub(super) fn new(blocks: u32) -> Self {
        Self { blocks: Arc::new(Mutex::new(vec![0; blocks as usize])) }
    }

    /// Claims all of `write` and `read`, until the result is dropped, or nothing.
    pub(super) fn claim(&self, write: &[u32], read: &[u32]) -> Result<Claimed, TransferError> {
        let mut blocks = self.blocks.lock();
        let mut taken = (0, 0);
        let failed = 'claim: {
            for &block in write {
                match blocks.get_mut(block as usize) {
                    Some(free) if *free == 0 => *free = WRITER,
                    found => break 'claim Some((block, found.is_some())),
                }
                taken.0 += 1;
            }
            for &block in read {
                match blocks.get_mut(block as usize) {
                    Some(readers) if *readers < WRITER - 1 => *readers += 1,
                    found => break 'claim Some((block, found.is_some())),
                }
                taken.1 += 1;
            }
            None
        };
        let Some((block, exists)) = failed else {
            return Ok(Claimed { claims: self.clone(), write: write.into(), read: read.into() });
        };
        release(&mut blocks, &write[..taken.0], &read[..taken.1]);
        Err(TransferError::Invalid(if exists {
            format!("block {block} is in use by another transfer")
        } else {
            format!("block {block} does not exist: the pool has {}", blocks.len())
        }))
    }
}

/// Blocks that a transfer touches; let go of when this is dropped.
pub(super) struct Claimed {
    claims: Claims,
    write: Box<[u32]>,
    read: Box<[u32]>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        release(&mut self.claims.blocks.lock(), &self.write, &self.read);
    }
}

impl fmt::Debug for Claimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claimed")
            .field("write", &self.write)
            .field("read", &self.read)
            .finish_non_exhaustive()
    }
}

fn release(blocks: &mut [u32], write: &[u32], read: &[u32]) {
    write.iter().for_each(|&block| blocks[block as usize] = 0);
    read.iter().for_each(|&block| blocks[block as usize] -= 1);
}

#[cfg(all(test, not(feature = "explore")))]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers_and_a_refusal_leaves_nothing() {
        let claims = Claims::new(4);
        let writer = claims.claim(&[0, 1], &[2]).expect("free");
        let reader = claims.claim(&[], &[2, 3]).expect("readers share");
        for (write, read) in
            [(&[3u32, 1][..], &[][..]), (&[2], &[]), (&[], &[3, 0]), (&[9], &[]), (&[], &[9])]
        {
            claims.claim(write, read).expect_err("conflict");
        }
        drop((writer, reader));
        let _all = claims.claim(&[0, 1, 2, 3], &[]).expect("all free again");
        claims.claim(&[], &[0]).expect_err("being written");
    }

    #[test]
    fn a_block_named_twice_for_writing_is_refused() {
        let claims = Claims::new(2);
        claims.claim(&[1, 1], &[]).expect_err("twice");
        claims.claim(&[1], &[]).expect("the refusal left nothing");
    }
}
