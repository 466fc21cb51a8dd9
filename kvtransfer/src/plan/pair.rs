//! What one rank sends to another: a template for one slice and period of blocks, and its repetition over layers and
//! blocks.

use std::{ops::Range, sync::Arc};

use super::{
    blocks::{Period, Piece},
    convert::Conversion,
    nest::{Heads, Nest, Run, nests, runs},
    sharded::ShardedLayout,
    shares::Share,
};
use crate::TransferError;

/// One thing to do with one slice on either side. Blocks are indices into the transfer's block lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    pub layer: u32,
    pub source_block: u32,
    pub target_block: u32,
    pub action: Action,
}

/// What a [`Descriptor`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Copy `bytes` contiguous bytes; offsets are in bytes from the first of the slice.
    Copy { source_offset: u64, target_offset: u64, bytes: u64 },
    /// Convert vectors between bf16 and int8.
    Convert(VectorRun),
}

/// Vectors of one part (0: key or latent; 1: value or rotated part) for consecutive heads and tokens. Heads count from
/// the rank's first, tokens from the block's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorRun {
    pub part: usize,
    pub source_head: u32,
    pub target_head: u32,
    pub heads: u32,
    pub source_token: u32,
    pub target_token: u32,
    pub tokens: u32,
}

/// Everything that one sending rank has for one receiving rank. Its size does not depend on the number of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairPlan {
    share: Share,
    template: Arc<Template>,
}

/// What repeats. The same for all pairs that share as many heads at the same places.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Template {
    pub(super) source_bytes: u64,
    pub(super) target_bytes: u64,
    /// Of a source block.
    block_tokens: u32,
    period: Period,
    /// For each piece of the period.
    work: Vec<Work>,
    pub(super) conversion: Option<Conversion>,
}

#[derive(Debug, PartialEq, Eq)]
enum Work {
    Copies(Vec<Nest>),
    /// For each part.
    Conversions([VectorRun; 2]),
}

impl Work {
    fn copies(&self) -> u64 {
        match self {
            Self::Copies(_) => self.runs(),
            Self::Conversions(_) => 0,
        }
    }

    fn runs(&self) -> u64 {
        match self {
            Self::Copies(nests) => nests.iter().map(Nest::runs).fold(0, u64::saturating_add),
            Self::Conversions(vectors) => vectors.len() as u64,
        }
    }
}

impl Template {
    /// Runs of a period that are laid out at most, about 100 MB of them: the other side's blocks are not ours to choose.
    const MAX_RUNS: u64 = 1 << 22;

    pub(super) fn of(
        source: &ShardedLayout,
        target: &ShardedLayout,
        share: &Share,
    ) -> Result<Self, TransferError> {
        let period = Period::of(source, target)?;
        let count = share.heads.end - share.heads.start;
        let heads = Heads { source: share.places.0, target: share.places.1, count };
        let conversion = (source.dtype != target.dtype).then(|| Conversion {
            source: source.slice.clone(),
            target: target.slice.clone(),
            dims: source.content.dims(),
            to: target.dtype,
        });
        let work = |piece: &Piece| match conversion {
            None => Work::Copies(nests(&source.slice, &target.slice, source.dtype.bytes(), heads, piece)),
            Some(_) => Work::Conversions([0, 1].map(|part| VectorRun {
                part,
                source_head: heads.source,
                target_head: heads.target,
                heads: heads.count,
                source_token: piece.source_token,
                target_token: piece.target_token,
                tokens: piece.tokens,
            })),
        };
        let work: Vec<Work> = period.pieces.iter().map(work).collect();
        let all: u64 = work.iter().map(Work::runs).fold(0, u64::saturating_add);
        if all > Self::MAX_RUNS {
            return Err(TransferError::CannotReshard {
                field: "block_tokens",
                from: source.block_tokens.to_string(),
                to: target.block_tokens.to_string(),
                why: "arrangements as different as these need millions of copies a block; choose smaller blocks",
            });
        }
        Ok(Self {
            source_bytes: source.slice.bytes,
            target_bytes: target.slice.bytes,
            block_tokens: source.block_tokens,
            work,
            period,
            conversion,
        })
    }
}

impl PairPlan {
    pub(super) fn new(share: Share, template: Arc<Template>) -> Self {
        Self { share, template }
    }

    /// The sending rank.
    pub fn sender(&self) -> u32 {
        self.share.sender
    }

    /// The receiving rank.
    pub fn receiver(&self) -> u32 {
        self.share.receiver
    }

    /// The KV heads that move, of the whole model.
    pub fn heads(&self) -> Range<u32> {
        self.share.heads.clone()
    }

    /// The layers that move from this sender, in ascending order: not all of them where replicas share the work.
    pub fn layers(&self) -> &[u32] {
        &self.share.layers
    }

    /// Whether values change their type, so that bytes cannot be moved as they are.
    pub fn converts(&self) -> bool {
        self.template.conversion.is_some()
    }

    pub(super) fn template(&self) -> &Template {
        &self.template
    }

    /// Copies in a period of blocks of one layer: what an [`Expansion`] takes room for.
    pub(crate) fn runs(&self) -> u64 {
        self.template.work.iter().map(Work::copies).fold(0, u64::saturating_add)
    }

    /// Lays the template out. Takes as long as there are runs in a period of blocks of one layer; keep the result for as
    /// long as the plan is used.
    pub fn expand(&self) -> Expansion {
        let lay_out = |work: &Work| match work {
            Work::Copies(nests) => runs(nests),
            Work::Conversions(_) => Vec::new(),
        };
        Expansion { pair: self.clone(), runs: self.template.work.iter().map(lay_out).collect() }
    }
}

/// A plan whose descriptors can be listed, each in constant time.
#[derive(Debug)]
pub struct Expansion {
    pair: PairPlan,
    /// Of each piece of the period.
    runs: Vec<Vec<Run>>,
}

impl Expansion {
    /// The plan that was laid out.
    pub fn pair(&self) -> &PairPlan {
        &self.pair
    }

    /// Everything for a sequence of `tokens` tokens, layer by layer and, within one, in order of source blocks.
    pub fn all(&self, tokens: u32) -> impl Iterator<Item = Descriptor> {
        self.pair.layers().iter().flat_map(move |&layer| self.of_blocks(layer, 0..u32::MAX, tokens))
    }

    /// What is to be done once a layer of these source blocks has been computed, for a sequence of `tokens` tokens.
    /// Nothing for layers that another sender has.
    ///
    /// Descriptors of the same two slices are as few as can be: no two copies of them follow each other on both sides.
    /// Copies take whole blocks, or all of a block that lies in one block of the other side, whether or not the last
    /// tokens of it are there: pieces of a block would be more and shorter copies. Conversions stop at the last token.
    pub fn of_blocks(
        &self,
        layer: u32,
        source_blocks: Range<u32>,
        tokens: u32,
    ) -> impl Iterator<Item = Descriptor> {
        let template = self.pair.template();
        let mine = self.pair.layers().binary_search(&layer).is_ok();
        let there = tokens.div_ceil(template.block_tokens);
        let blocks = source_blocks.start..if mine { source_blocks.end.min(there) } else { 0 };
        blocks.flat_map(move |block| {
            let (period, within) =
                (block / template.period.source_blocks, block % template.period.source_blocks);
            let pieces = &template.period.pieces;
            let first = pieces.partition_point(|piece| piece.source_block < within);
            let last = pieces.partition_point(|piece| piece.source_block <= within);
            // Tokens of the sequence from the block's first on; the block is there, so there is at least one.
            let left = tokens - block * template.block_tokens;
            let pieces = (first..last).filter(move |&index| pieces[index].source_token < left);
            pieces.flat_map(move |index| {
                let piece = &template.period.pieces[index];
                let copies = self.runs[index].iter().map(|run| Action::Copy {
                    source_offset: run.source,
                    target_offset: run.target,
                    bytes: run.bytes,
                });
                let conversions = match &template.work[index] {
                    Work::Copies(_) => &[][..],
                    Work::Conversions(vectors) => vectors,
                };
                let conversions = conversions.iter().map(move |vectors| {
                    let tokens = vectors.tokens.min(left - vectors.source_token);
                    Action::Convert(VectorRun { tokens, ..*vectors })
                });
                let target_block = period * template.period.target_blocks + piece.target_block;
                copies.chain(conversions).map(move |action| Descriptor {
                    layer,
                    source_block: block,
                    target_block,
                    action,
                })
            })
        })
    }
}
