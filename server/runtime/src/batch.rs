//! From the engine's batch to the step a device runs: everything that could be wrong is found here.

use std::ops::Range;

use crate::{BatchFault, BlockId, KvPoolLayout, ModelShape, RuntimeError, SequenceChunk};

/// One forward pass, checked: all indices a device will use are within their bounds.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    /// Token ids of all rows; rows of one sequence follow each other.
    pub(crate) tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub(crate) positions: Vec<u32>,
    pub(crate) sequences: Vec<Span<'a>>,
    /// Rows whose logits are wanted, ascending; each is the last of its sequence.
    pub(crate) logits_rows: Vec<usize>,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone)]
pub(crate) struct Span<'a> {
    pub(crate) rows: Range<usize>,
    /// Position of the first row.
    pub(crate) start: u32,
    /// Exactly the blocks that hold positions up to the last row's.
    pub(crate) blocks: &'a [BlockId],
}

impl<'a> Step<'a> {
    /// The step of the rows alone whose logits are wanted: what is left to do once no other row is read any more.
    pub(crate) fn of_logits_rows(&self) -> Self {
        let last = |span: &Span<'a>| (span.rows.end - 1, span.blocks);
        let wanted = |&(row, _): &(usize, _)| self.logits_rows.binary_search(&row).is_ok();
        let rows: Vec<(usize, &[BlockId])> = self.sequences.iter().map(last).filter(wanted).collect();
        let span = |(row, &(of, blocks)): (usize, &(usize, &'a [BlockId]))| Span {
            rows: row..row + 1,
            start: self.positions[of],
            blocks,
        };
        Self {
            tokens: rows.iter().map(|&(of, _)| self.tokens[of]).collect(),
            positions: rows.iter().map(|&(of, _)| self.positions[of]).collect(),
            sequences: rows.iter().enumerate().map(span).collect(),
            logits_rows: (0..rows.len()).collect(),
        }
    }
}

/// Checks a batch and lays its rows out.
pub(crate) fn plan<'a>(
    batch: &[SequenceChunk<'a>],
    shape: &ModelShape,
    layout: &KvPoolLayout,
    max_batch_tokens: usize,
) -> Result<Step<'a>, RuntimeError> {
    if batch.is_empty() {
        return Err(RuntimeError::Batch(BatchFault::Empty));
    }
    let tokens = batch.iter().map(|chunk| chunk.tokens.len()).fold(0, usize::saturating_add);
    if tokens > max_batch_tokens {
        return Err(RuntimeError::Batch(BatchFault::TooManyTokens { tokens, limit: max_batch_tokens }));
    }
    let mut step = Step {
        tokens: Vec::with_capacity(tokens),
        positions: Vec::with_capacity(tokens),
        sequences: Vec::with_capacity(batch.len()),
        logits_rows: Vec::new(),
    };
    let mut written: Vec<(BlockId, usize)> = Vec::new();
    for (sequence, chunk) in batch.iter().enumerate() {
        let blocks =
            check(chunk, shape, layout).map_err(|fault| RuntimeError::Sequence { sequence, fault })?;
        let first = step.tokens.len();
        step.tokens.extend_from_slice(chunk.tokens);
        step.positions.extend((chunk.start..).take(chunk.tokens.len()));
        let rows = first..step.tokens.len();
        if chunk.logits {
            step.logits_rows.push(rows.end - 1);
        }
        let touched = &blocks[(chunk.start / layout.block_tokens) as usize..];
        written.extend(touched.iter().map(|&block| (block, sequence)));
        step.sequences.push(Span { rows, start: chunk.start, blocks });
    }
    written.sort_unstable();
    match written.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(RuntimeError::Sequence {
            sequence: pair[1].1,
            fault: BatchFault::BlockShared { block: pair[1].0.0 },
        }),
        None => Ok(step),
    }
}

/// Checks that all blocks named exist.
pub(crate) fn check_copies(copies: &[(BlockId, BlockId)], layout: &KvPoolLayout) -> Result<(), RuntimeError> {
    let mut named = copies.iter().flat_map(|&(from, to)| [from, to]);
    match named.find(|block| block.0 >= layout.blocks) {
        Some(BlockId(block)) => {
            Err(RuntimeError::Batch(BatchFault::NoSuchBlock { block, blocks: layout.blocks }))
        }
        None => Ok(()),
    }
}

/// Checks one chunk; gives the blocks it needs.
fn check<'a>(
    chunk: &SequenceChunk<'a>,
    shape: &ModelShape,
    layout: &KvPoolLayout,
) -> Result<&'a [BlockId], BatchFault> {
    if chunk.tokens.is_empty() {
        return Err(BatchFault::NoTokens);
    }
    let vocabulary = shape.vocabulary;
    if let Some(&token) = chunk.tokens.iter().find(|&&token| token >= vocabulary) {
        return Err(BatchFault::UnknownToken { token, vocabulary });
    }
    let end = u64::from(chunk.start) + chunk.tokens.len() as u64;
    let context_tokens = shape.context_tokens;
    let within = u32::try_from(end).ok().filter(|&end| end <= context_tokens);
    let needed = layout.blocks_for(within.ok_or(BatchFault::BeyondContext { end, context_tokens })?) as usize;
    let blocks = chunk.blocks.get(..needed);
    let blocks = blocks.ok_or(BatchFault::TooFewBlocks { blocks: chunk.blocks.len(), needed })?;
    match blocks.iter().find(|block| block.0 >= layout.blocks) {
        Some(block) => Err(BatchFault::NoSuchBlock { block: block.0, blocks: layout.blocks }),
        None => Ok(blocks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvContent, KvDtype};

    const SHAPE: ModelShape = ModelShape { layers: 1, vocabulary: 100, context_tokens: 64 };

    fn layout() -> KvPoolLayout {
        KvPoolLayout {
            format: "test",
            content: KvContent::KeysAndValues,
            dtype: KvDtype::F32,
            block_tokens: 16,
            layers: 1,
            kv_heads: 1,
            head_dim: 2,
            stored_dim: 4,
            blocks: 8,
        }
    }

    fn chunk<'a>(tokens: &'a [u32], start: u32, blocks: &'a [BlockId]) -> SequenceChunk<'a> {
        SequenceChunk { tokens, start, blocks, logits: true }
    }

    fn fault(batch: &[SequenceChunk<'_>]) -> BatchFault {
        match plan(batch, &SHAPE, &layout(), 40).unwrap_err() {
            RuntimeError::Batch(fault) | RuntimeError::Sequence { fault, .. } => fault,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn rows_follow_the_batch() {
        let blocks = [BlockId(3), BlockId(1), BlockId(7)];
        let batch = [chunk(&[5; 17], 0, &blocks[..2]), chunk(&[6], 3, &blocks[2..])];
        let step = plan(&batch, &SHAPE, &layout(), 40).unwrap();
        assert_eq!((step.tokens.len(), step.logits_rows), (18, vec![16, 17]));
        assert_eq!(step.positions[16..], [16, 3]);
        assert_eq!(step.sequences[1].rows, 17..18);
    }

    #[test]
    fn the_rows_whose_logits_are_wanted_make_a_step_of_their_own() {
        let blocks = [BlockId(3), BlockId(1), BlockId(7), BlockId(0)];
        let silent = SequenceChunk { logits: false, ..chunk(&[7, 8], 0, &blocks[3..]) };
        let batch = [chunk(&[5; 17], 0, &blocks[..2]), silent, chunk(&[6], 3, &blocks[2..3])];
        let step = plan(&batch, &SHAPE, &layout(), 40).unwrap().of_logits_rows();
        assert_eq!((step.tokens, step.positions, step.logits_rows), (vec![5, 6], vec![16, 3], vec![0, 1]));
        let spans: Vec<_> =
            step.sequences.iter().map(|span| (span.rows.clone(), span.start, span.blocks)).collect();
        assert_eq!(spans, [(0..1, 16, &blocks[..2]), (1..2, 3, &blocks[2..3])]);
    }

    #[test]
    fn faults_are_named() {
        let blocks: Vec<BlockId> = (0..9).map(BlockId).collect();
        assert_eq!(fault(&[]), BatchFault::Empty);
        assert_eq!(fault(&[chunk(&[], 0, &blocks)]), BatchFault::NoTokens);
        assert_eq!(
            fault(&[chunk(&[1; 41], 0, &blocks)]),
            BatchFault::TooManyTokens { tokens: 41, limit: 40 }
        );
        assert_eq!(
            fault(&[chunk(&[100], 0, &blocks)]),
            BatchFault::UnknownToken { token: 100, vocabulary: 100 }
        );
        let beyond = BatchFault::BeyondContext { end: 65, context_tokens: 64 };
        assert_eq!(fault(&[chunk(&[1], 64, &blocks)]), beyond);
        let wrapped = BatchFault::BeyondContext { end: u64::from(u32::MAX) + 1, context_tokens: 64 };
        assert_eq!(fault(&[chunk(&[1], u32::MAX, &blocks)]), wrapped);
        assert_eq!(
            fault(&[chunk(&[1; 17], 0, &blocks[..1])]),
            BatchFault::TooFewBlocks { blocks: 1, needed: 2 }
        );
        assert_eq!(fault(&[chunk(&[1], 0, &blocks[8..])]), BatchFault::NoSuchBlock { block: 8, blocks: 8 });
        assert_eq!(
            fault(&[chunk(&[1], 0, &blocks[..1]), chunk(&[2], 0, &blocks[..1])]),
            BatchFault::BlockShared { block: 0 }
        );
    }

    #[test]
    fn a_shared_prefix_is_no_fault() {
        let blocks = [BlockId(0), BlockId(1), BlockId(2)];
        let (one, two) = ([blocks[0], blocks[1]], [blocks[0], blocks[2]]);
        assert!(plan(&[chunk(&[1], 16, &one), chunk(&[1], 16, &two)], &SHAPE, &layout(), 40).is_ok());
    }
}
