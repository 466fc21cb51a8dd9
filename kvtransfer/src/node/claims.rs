//! Which pool blocks transfers are touching: a block is written by one transfer or read by any number, never both.
//!
//! The owner's own accounting should see to that already; this check is what keeps a mistake there from becoming one
//! request reading another's cache.

use parking_lot::Mutex;

use crate::TransferError;

#[derive(Debug)]
pub(super) struct Claims {
    /// By block: 0 = free, `WRITER` = being written, otherwise the number of readers.
    blocks: Mutex<Vec<u32>>,
}

const WRITER: u32 = u32::MAX;

impl Claims {
    pub(super) fn new(blocks: u32) -> Self {
        Self { blocks: Mutex::new(vec![0; blocks as usize]) }
    }

    /// Claims all of `write` and `read`, or nothing.
    pub(super) fn claim(&self, write: &[u32], read: &[u32]) -> Result<(), TransferError> {
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
        let Some((block, exists)) = failed else { return Ok(()) };
        release(&mut blocks, &write[..taken.0], &read[..taken.1]);
        Err(TransferError::Invalid(if exists {
            format!("block {block} is in use by another transfer")
        } else {
            format!("block {block} does not exist: the pool has {}", blocks.len())
        }))
    }

    pub(super) fn release(&self, write: &[u32], read: &[u32]) {
        release(&mut self.blocks.lock(), write, read);
    }
}

fn release(blocks: &mut [u32], write: &[u32], read: &[u32]) {
    write.iter().for_each(|&block| blocks[block as usize] = 0);
    read.iter().for_each(|&block| blocks[block as usize] = blocks[block as usize].saturating_sub(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers_and_a_refusal_leaves_nothing() {
        let claims = Claims::new(4);
        claims.claim(&[0, 1], &[2]).expect("free");
        claims.claim(&[], &[2, 3]).expect("readers share");
        for (write, read) in
            [(&[3u32, 1][..], &[][..]), (&[2], &[]), (&[], &[3, 0]), (&[9], &[]), (&[], &[9])]
        {
            claims.claim(write, read).expect_err("conflict");
        }
        claims.release(&[0, 1], &[2]);
        claims.release(&[], &[2, 3]);
        claims.claim(&[0, 1, 2, 3], &[]).expect("all free again");
        claims.claim(&[], &[0]).expect_err("being written");
    }

    #[test]
    fn a_block_named_twice_for_writing_is_refused() {
        let claims = Claims::new(2);
        claims.claim(&[1, 1], &[]).expect_err("twice");
        claims.claim(&[1], &[]).expect("the refusal left nothing");
    }
}
