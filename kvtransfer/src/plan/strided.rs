//! Where the elements of one part of a cache lie within a slice: a start and nested axes, each with its stride.
//!
//! A coordinate may have several axes, outermost first: sixteen-element columns of a head's dimension, for example, are
//! one axis that counts columns and one that counts elements of a column. What a slice is made of is said in
//! `slice_map`; this file only knows how to find an element and on which stretches two arrangements are both regular.

/// What an axis counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coordinate {
    /// KV heads of the rank, the first of them 0.
    Head,
    /// Tokens of the block.
    Token,
    /// Elements of one vector.
    Dim,
}

/// One level of a nest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axis {
    pub along: Coordinate,
    /// Steps along the axis.
    pub extent: u32,
    /// Bytes from one step to the next.
    pub stride: u64,
}

/// The places of all elements of one part, or of its scales, in bytes from the slice's first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Strided {
    /// Where head 0, token 0, element 0 lies.
    pub start: u64,
    /// Of the axes of one coordinate, the outer stands before the inner; else the order means nothing.
    pub axes: Vec<Axis>,
}

/// Consecutive indices of one coordinate along which both arrangements step evenly. Offsets and strides are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) count: u64,
    pub(super) source: u64,
    pub(super) source_stride: u64,
    pub(super) target: u64,
    pub(super) target_stride: u64,
}

impl Strided {
    /// Elements of `unit_bytes` without gaps, the last axis of `nest` running fastest.
    pub fn dense(start: u64, unit_bytes: u64, nest: &[(Coordinate, u32)]) -> Self {
        let mut stride = unit_bytes;
        let mut axes = Vec::with_capacity(nest.len());
        for &(along, extent) in nest.iter().rev() {
            axes.push(Axis { along, extent, stride });
            stride = stride.saturating_mul(extent.into());
        }
        axes.reverse();
        Self { start, axes }
    }

    /// Offset of an element in bytes. The indices must lie within the axes' extents; others lead outside the slice or
    /// to another element.
    pub fn offset(&self, head: u32, token: u32, dim: u32) -> u64 {
        let steps = [(Coordinate::Head, head), (Coordinate::Token, token), (Coordinate::Dim, dim)];
        steps
            .iter()
            .fold(self.start, |sum, &(along, index)| sum.saturating_add(self.along(along, index.into())))
    }

    /// What an index adds to the offset.
    pub(super) fn along(&self, along: Coordinate, index: u64) -> u64 {
        place(&self.fused(along), index)
    }

    /// Indices there are along a coordinate.
    pub(super) fn extent(&self, along: Coordinate) -> u64 {
        let extents = self.axes.iter().filter(|axis| axis.along == along).map(|axis| u64::from(axis.extent));
        extents.fold(1, u64::saturating_mul)
    }

    /// Bytes from the first element's first to the last element's last.
    pub(super) fn span(&self, unit_bytes: u64) -> u64 {
        self.axes.iter().fold(unit_bytes, |sum, axis| {
            sum.saturating_add(u64::from(axis.extent.saturating_sub(1)).saturating_mul(axis.stride))
        })
    }

    /// The axes of a coordinate as (extent, stride), outermost first, those that are regular together made one.
    fn fused(&self, along: Coordinate) -> Vec<(u64, u64)> {
        let mut fused: Vec<(u64, u64)> = Vec::new();
        for axis in self.axes.iter().filter(|axis| axis.along == along && axis.extent > 1) {
            let extent = u64::from(axis.extent);
            match fused.last_mut() {
                Some(outer) if outer.1 == axis.stride.saturating_mul(extent) => {
                    *outer = (outer.0.saturating_mul(extent), axis.stride);
                }
                _ => fused.push((extent, axis.stride)),
            }
        }
        fused
    }
}

/// The outermost axis takes what the inner ones leave, so that an index beyond the extents is not taken for another.
fn place(axes: &[(u64, u64)], index: u64) -> u64 {
    let (mut rest, mut sum) = (index, 0_u64);
    for (level, &(extent, stride)) in axes.iter().enumerate().rev() {
        let digit = if level == 0 { rest } else { rest % extent };
        rest /= extent;
        sum = sum.saturating_add(digit.saturating_mul(stride));
    }
    sum
}

/// Cuts `count` indices, from `source_first` on in one arrangement and from `target_first` on in the other, where an
/// inner axis of either begins anew.
pub(super) fn segments(
    along: Coordinate,
    (source, source_first): (&Strided, u64),
    (target, target_first): (&Strided, u64),
    count: u64,
) -> Vec<Segment> {
    let (source, target) = (source.fused(along), target.fused(along));
    // A lone axis never begins anew; of several, the innermost does.
    let left = |axes: &[(u64, u64)], index: u64| match axes {
        [_, .., (extent, _)] => extent - index % extent,
        _ => u64::MAX,
    };
    let stride = |axes: &[(u64, u64)]| axes.last().map_or(0, |axis| axis.1);
    let (mut done, mut segments) = (0, Vec::new());
    while done < count {
        let (from, to) = (source_first + done, target_first + done);
        let count = (count - done).min(left(&source, from)).min(left(&target, to));
        segments.push(Segment {
            count,
            source: place(&source, from),
            source_stride: stride(&source),
            target: place(&target, to),
            target_stride: stride(&target),
        });
        done += count;
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_sixteen_are_found_and_cut() {
        let columns = [(Coordinate::Dim, 3), (Coordinate::Token, 4), (Coordinate::Dim, 16)];
        let values = Strided::dense(100, 2, &columns);
        assert_eq!(values.offset(0, 3, 17), 100 + ((4 + 3) * 16 + 1) * 2);
        assert_eq!((values.extent(Coordinate::Dim), values.extent(Coordinate::Head)), (48, 1));
        assert_eq!(values.span(2), 3 * 4 * 16 * 2);
        let rows = Strided::dense(0, 2, &[(Coordinate::Token, 4), (Coordinate::Dim, 40)]);
        let cut = segments(Coordinate::Dim, (&values, 0), (&rows, 0), 40);
        assert_eq!(cut.iter().map(|segment| segment.count).collect::<Vec<_>>(), [16, 16, 8]);
        assert_eq!((cut[2].source, cut[2].target), (2 * 4 * 16 * 2, 32 * 2));
        let shifted = segments(Coordinate::Dim, (&values, 10), (&rows, 0), 20);
        assert_eq!(shifted.iter().map(|segment| segment.count).collect::<Vec<_>>(), [6, 14]);
    }

    #[test]
    fn axes_that_are_regular_together_are_one() {
        let split = [(Coordinate::Token, 4), (Coordinate::Dim, 2), (Coordinate::Dim, 16)];
        assert_eq!(Strided::dense(0, 1, &split).fused(Coordinate::Dim), [(32, 1)]);
    }
}
