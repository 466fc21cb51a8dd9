//! Plans that can be told in advance, and refusals.

use super::{
    case::{Case, Side},
    naive::Arrangement,
    *,
};

/// SmolLM-like: enough heads to be split, 16 tokens in a block, kept as the CPU does.
fn case(kv_heads: u32, ranks: (u32, u32)) -> Case {
    let side = |ranks| Side { arrangement: Arrangement::Cpu, dtype: KvDtype::Bf16, block_tokens: 16, ranks };
    let (from, to) = (side(ranks.0), side(ranks.1));
    Case { content: Content::KeysAndValues { head_dim: 40 }, layers: 3, kv_heads, tokens: 40, from, to }
}

fn latents(ranks: (u32, u32)) -> Case {
    Case { content: Content::Latents { rank: 48, rope: 16 }, kv_heads: 1, ..case(1, ranks) }
}

fn plan(case: &Case) -> ReshardPlan {
    ReshardPlan::between(&case.layout(&case.source()), &case.layout(&case.target())).expect("can be mapped")
}

#[test]
fn like_and_like_move_slice_by_slice() {
    for arrangement in [Arrangement::Cpu, Arrangement::TokenMajor, Arrangement::Interleaved] {
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            for ranks in [1, 2, 4, 8] {
                for mut case in [case(4, (ranks, ranks)), latents((ranks, ranks))] {
                    (case.from.arrangement, case.to.arrangement) = (arrangement, arrangement);
                    (case.from.dtype, case.to.dtype) = (dtype, dtype);
                    let (plan, bytes) = (plan(&case), case.source().slice_bytes() as u64);
                    let pairs: Vec<_> =
                        plan.pairs().iter().map(|pair| (pair.sender(), pair.receiver())).collect();
                    assert_eq!(pairs, (0..ranks).map(|rank| (rank, rank)).collect::<Vec<_>>());
                    for pair in plan.pairs() {
                        let whole = Action::Copy { source_offset: 0, target_offset: 0, bytes };
                        let slices = (0..3).flat_map(|layer| (0..3).map(move |block| (layer, block)));
                        let expected = slices.map(|(layer, block)| Descriptor {
                            layer,
                            source_block: block,
                            target_block: block,
                            action: whole,
                        });
                        assert!(pair.expand().all(40).eq(expected), "{arrangement:?} {dtype:?} {ranks}");
                    }
                }
            }
        }
    }
}

#[test]
fn heads_that_stand_together_move_together() {
    let case = case(8, (4, 2));
    let plan = plan(&case);
    let pairs: Vec<_> = plan.pairs().iter().map(|p| (p.sender(), p.receiver(), p.heads())).collect();
    assert_eq!(pairs, [(0, 0, 0..2), (1, 0, 2..4), (2, 1, 4..6), (3, 1, 6..8)]);
    let actions: Vec<_> =
        plan.pairs()[1].expand().of_blocks(0, 0..1, 40).map(|descriptor| descriptor.action).collect();
    let (key, value) = (40 * 16 * 2, 48 * 16 * 2);
    let keys = Action::Copy { source_offset: 0, target_offset: 2 * key, bytes: 2 * key };
    let values =
        Action::Copy { source_offset: 2 * key, target_offset: 4 * key + 2 * value, bytes: 2 * value };
    assert_eq!(actions, [keys, values]);
}

#[test]
fn smaller_blocks_fill_larger_ones() {
    let mut case = latents((1, 1));
    (case.from.arrangement, case.to.arrangement) = (Arrangement::TokenMajor, Arrangement::TokenMajor);
    (case.to.block_tokens, case.tokens) = (128, 145);
    let plan = plan(&case);
    let blocks: Vec<_> = plan.pairs()[0]
        .expand()
        .of_blocks(2, 0..u32::MAX, case.tokens)
        .map(|descriptor| (descriptor.source_block, descriptor.target_block, descriptor.action))
        .collect();
    let bytes = 16 * 64 * 2;
    let expected = (0..10).map(|block| {
        let target_offset = u64::from(block) % 8 * bytes;
        (block, block / 8, Action::Copy { source_offset: 0, target_offset, bytes })
    });
    assert!(blocks.iter().copied().eq(expected), "{blocks:?}");
}

#[test]
fn replicas_share_the_layers_of_a_lone_receiver() {
    let case = Case { layers: 30, ..latents((8, 1)) };
    let plan = plan(&case);
    let layers: Vec<usize> = plan.pairs().iter().map(|pair| pair.layers().len()).collect();
    assert_eq!((layers.len(), layers.iter().sum::<usize>()), (8, 30));
    assert!(layers.iter().all(|count| (3..=4).contains(count)), "{layers:?}");
    assert_eq!(plan.for_receiver(0).count(), 8);
    assert_eq!(plan.for_sender(3).count(), 1);
}

#[test]
fn a_template_does_not_grow_with_the_sequence() {
    let case = Case { layers: 30, ..case(8, (4, 2)) };
    let plan = plan(&case);
    let expansion = plan.pairs()[0].expand();
    let slices = |tokens| expansion.all(tokens).count();
    assert_eq!((slices(16), slices(512 * 16)), (30 * 2, 30 * 512 * 2));
}

type Change = fn(&mut ShardedLayout);

#[test]
fn what_cannot_be_mapped_is_refused_by_field() {
    let case = case(8, (4, 2));
    let source = case.layout(&case.source());
    let changes: [(&str, Change); 9] = [
        ("model_revision", |l| l.model_revision = "r2".into()),
        ("layers", |l| l.layers = 31),
        ("head_dim", |l| reshape(l, |s| s.content = Content::KeysAndValues { head_dim: 64 })),
        ("kv_heads", |l| {
            l.kv_heads = 16;
            reshape(l, |s| s.heads = 8);
        }),
        ("dtype", |l| reshape(l, |s| s.dtype = KvDtype::F32)),
        ("content", |l| {
            l.kv_heads = 1;
            reshape(l, |s| (s.content, s.heads) = (Content::Latents { rank: 20, rope: 20 }, 1));
        }),
        ("block_tokens", |l| reshape(l, |s| s.block_tokens = 509)),
        ("tensor_parallel", |l| l.tensor_parallel = 3),
        ("layers", |l| l.layers = 0),
    ];
    for (field, change) in changes {
        let mut target = case.layout(&case.target());
        change(&mut target);
        let error = ReshardPlan::between(&source, &target).expect_err(field);
        assert!(error.to_string().contains(field), "{field}: {error}");
        if let TransferError::CannotReshard { field: named, .. } = error {
            assert_eq!(named, field);
        }
        assert!(ReshardPlan::between(&target, &source).is_err(), "{field}, the other way");
    }
}

#[test]
fn millions_of_copies_a_block_are_refused() {
    let mut case = case(4, (1, 1));
    case.to.arrangement = Arrangement::TokenMajor;
    for (block_tokens, mapped) in [(16, true), (32 << 10, false)] {
        (case.from.block_tokens, case.to.block_tokens) = (block_tokens, block_tokens);
        let plan = ReshardPlan::between(&case.layout(&case.source()), &case.layout(&case.target()));
        assert_eq!(plan.is_ok(), mapped, "{block_tokens} tokens in a block");
    }
}

/// Describes the slice anew after a change of its shape.
fn reshape(layout: &mut ShardedLayout, change: fn(&mut SliceShape)) {
    let (content, dtype, block_tokens) = (layout.content, layout.dtype, layout.block_tokens);
    let mut shape = SliceShape { content, dtype, heads: 4, block_tokens };
    change(&mut shape);
    (layout.content, layout.dtype, layout.block_tokens) = (shape.content, shape.dtype, shape.block_tokens);
    layout.slice = SliceMap::cpu(&shape);
}

#[test]
fn heads_and_ranks_that_do_not_go_together_are_refused() {
    for (heads, ranks) in [(3, 2), (8, 3), (2, 3), (6, 4), (0, 1), (1, 0)] {
        let error = heads_per_rank(heads, ranks).expect_err("cannot be placed").to_string();
        assert!(error.contains("tensor_parallel") && error.contains("kv_heads"), "{error}");
    }
    assert_eq!(
        [(8, 2), (8, 8), (2, 8), (1, 5)].map(|(h, r)| heads_per_rank(h, r).ok()),
        [4, 1, 1, 1].map(Some)
    );
}

#[test]
fn slices_that_do_not_hold_together_are_refused() {
    let changes: [Change; 11] = [
        |l| l.slice.bytes -= 1,
        |l| l.slice.bytes = 0,
        |l| l.slice.bytes = u64::MAX,
        |l| l.slice.parts[0].values.start = u64::MAX,
        |l| l.slice.parts[1].values.start = 0,
        |l| l.slice.parts[1].values.start -= 2,
        |l| l.slice.parts[0].values.axes[1].stride = 2,
        |l| l.slice.parts[0].values.axes[0].extent = 0,
        |l| l.slice.parts[0].values.axes.clear(),
        |l| l.slice.parts[0].scales = Some(l.slice.parts[0].values.clone()),
        |l| l.dtype = KvDtype::Int8,
    ];
    let case = case(4, (2, 2));
    for (index, change) in changes.into_iter().enumerate() {
        let mut layout = case.layout(&case.source());
        assert_eq!(layout.validate(), Ok(()));
        change(&mut layout);
        assert!(matches!(layout.validate(), Err(TransferError::Invalid(_))), "change {index}");
    }
    let (content, huge) = (Content::KeysAndValues { head_dim: u32::MAX }, u32::MAX);
    for make in [SliceMap::cpu, SliceMap::token_major] {
        let slice = make(&SliceShape { content, dtype: KvDtype::Int8, heads: huge, block_tokens: huge });
        let layout = ShardedLayout {
            content,
            dtype: KvDtype::Int8,
            kv_heads: huge,
            block_tokens: huge,
            slice,
            ..case.layout(&case.source())
        };
        assert!(ShardedLayout { tensor_parallel: 1, ..layout }.validate().is_err());
    }
}

#[test]
fn descriptors_that_name_nothing_are_refused() {
    let case = case(4, (1, 1));
    let plan = plan(&case);
    let slice = case.source().slice_bytes();
    let (from, mut to) = (vec![0; 3 * 2 * slice], vec![0; 3 * 2 * slice]);
    let whole = Descriptor {
        layer: 2,
        source_block: 0,
        target_block: 1,
        action: Action::Copy { source_offset: 0, target_offset: 0, bytes: slice as u64 },
    };
    let mut run = |descriptor| {
        let source = PoolBytes { bytes: &from[..], blocks: 2, table: &[0, 1, 2] };
        let mut target = PoolBytes { bytes: &mut to[..], blocks: 2, table: &[0, 1, 2] };
        plan.pairs()[0].apply([descriptor], &source, &mut target)
    };
    assert_eq!(run(whole), Ok(()));
    let copy = |source_offset, target_offset, bytes| Action::Copy { source_offset, target_offset, bytes };
    let vectors = VectorRun {
        part: 0,
        source_head: 0,
        target_head: 0,
        heads: 1,
        source_token: 0,
        target_token: 0,
        tokens: 1,
    };
    for bad in [
        Descriptor { layer: 3, ..whole },
        Descriptor { layer: u32::MAX, ..whole },
        Descriptor { source_block: 2, ..whole },
        Descriptor { target_block: 3, ..whole },
        Descriptor { action: copy(1, 0, slice as u64), ..whole },
        Descriptor { action: copy(0, 1, slice as u64), ..whole },
        Descriptor { action: copy(u64::MAX, 0, 2), ..whole },
        Descriptor { action: Action::Convert(vectors), ..whole },
    ] {
        assert!(matches!(run(bad), Err(TransferError::Invalid(_))), "{bad:?}");
    }
}
