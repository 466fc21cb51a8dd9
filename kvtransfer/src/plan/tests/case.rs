//! Two caches of one model and a sequence that moves between them, and how such cases are drawn.

use proptest::{prelude::*, sample::select};

use super::{
    Axis, Content, Coordinate, KvDtype, Naive, PartMap, ShardedLayout, SliceMap, SliceShape, Strided,
    heads_per_rank, naive::Arrangement,
};

/// What one side may choose.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side {
    pub(super) arrangement: Arrangement,
    pub(super) dtype: KvDtype,
    pub(super) block_tokens: u32,
    pub(super) ranks: u32,
}

#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) content: Content,
    pub(super) layers: u32,
    pub(super) kv_heads: u32,
    pub(super) tokens: u32,
    pub(super) from: Side,
    pub(super) to: Side,
}

impl Case {
    pub(super) fn source(&self) -> Naive {
        self.side(self.from)
    }

    pub(super) fn target(&self) -> Naive {
        self.side(self.to)
    }

    fn side(&self, side: Side) -> Naive {
        let Side { arrangement, dtype, block_tokens, ranks } = side;
        let heads = heads_per_rank(self.kv_heads, ranks).expect("heads can be placed");
        Naive { arrangement, content: self.content, dtype, block_tokens, ranks, heads }
    }

    /// A side as the planner is told of it.
    pub(super) fn layout(&self, side: &Naive) -> ShardedLayout {
        let Naive { content, dtype, block_tokens, ranks, heads, .. } = *side;
        let shape = SliceShape { content, dtype, heads, block_tokens };
        ShardedLayout {
            model_revision: "r1".into(),
            content,
            dtype,
            layers: self.layers,
            kv_heads: self.kv_heads,
            block_tokens,
            tensor_parallel: ranks,
            slice: match side.arrangement {
                Arrangement::Cpu => SliceMap::cpu(&shape),
                Arrangement::TokenMajor => SliceMap::token_major(&shape),
                Arrangement::Interleaved => interleaved(&shape),
            },
        }
    }
}

/// An arrangement that the planner does not know, told stride by stride.
fn interleaved(shape: &SliceShape) -> SliceMap {
    let ([first, second], unit) = (shape.content.dims(), shape.dtype.bytes());
    let scale = if shape.dtype == KvDtype::Int8 { 4 } else { 0 };
    let record = u64::from(first + second) * unit + 2 * scale;
    let outer = [
        Axis {
            along: Coordinate::Token,
            extent: shape.block_tokens,
            stride: record * u64::from(shape.heads),
        },
        Axis { along: Coordinate::Head, extent: shape.heads, stride: record },
    ];
    let part = |start: u64, dim: u32| PartMap {
        values: Strided {
            start,
            axes: [&outer[..], &[Axis { along: Coordinate::Dim, extent: dim, stride: unit }]].concat(),
        },
        scales: (scale > 0).then(|| Strided { start: start + u64::from(dim) * unit, axes: outer.to_vec() }),
    };
    let parts = [part(0, first), part(u64::from(first) * unit + scale, second)];
    SliceMap { parts, bytes: record * u64::from(shape.block_tokens * shape.heads) }
}

fn side(kv_heads: u32, dtype: KvDtype) -> impl Strategy<Value = Side> {
    let ranks: Vec<u32> = (1..=8).filter(|&ranks| heads_per_rank(kv_heads, ranks).is_ok()).collect();
    let arrangements = vec![Arrangement::Cpu, Arrangement::TokenMajor, Arrangement::Interleaved];
    let blocks = vec![4, 5, 7, 8, 16, 16, 32, 48, 64, 128];
    (select(arrangements), select(blocks), select(ranks))
        .prop_map(move |(arrangement, block_tokens, ranks)| Side { arrangement, dtype, block_tokens, ranks })
}

/// Cases of every kind that can be mapped, half of them with one arrangement and one block size on both sides.
pub(super) fn any() -> impl Strategy<Value = Case> {
    let dims = || select(vec![4_u32, 12, 16, 20, 40, 48]);
    let heads =
        (1_u32..=16, dims()).prop_map(|(heads, head_dim)| (heads, Content::KeysAndValues { head_dim }));
    let latents = (dims(), dims()).prop_map(|(rank, rope)| (1, Content::Latents { rank, rope }));
    let dtypes = select(vec![
        (KvDtype::F32, KvDtype::F32),
        (KvDtype::Bf16, KvDtype::Bf16),
        (KvDtype::Int8, KvDtype::Int8),
        (KvDtype::Bf16, KvDtype::Int8),
        (KvDtype::Int8, KvDtype::Bf16),
    ]);
    (prop_oneof![3 => heads, 1 => latents], dtypes).prop_flat_map(|((kv_heads, content), (from, to))| {
        let sides = (side(kv_heads, from), side(kv_heads, to), any_bool(), any_bool());
        (1_u32..=4, 1_u32..=140, sides).prop_map(move |(layers, tokens, (from, mut to, arranged, sized))| {
            if arranged {
                to.arrangement = from.arrangement;
            }
            if sized {
                to.block_tokens = from.block_tokens;
            }
            Case { content, layers, kv_heads, tokens, from, to }
        })
    })
}

fn any_bool() -> impl Strategy<Value = bool> {
    proptest::bool::ANY
}
