//! Copies within one slice: found as strided nests, few whatever the block size, and laid out as runs of bytes that are
//! as long as they can be.

use super::{
    blocks::Piece,
    slice_map::{PartMap, SCALE_BYTES, SliceMap},
    strided::{Coordinate, Segment, Strided, segments},
};

/// Runs of `bytes`, repeated by each of `loops`. Offsets are in bytes from the first of either slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Nest {
    source: u64,
    target: u64,
    bytes: u64,
    /// Outermost first, by how far they step in the target.
    loops: Vec<Loop>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loop {
    count: u64,
    source_stride: u64,
    target_stride: u64,
}

/// Bytes that are contiguous on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) source: u64,
    pub(super) target: u64,
    pub(super) bytes: u64,
}

/// Heads that move: how many, and where they begin among those of the slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heads {
    pub(super) source: u32,
    pub(super) target: u32,
    pub(super) count: u32,
}

/// The copies of one piece. What fills vectors up is copied where both sides have it: it costs nothing, and slices that
/// are alike stay in one run.
pub(super) fn nests(
    source: &SliceMap,
    target: &SliceMap,
    unit_bytes: u64,
    heads: Heads,
    piece: &Piece,
) -> Vec<Nest> {
    let mut nests = Vec::new();
    for (PartMap { values: from, scales: from_scales }, PartMap { values: to, scales: to_scales }) in
        source.parts.iter().zip(&target.parts)
    {
        let dims = from.extent(Coordinate::Dim).min(to.extent(Coordinate::Dim));
        strided_copies((from, to), unit_bytes, dims, heads, piece, &mut nests);
        if let (Some(from), Some(to)) = (from_scales, to_scales) {
            strided_copies((from, to), SCALE_BYTES, 1, heads, piece, &mut nests);
        }
    }
    nests
}

fn strided_copies(
    (from, to): (&Strided, &Strided),
    unit_bytes: u64,
    dims: u64,
    heads: Heads,
    piece: &Piece,
    nests: &mut Vec<Nest>,
) {
    let cut = |along, source: u32, target: u32, count: u64| {
        segments(along, (from, source.into()), (to, target.into()), count)
    };
    let heads = cut(Coordinate::Head, heads.source, heads.target, heads.count.into());
    let tokens = cut(Coordinate::Token, piece.source_token, piece.target_token, piece.tokens.into());
    let dims = cut(Coordinate::Dim, 0, 0, dims);
    for head in &heads {
        for token in &tokens {
            for dim in &dims {
                let of = |offset: fn(&Segment) -> u64| offset(head) + offset(token) + offset(dim);
                let mut nest = Nest {
                    source: from.start + of(|segment| segment.source),
                    target: to.start + of(|segment| segment.target),
                    bytes: unit_bytes,
                    loops: [head, token, dim].map(Loop::over).to_vec(),
                };
                nest.reduce();
                nests.push(nest);
            }
        }
    }
}

impl Loop {
    fn over(segment: &Segment) -> Self {
        let Segment { count, source_stride, target_stride, .. } = *segment;
        Self { count, source_stride, target_stride }
    }
}

impl Nest {
    /// Turns loops over contiguous bytes into longer runs, and leaves the others in order of target.
    fn reduce(&mut self) {
        self.loops.retain(|each| each.count != 1);
        let contiguous = |each: &Loop, bytes| each.source_stride == bytes && each.target_stride == bytes;
        while let Some(at) = self.loops.iter().position(|each| contiguous(each, self.bytes)) {
            self.bytes *= self.loops.remove(at).count;
        }
        self.loops.sort_by_key(|each| std::cmp::Reverse((each.target_stride, each.source_stride)));
    }

    /// How many runs it is.
    pub(super) fn runs(&self) -> u64 {
        self.loops.iter().fold(1, |runs, each| each.count.saturating_mul(runs))
    }

    fn lay_out(&self, loops: &[Loop], source: u64, target: u64, runs: &mut Vec<Run>) {
        match loops {
            [] => runs.push(Run { source, target, bytes: self.bytes }),
            [outer, inner @ ..] => (0..outer.count).for_each(|step| {
                let (source, target) =
                    (source + step * outer.source_stride, target + step * outer.target_stride);
                self.lay_out(inner, source, target, runs);
            }),
        }
    }
}

/// The runs of all nests in order of target, neighbours joined: parts and columns that follow each other on both sides
/// are one run, and a slice that is kept alike is one as a whole.
pub(super) fn runs(nests: &[Nest]) -> Vec<Run> {
    let mut all = Vec::new();
    nests.iter().for_each(|nest| nest.lay_out(&nest.loops, nest.source, nest.target, &mut all));
    all.sort_by_key(|run| run.target);
    all.dedup_by(|next, last| {
        let joined = last.source + last.bytes == next.source && last.target + last.bytes == next.target;
        if joined {
            last.bytes += next.bytes;
        }
        joined
    });
    all
}
