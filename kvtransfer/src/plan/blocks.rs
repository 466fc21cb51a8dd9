//! How blocks of one size line up with blocks of another.
//!
//! After as many tokens as both sizes divide, the pattern begins again; within it, tokens are cut wherever a block of
//! either side ends. With equal sizes that is one piece, a block.

use super::sharded::ShardedLayout;
use crate::TransferError;

/// Consecutive tokens that are in one block on either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Of the period's blocks.
    pub(super) source_block: u32,
    pub(super) target_block: u32,
    /// The first token, within its block.
    pub(super) source_token: u32,
    pub(super) target_token: u32,
    pub(super) tokens: u32,
}

/// What repeats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Period {
    pub(super) source_blocks: u32,
    pub(super) target_blocks: u32,
    /// In order of tokens.
    pub(super) pieces: Vec<Piece>,
}

impl Period {
    /// Sizes that cut each other into more pieces share next to nothing, and each piece is planned on its own.
    const MAX_PIECES: u64 = 256;

    pub(super) fn of(source: &ShardedLayout, target: &ShardedLayout) -> Result<Self, TransferError> {
        let (from, to) = (source.block_tokens, target.block_tokens);
        let common = u64::from(gcd(from, to));
        let (source_blocks, target_blocks) = (u64::from(to) / common, u64::from(from) / common);
        if source_blocks + target_blocks - 1 > Self::MAX_PIECES {
            return Err(TransferError::CannotReshard {
                field: "block_tokens",
                from: from.to_string(),
                to: to.to_string(),
                why: "blocks of these sizes begin together too rarely; choose one that divides the other",
            });
        }
        let tokens = source_blocks * u64::from(from);
        let (mut at, mut pieces) = (0_u64, Vec::new());
        while at < tokens {
            let (source_token, target_token) = (at % u64::from(from), at % u64::from(to));
            let length = (u64::from(from) - source_token).min(u64::from(to) - target_token);
            pieces.push(Piece {
                source_block: (at / u64::from(from)) as u32,
                target_block: (at / u64::from(to)) as u32,
                source_token: source_token as u32,
                target_token: target_token as u32,
                tokens: length as u32,
            });
            at += length;
        }
        Ok(Self { source_blocks: source_blocks as u32, target_blocks: target_blocks as u32, pieces })
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}
