//! What a slice (one block of one layer, on one rank) is made of, and where each value and scale of it lies.
//!
//! The arrangements that pools have today can be made here; any other is described by filling in a [`SliceMap`]. The
//! planner asks nothing else of a device.

use super::strided::{Axis, Coordinate, Strided};
use crate::TransferError;

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    Bf16,
    /// Multiples of an f32 scale; each part of every token has one for each KV head.
    Int8,
}

impl KvDtype {
    /// Of a value.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::Int8].into_iter().find(|dtype| dtype.name() == name)
    }
}

/// Bytes of a scale, an f32.
pub(super) const SCALE_BYTES: u64 = 4;

/// What is kept of a token. Both kinds have two parts, and a part of one token and KV head is a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A key and a value for each KV head.
    KeysAndValues { head_dim: u32 },
    /// One latent and its rotated part, for all heads together (multi-head latent attention).
    Latents { rank: u32, rope: u32 },
}

impl Content {
    /// Elements of a vector of each part.
    pub fn dims(self) -> [u32; 2] {
        match self {
            Self::KeysAndValues { head_dim } => [head_dim, head_dim],
            Self::Latents { rank, rope } => [rank, rope],
        }
    }
}

/// What the arrangements made here are computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceShape {
    pub content: Content,
    pub dtype: KvDtype,
    /// KV heads of one rank ([`heads_per_rank`](super::heads_per_rank)); 1 for latents.
    pub heads: u32,
    pub block_tokens: u32,
}

/// Where one part of a slice lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartMap {
    /// All coordinates. Along `Dim` there may be more room than elements; what fills a vector up means nothing.
    pub values: Strided,
    /// `Head` and `Token`; there for int8 and for nothing else.
    pub scales: Option<Strided>,
}

/// The arrangement of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceMap {
    /// Key and value, or latent and rotated part.
    pub parts: [PartMap; 2],
    pub bytes: u64,
}

impl SliceMap {
    /// A slice may be this large at most, as in [`KvLayout`](crate::KvLayout).
    const MAX_BYTES: u64 = 1 << 30;

    /// The CPU device's slices, as `server/runtime/src/devices/cpu` keeps them with 16 tokens in a block.
    ///
    /// Keys and values (`attention.rs`, format `cpu-panel-16-columns`): keys `[head][dim][token]`, then values
    /// `[head][dim / 16][token][16]`, filled up to whole columns. Latents (`latent.rs`, format `cpu-latent-16`):
    /// `[dim][token]`, the rotated part after the latent. Then the scales of the one part and of the other, both
    /// `[head][token]`.
    pub fn cpu(shape: &SliceShape) -> Self {
        let (heads, tokens) = ((Coordinate::Head, shape.heads), (Coordinate::Token, shape.block_tokens));
        let rows = |dim: u32| vec![heads, (Coordinate::Dim, dim), tokens];
        let columns =
            |dim: u32| vec![heads, (Coordinate::Dim, dim.div_ceil(16)), tokens, (Coordinate::Dim, 16)];
        match shape.content {
            Content::KeysAndValues { head_dim } => {
                Self::part_after_part(shape, [rows(head_dim), columns(head_dim)], &[heads, tokens])
            }
            Content::Latents { rank, rope } => {
                Self::part_after_part(shape, [rows(rank), rows(rope)], &[heads, tokens])
            }
        }
    }

    /// Slices as NPUs and GPUs keep them: keys `[token][head][dim]`, then values alike; latents
    /// `[token][latent, rotated part]`. Then the scales of the one part and of the other, both `[token][head]`.
    pub fn token_major(shape: &SliceShape) -> Self {
        let (heads, tokens) = ((Coordinate::Head, shape.heads), (Coordinate::Token, shape.block_tokens));
        let nests = shape.content.dims().map(|dim| vec![tokens, heads, (Coordinate::Dim, dim)]);
        let mut map = Self::part_after_part(shape, nests, &[tokens, heads]);
        if let Content::Latents { rank, rope } = shape.content {
            let unit = shape.dtype.bytes();
            let width = (u64::from(rank) + u64::from(rope)).saturating_mul(unit);
            for (part, (start, dim)) in map.parts.iter_mut().zip([(0, rank), (u64::from(rank) * unit, rope)])
            {
                part.values = Strided {
                    start,
                    axes: vec![
                        Axis { along: Coordinate::Token, extent: shape.block_tokens, stride: width },
                        Axis { along: Coordinate::Dim, extent: dim, stride: unit },
                    ],
                };
            }
        }
        map
    }

    fn part_after_part(
        shape: &SliceShape,
        nests: [Vec<(Coordinate, u32)>; 2],
        scales: &[(Coordinate, u32)],
    ) -> Self {
        let mut bytes = 0_u64;
        let mut next = |unit: u64, nest: &[(Coordinate, u32)]| {
            let strided = Strided::dense(bytes, unit, nest);
            bytes = bytes.saturating_add(strided.span(unit));
            strided
        };
        let [first, second] = nests.map(|nest| next(shape.dtype.bytes(), &nest));
        let mut scales = || (shape.dtype == KvDtype::Int8).then(|| next(SCALE_BYTES, scales));
        let [first_scales, second_scales] = [scales(), scales()];
        let parts = [
            PartMap { values: first, scales: first_scales },
            PartMap { values: second, scales: second_scales },
        ];
        Self { parts, bytes }
    }

    /// Checks that all of `shape` has a place of its own within the slice. Arrangements whose axes do not nest, so that
    /// it cannot be told whether places are shared, are refused, too.
    pub(super) fn validate(&self, shape: &SliceShape) -> Result<(), TransferError> {
        let bad = |what: String| Err(TransferError::Invalid(format!("KV slice: {what}")));
        if self.bytes == 0 || self.bytes > Self::MAX_BYTES {
            return bad(format!("bytes is {} and must be 1 byte to 1 GiB", self.bytes));
        }
        let mut all: Vec<(&Strided, u64)> = Vec::with_capacity(4);
        for (part, dim) in self.parts.iter().zip(shape.content.dims()) {
            if part.scales.is_some() != (shape.dtype == KvDtype::Int8) {
                return bad(format!(
                    "scales do not go with {}: int8 has them, others do not",
                    shape.dtype.name()
                ));
            }
            let scales = part.scales.iter().map(|scales| (scales, SCALE_BYTES));
            for (places, unit) in std::iter::once((&part.values, shape.dtype.bytes())).chain(scales) {
                let [heads, tokens, dims] =
                    [Coordinate::Head, Coordinate::Token, Coordinate::Dim].map(|along| places.extent(along));
                if heads != u64::from(shape.heads) || tokens != u64::from(shape.block_tokens) {
                    let (has, wanted) = ((heads, tokens), (shape.heads, shape.block_tokens));
                    return bad(format!("axes count (heads, tokens) {has:?}, the layout {wanted:?}"));
                }
                let scale = unit == SCALE_BYTES && shape.dtype == KvDtype::Int8;
                if (scale && dims != 1) || (!scale && dims < u64::from(dim)) {
                    return bad(format!(
                        "axes count {dims} elements of a vector of {dim}, or of its one scale"
                    ));
                }
                if places.start.saturating_add(places.span(unit)) > self.bytes {
                    return bad(format!("its parts reach beyond its {} bytes", self.bytes));
                }
                if !nested(places.axes.iter(), unit) {
                    return bad("its axes overlap".to_owned());
                }
                all.push((places, unit));
            }
        }
        let pairs = || all.iter().enumerate().flat_map(|(i, one)| all[..i].iter().map(move |two| (one, two)));
        if pairs().any(|(one, two)| !apart(*one, *two)) {
            return bad("its parts overlap".to_owned());
        }
        Ok(())
    }
}

/// Whether each axis steps over all that the axes within it reach.
fn nested<'a>(axes: impl Iterator<Item = &'a Axis>, unit: u64) -> bool {
    let mut axes: Vec<&Axis> = axes.filter(|axis| axis.extent > 1).collect();
    axes.sort_by_key(|axis| axis.stride);
    let mut reach = unit;
    axes.into_iter().all(|axis| {
        let clear = axis.stride >= reach;
        reach = reach.saturating_add(axis.stride.saturating_mul(u64::from(axis.extent) - 1));
        clear
    })
}

/// Whether two parts share no byte: one lies after the other, as a whole or within each step of outer axes that both
/// have.
fn apart(one: (&Strided, u64), two: (&Strided, u64)) -> bool {
    let by_stride = |places: &Strided| {
        let mut axes: Vec<Axis> = places.axes.iter().filter(|axis| axis.extent > 1).copied().collect();
        axes.sort_by_key(|axis| std::cmp::Reverse(axis.stride));
        axes
    };
    let (axes, others) = (by_stride(one.0), by_stride(two.0));
    let same = |(a, b): &(&Axis, &Axis)| (a.extent, a.stride) == (b.extent, b.stride);
    let shared = axes.iter().zip(&others).take_while(same).count();
    (0..=shared).any(|outer| {
        let reach = |start: u64, axes: &[Axis], unit| {
            let inner = Strided { start, axes: axes[outer..].to_vec() };
            start..start.saturating_add(inner.span(unit))
        };
        let (a, b) = (reach(one.0.start, &axes, one.1), reach(two.0.start, &others, two.1));
        let both = a.end.max(b.end) - a.start.min(b.start);
        (a.end <= b.start || b.end <= a.start) && nested(axes[..outer].iter(), both)
    })
}
