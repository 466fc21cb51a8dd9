//! From what a node says of its cache to a description that can be planned with: the arrangements that have a name.
//!
//! Asked when a control stream opens, of what a peer has said: every number in it may be a lie, and none is computed with
//! before its range is known.

use super::{
    PairPlan, ReshardPlan, ShardedLayout,
    slice_map::{Content, KvDtype, SliceMap, SliceShape},
};
use crate::{KvLayout, TransferError};

/// How a cache laid out as `source` becomes one laid out as `target`, of one rank each; `None` = as it is.
///
/// Takes time in proportion to the pieces that blocks of both sizes cut each other into.
///
/// # Errors
/// [`TransferError::CannotReshard`] or, where the arrangement is none that is known here,
/// [`TransferError::LayoutMismatch`] with the source as "ours"; either names the field.
fn between_nodes(source: &KvLayout, target: &KvLayout) -> Result<Option<PairPlan>, TransferError> {
    let Err(mismatch) = source.compatible_with(target) else { return Ok(None) };
    let described = |layout| {
        ShardedLayout::of(layout).map_err(|Unknown { field, why }| {
            let (from, to) = (source.field(field), target.field(field));
            match from == to {
                true => mismatch.clone(), // what both have in common is not what stands between them
                false => TransferError::CannotReshard { field, from, to, why },
            }
        })
    };
    let plan = ReshardPlan::between(&described(source)?, &described(target)?)?;
    Ok(plan.pairs().first().cloned())
}

/// Block sizes that can all be mapped to each other: powers of two in this range, of tokens with at most
/// [`MAPPED_ELEMENTS`].
const MAPPED_BLOCKS: std::ops::RangeInclusive<u32> = 8..=64;
/// Elements of all keys of a token in a layer. More in the largest of these blocks would need too many copies.
const MAPPED_ELEMENTS: u64 = 16_384;

impl KvLayout {
    /// Equal for layouts of which each can be mapped to each other without a change of value, and for no others: a digest
    /// of all that mapping does not bridge. Of a layout that cannot be mapped at all it is the
    /// [fingerprint](Self::fingerprint).
    pub fn handover_class(&self) -> String {
        self.class(&["format", "block_tokens", "slice_bytes"])
    }

    /// The same for layouts whose servers all convert bf16 to int8 and the reverse (`NodeConfig::convert`), and for no
    /// others. Of a layout of another type it is the [class](Self::handover_class).
    pub fn converting_class(&self) -> String {
        match KvDtype::from_name(&self.dtype) {
            Some(KvDtype::Bf16 | KvDtype::Int8) => {
                self.class(&["format", "block_tokens", "slice_bytes", "dtype"])
            }
            _ => self.handover_class(),
        }
    }

    /// A digest of all but the fields that mapping bridges.
    fn class(&self, bridged: &[&str]) -> String {
        let mapped = ShardedLayout::of(self).is_ok()
            && self.block_tokens.is_power_of_two()
            && MAPPED_BLOCKS.contains(&self.block_tokens)
            && u64::from(self.kv_heads) * u64::from(self.head_dim) <= MAPPED_ELEMENTS;
        if !mapped {
            return self.fingerprint();
        }
        self.digest(|field| !bridged.contains(&field))
    }

    /// How slices of this layout become a receiver's; `None` = they are its as they are.
    pub(crate) fn plan_to(&self, receiver: &KvLayout) -> Result<Option<PairPlan>, TransferError> {
        between_nodes(self, receiver)
    }

    /// How slices of a sender become this layout's; `None` = they are as they are.
    pub(crate) fn plan_from(&self, sender: &KvLayout) -> Result<Option<PairPlan>, TransferError> {
        between_nodes(sender, self).map_err(|error| match error {
            TransferError::LayoutMismatch { field, ours: theirs, theirs: ours } => {
                TransferError::LayoutMismatch { field, ours, theirs }
            }
            other => other,
        })
    }
}

/// What of a layout cannot be planned with.
struct Unknown {
    field: &'static str,
    why: &'static str,
}

impl ShardedLayout {
    /// What a node of one rank says of its cache.
    fn of(layout: &KvLayout) -> Result<Self, Unknown> {
        let unknown = |field, why| Err(Unknown { field, why });
        if layout.tensor_parallel != 1 {
            return unknown(
                "tensor_parallel",
                "only the cache of one rank is mapped on its way, to that of one",
            );
        }
        let Some(dtype) = KvDtype::from_name(&layout.dtype) else {
            return unknown("dtype", "only f32, bf16 and int8 are known here");
        };
        let content = match layout.head_dim.checked_sub(layout.rope_dim) {
            _ if layout.rope_dim == 0 => Content::KeysAndValues { head_dim: layout.head_dim },
            Some(rank) if rank > 0 => Content::Latents { rank, rope: layout.rope_dim },
            _ => return unknown("rope_dim", "the rotated part is less than the whole of a latent"),
        };
        let shape = SliceShape { content, dtype, heads: layout.kv_heads, block_tokens: layout.block_tokens };
        let slice = match (layout.format.as_str(), content) {
            ("cpu-panel-16-columns", Content::KeysAndValues { .. })
            | ("cpu-latent-16", Content::Latents { .. }) => SliceMap::cpu(&shape),
            ("token-major", _) => SliceMap::token_major(&shape),
            _ => return unknown("format", "no arrangement of this name and content is known here"),
        };
        if slice.bytes != layout.slice_bytes {
            return unknown("slice_bytes", "the size does not follow from the other fields");
        }
        Ok(Self {
            model_revision: layout.model_revision.clone(),
            content,
            dtype,
            layers: layout.layers,
            kv_heads: layout.kv_heads,
            block_tokens: layout.block_tokens,
            tensor_parallel: 1,
            slice,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> KvLayout {
        KvLayout {
            model_revision: "r1".into(),
            format: "cpu-panel-16-columns".into(),
            dtype: "bf16".into(),
            block_tokens: 16,
            layers: 30,
            kv_heads: 3,
            head_dim: 64,
            rope_dim: 0,
            tensor_parallel: 1,
            slice_bytes: 2 * 3 * 64 * 16 * 2,
        }
    }

    /// The same with another block size or type, and the size of a slice that follows.
    fn other(change: impl FnOnce(&mut KvLayout)) -> KvLayout {
        let mut layout = layout();
        change(&mut layout);
        let (value, scale) = match layout.dtype.as_str() {
            "int8" => (1, 4),
            "f32" => (4, 0),
            _ => (2, 0),
        };
        let vector = u64::from(layout.head_dim) * value + scale;
        layout.slice_bytes = 2 * u64::from(layout.kv_heads * layout.block_tokens) * vector;
        layout
    }

    #[test]
    fn alike_is_no_plan_and_what_can_be_mapped_is_one() {
        assert_eq!(between_nodes(&layout(), &layout()), Ok(None));
        type Change = fn(&mut KvLayout);
        let changes: [(Change, bool); 4] = [
            (|l| l.block_tokens = 32, false),
            (|l| l.dtype = "int8".into(), true),
            (|l| l.format = "token-major".into(), false),
            (|l| (l.block_tokens, l.dtype) = (48, "int8".into()), true),
        ];
        for (change, converts) in changes {
            for (source, target) in [(layout(), other(change)), (other(change), layout())] {
                let plan = between_nodes(&source, &target).expect("can be mapped").expect("differs");
                assert_eq!((plan.converts(), plan.layers().len()), (converts, 30));
            }
        }
    }

    #[test]
    fn a_class_is_of_those_that_map_to_each_other_without_a_change() {
        let sizes = [8, 16, 32, 64];
        for (dtype, heads, head_dim) in [("bf16", 3, 64), ("f32", 8, 128), ("int8", 2, 80), ("bf16", 64, 256)]
        {
            let shaped = |block_tokens| {
                other(|l| {
                    (l.dtype, l.kv_heads, l.head_dim) = (dtype.into(), heads, head_dim);
                    l.block_tokens = block_tokens;
                })
            };
            let formats = |mut layout: KvLayout| {
                let panels = layout.clone();
                layout.format = "token-major".into();
                [panels, layout]
            };
            let all: Vec<_> = sizes.into_iter().flat_map(|size| formats(shaped(size))).collect();
            for (source, target) in all.iter().flat_map(|one| all.iter().map(move |other| (one, other))) {
                assert_eq!(source.handover_class(), target.handover_class());
                let plan = between_nodes(source, target).expect("can be mapped");
                assert!(plan.is_none_or(|plan| !plan.converts()));
            }
        }
        type Change = fn(&mut KvLayout);
        let changes: [Change; 7] = [
            |l| l.model_revision = "r2".into(),
            |l| l.dtype = "int8".into(),
            |l| l.block_tokens = 48,
            |l| l.block_tokens = 128,
            |l| l.format = "x".into(),
            |l| l.layers = 31,
            |l| l.head_dim = 128,
        ];
        for change in changes {
            assert_ne!(other(change).handover_class(), layout().handover_class());
        }
        let int8 = other(|l| (l.dtype, l.block_tokens) = ("int8".into(), 32));
        assert_eq!(int8.converting_class(), layout().converting_class(), "each converts the other's");
        assert_ne!(layout().converting_class(), layout().handover_class(), "to one that does not convert");
        let f32 = other(|l| l.dtype = "f32".into());
        assert_eq!(f32.converting_class(), f32.handover_class(), "nothing becomes f32");
        let unnamed = KvLayout { format: "x".into(), ..layout() };
        assert_eq!(unnamed.handover_class(), unnamed.fingerprint());
    }

    #[test]
    fn what_cannot_be_mapped_is_named() {
        type Change = fn(&mut KvLayout);
        let changes: [(&str, Change); 11] = [
            ("model_revision", |l| l.model_revision = "r2".into()),
            ("format", |l| l.format = "x".into()),
            ("format", |l| l.format = "cpu-latent-16".into()),
            ("dtype", |l| l.dtype = "f32".into()),
            ("dtype", |l| l.dtype = "fp4".into()),
            ("block_tokens", |l| l.block_tokens = 1009),
            ("layers", |l| l.layers = 31),
            ("kv_heads", |l| l.kv_heads = 4),
            ("head_dim", |l| l.head_dim = 128),
            ("rope_dim", |l| l.rope_dim = 64),
            ("tensor_parallel", |l| l.tensor_parallel = 2),
        ];
        for (field, change) in changes {
            for (source, target) in [(layout(), other(change)), (other(change), layout())] {
                match between_nodes(&source, &target) {
                    Err(TransferError::CannotReshard { field: named, .. }) => assert_eq!(named, field),
                    other => panic!("{field}: {other:?}"),
                }
            }
        }
        let odd = KvLayout { slice_bytes: 1, ..layout() };
        assert!(between_nodes(&layout(), &odd).expect_err("odd").to_string().contains("slice_bytes"));
    }

    #[test]
    fn an_arrangement_that_neither_side_explains_is_not_blamed() {
        let unnamed = |block_tokens| KvLayout { format: "x".into(), block_tokens, ..layout() };
        let error = between_nodes(&unnamed(16), &unnamed(32)).expect_err("unknown");
        assert!(matches!(error, TransferError::LayoutMismatch { field: "block_tokens", .. }), "{error}");
    }

    #[test]
    fn either_side_names_the_field_and_its_own_value_first() {
        let ours = KvLayout { format: "cpu-panel".into(), ..layout() };
        type Change = fn(&mut KvLayout);
        let changes: [(&str, Change); 10] = [
            ("model_revision", |l| l.model_revision = "r2".into()),
            ("format", |l| l.format = "x".into()),
            ("dtype", |l| l.dtype = "f32".into()),
            ("block_tokens", |l| l.block_tokens = 32),
            ("layers", |l| l.layers = 31),
            ("kv_heads", |l| l.kv_heads = 4),
            ("head_dim", |l| l.head_dim = 128),
            ("rope_dim", |l| l.rope_dim = 32),
            ("tensor_parallel", |l| l.tensor_parallel = 2),
            ("slice_bytes", |l| l.slice_bytes = 1),
        ];
        for (name, change) in changes {
            let mut theirs = ours.clone();
            change(&mut theirs);
            for refused in [ours.plan_from(&theirs), ours.plan_to(&theirs)] {
                let refused = refused.expect_err(name);
                assert!(refused.to_string().contains(name), "{refused}");
                if let TransferError::LayoutMismatch { field, ours: own, .. } = refused {
                    assert_eq!(own, ours.field(field));
                }
            }
        }
        assert_eq!((ours.plan_from(&ours), ours.plan_to(&ours)), (Ok(None), Ok(None)));
    }

    #[test]
    fn absurd_numbers_are_refused_without_computing_with_them() {
        type Change = fn(&mut KvLayout);
        let changes: [Change; 6] = [
            |l| l.block_tokens = u32::MAX,
            |l| l.kv_heads = u32::MAX,
            |l| l.head_dim = u32::MAX,
            |l| (l.rope_dim, l.head_dim) = (u32::MAX, u32::MAX),
            |l| l.kv_heads = 0,
            |l| l.head_dim = 0,
        ];
        for change in changes {
            for format in ["cpu-panel-16-columns", "cpu-latent-16", "token-major"] {
                let mut absurd = KvLayout { format: format.into(), ..layout() };
                change(&mut absurd);
                assert!(between_nodes(&absurd, &layout()).is_err());
                assert!(between_nodes(&layout(), &absurd).is_err());
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_a_peer_says_is_planned_or_refused_without_panic(
            format in 0..3_usize,
            dtype in 0..3_usize,
            numbers in proptest::array::uniform4(prop_oneof![4 => 0..100_u32, 1 => any::<u32>()]),
            slice_bytes: u64,
            bent: bool,
        ) {
            let [block_tokens, kv_heads, head_dim, rope_dim] = numbers;
            let mut said = KvLayout { block_tokens, kv_heads, head_dim, rope_dim, slice_bytes, ..layout() };
            said.format = ["cpu-panel-16-columns", "cpu-latent-16", "token-major"][format].into();
            said.dtype = ["f32", "bf16", "int8"][dtype].into();
            if !bent {
                // What a liar would do to get further.
                let shape = |content| SliceShape {
                    content,
                    dtype: KvDtype::from_name(&said.dtype).expect("known"),
                    heads: kv_heads,
                    block_tokens,
                };
                said.slice_bytes = match head_dim.checked_sub(rope_dim) {
                    Some(rank) if rope_dim > 0 => {
                        SliceMap::cpu(&shape(Content::Latents { rank, rope: rope_dim })).bytes
                    }
                    _ => SliceMap::cpu(&shape(Content::KeysAndValues { head_dim })).bytes,
                };
            }
            let _ = (between_nodes(&said, &said), between_nodes(&said, &layout()));
            let like = KvLayout { kv_heads, head_dim, rope_dim, ..layout() };
            let _ = (between_nodes(&said, &like), between_nodes(&like, &said));
        }
    }
}
