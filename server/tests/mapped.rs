//! Instances that keep their KV caches differently: that the planner's maps describe the real pools, and that one takes
//! over what the other has computed where that is wanted, and refuses clearly where not.

mod support;

use std::{path::PathBuf, sync::Arc};

use baton_checkpoint::{Checkpoint, LayerWeight, Weight};
use baton_kvtransfer::plan::{Content, KvDtype as PlanDtype, SliceMap, SliceShape, quantise};
use baton_proto::{ErrorCode, v1};
use baton_runtime::{BlockId, Executor, KvContent, KvDtype, LoadOptions, SequenceChunk};
use baton_server::{config::HandoffConfig, engine::scheduler::Limits, handoff::kv_layout, role::Role};
use support::{Attached, Instance, Pair, Request, model::Faults, whole};

const TOKENS: usize = 37;

fn checkpoint(name: &str) -> Checkpoint {
    let models = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("runtime/tests/reference/tiny");
    Checkpoint::open(&models.join(name)).expect("a reference model")
}

fn load(checkpoint: &Checkpoint, kv_dtype: KvDtype, kv_blocks: u32) -> Box<dyn Executor> {
    let options =
        LoadOptions { kv_dtype, kv_blocks, max_batch_tokens: 256, threads: 1, ..LoadOptions::default() };
    baton_runtime::load(checkpoint, &options, &mut |_, _| {}).expect("it loads")
}

fn token(position: usize) -> u32 {
    (position as u32 * 31 + 7) % 190
}

/// The first layer's cache of a sequence, read from a real pool by the planner's map of it.
struct FirstLayer {
    executor: Box<dyn Executor>,
    map: SliceMap,
    content: Content,
    blocks: Vec<BlockId>,
}

impl FirstLayer {
    fn of(checkpoint: &Checkpoint, kv_dtype: KvDtype) -> Self {
        let mut executor = load(checkpoint, kv_dtype, 9);
        let pool = executor.kv_pool().layout().clone();
        let content = match pool.content {
            KvContent::KeysAndValues => Content::KeysAndValues { head_dim: pool.head_dim },
            KvContent::Latents { rope_dim } => {
                Content::Latents { rank: pool.head_dim - rope_dim, rope: rope_dim }
            }
        };
        let dtype = match kv_dtype {
            KvDtype::F32 => PlanDtype::F32,
            KvDtype::Bf16 => PlanDtype::Bf16,
            KvDtype::Int8 => PlanDtype::Int8,
        };
        let shape = SliceShape { content, dtype, heads: pool.kv_heads, block_tokens: pool.block_tokens };
        let map = SliceMap::cpu(&shape);
        let layout = kv_layout(&pool, "r");
        assert_eq!(map.bytes, layout.slice_bytes, "{layout:?}");
        let blocks: Vec<BlockId> = [5, 2, 8].map(BlockId).to_vec();
        let tokens: Vec<u32> = (0..TOKENS).map(token).collect();
        let chunk = SequenceChunk { tokens: &tokens, start: 0, blocks: &blocks, logits: true };
        executor.forward(&[chunk], &mut |_| {}).expect("it computes");
        Self { executor, map, content, blocks }
    }

    fn read<const N: usize>(&self, position: usize, offset: u64) -> [u8; N] {
        let pool = self.executor.kv_pool();
        let slice = pool.slice_offset(0, self.blocks[position / pool.layout().block_tokens as usize]);
        assert!(offset as usize + N <= pool.layout().slice_bytes());
        // SAFETY: inside a slice of the pool, as was just checked, and no forward pass is running.
        unsafe { pool.base().as_ptr().add(slice + offset as usize).cast::<[u8; N]>().read_unaligned() }
    }

    /// The elements of a vector, each as it is stored.
    fn vector<const N: usize>(&self, part: usize, head: u32, position: usize) -> Vec<[u8; N]> {
        let token = position as u32 % self.executor.kv_pool().layout().block_tokens;
        let at = |dim| self.map.parts[part].values.offset(head, token, dim);
        (0..self.content.dims()[part]).map(|dim| self.read(position, at(dim))).collect()
    }

    fn floats(&self, part: usize, head: u32, position: usize) -> Vec<f32> {
        self.vector(part, head, position).into_iter().map(f32::from_le_bytes).collect()
    }

    fn scale(&self, part: usize, head: u32, position: usize) -> f32 {
        let token = position as u32 % self.executor.kv_pool().layout().block_tokens;
        let scales = self.map.parts[part].scales.as_ref().expect("int8 has scales");
        f32::from_le_bytes(self.read(position, scales.offset(head, token, 0)))
    }
}

/// The nearest bf16, halves to the even one.
fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes()
}

/// A projection of what a token is before the first layer.
fn projected(checkpoint: &Checkpoint, weight: LayerWeight, token: u32) -> Vec<f32> {
    let tensor = |weight| checkpoint.tensor(weight).expect("there");
    let (embedding, norm) = (tensor(Weight::Embedding), tensor(Weight::Layer(0, LayerWeight::AttentionNorm)));
    let mut hidden = vec![0.0; embedding.columns()];
    embedding.dequantize_row(token as usize, &mut hidden);
    let squares: f32 = hidden.iter().map(|x| x * x).sum();
    let root = (squares / hidden.len() as f32 + checkpoint.config().rms_eps).sqrt();
    let normed: Vec<f32> = hidden.iter().zip(norm.to_f32()).map(|(x, weight)| x / root * weight).collect();
    let rows = tensor(Weight::Layer(0, weight)).to_f32();
    rows.chunks(normed.len()).map(|row| row.iter().zip(&normed).map(|(a, b)| a * b).sum()).collect()
}

fn assert_near(found: &[f32], expected: &[f32], what: &str) {
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * (1.0 + b.abs());
    assert!(
        found.len() == expected.len() && found.iter().zip(expected).all(near),
        "{what}: {found:?} {expected:?}"
    );
}

#[test]
fn the_map_of_keys_and_values_finds_what_the_model_computed() {
    let checkpoint = checkpoint("hf-f32-ratio1-tied");
    let cache = FirstLayer::of(&checkpoint, KvDtype::F32);
    let heads = cache.executor.kv_pool().layout().kv_heads;
    let dim = cache.content.dims()[0] as usize;
    let length = |vector: &[f32]| vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    for position in 0..TOKENS {
        let key = projected(&checkpoint, LayerWeight::Key, token(position));
        let value = projected(&checkpoint, LayerWeight::Value, token(position));
        for head in 0..heads {
            let of_head = head as usize * dim..(head as usize + 1) * dim;
            let what = format!("position {position}, head {head}");
            assert_near(&cache.floats(1, head, position), &value[of_head.clone()], &what);
            let (found, expected) = (cache.floats(0, head, position), &key[of_head]);
            if position == 0 {
                assert_near(&found, expected, &what); // the first is not rotated
            }
            assert_near(&[length(&found)], &[length(expected)], &what);
        }
    }
}

#[test]
fn the_maps_of_all_types_find_the_same_vectors() {
    for name in ["hf-f32-ratio1-tied", "hf-f32-deepseek2-groups"] {
        let checkpoint = checkpoint(name);
        let [exact, half, bytes] =
            [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8].map(|dtype| FirstLayer::of(&checkpoint, dtype));
        for head in 0..exact.executor.kv_pool().layout().kv_heads {
            for (part, position) in (0..TOKENS).flat_map(|position| [(0, position), (1, position)]) {
                let vector = exact.floats(part, head, position);
                assert!(vector.iter().any(|&x| x != 0.0), "nothing was written");
                let what = format!("{name}, part {part}, head {head}, position {position}");
                let rounded: Vec<_> = vector.iter().map(|&x| bf16(x)).collect();
                assert_eq!(half.vector::<2>(part, head, position), rounded, "{what}");
                let mut quants = vec![0; vector.len()];
                let scale = quantise(&vector, &mut quants);
                let found: Vec<i8> =
                    bytes.vector(part, head, position).into_iter().map(i8::from_le_bytes).collect();
                assert_eq!((bytes.scale(part, head, position), found), (scale, quants), "{what}");
            }
        }
    }
}

async fn instance(id: &str, role: Role, kv_dtype: KvDtype, convert: bool) -> Instance {
    let executor = load(&checkpoint("hf-f32-ratio1-tied"), kv_dtype, 100);
    let limits = Limits {
        max_batch_tokens: 256,
        max_sequences: 16,
        max_waiting: 64,
        context_tokens: executor.shape().context_tokens,
        block_tokens: executor.kv_pool().layout().block_tokens,
        prefix_cache: true,
    };
    let handoff = HandoffConfig { convert, ..HandoffConfig::default() };
    Instance::over(id, role, executor, limits, handoff, Arc::new(Faults::default())).await
}

fn request(length: usize) -> Request {
    Request {
        prompt: (0..length).map(|position| token(position + length)).collect(),
        ..Request::greedy(1, 8)
    }
}

async fn pair(dtypes: (KvDtype, KvDtype), convert: bool) -> Pair {
    let prefill = instance("p", Role::Prefill, dtypes.0, false).await;
    let decode = instance("d", Role::Decode, dtypes.1, convert).await;
    let (to_prefill, to_decode) = (Attached::to(&prefill).await, Attached::to(&decode).await);
    Pair { prefill, decode, to_prefill, to_decode }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_is_converted_where_decode_is_set_to() {
    for dtypes in [(KvDtype::Bf16, KvDtype::Int8), (KvDtype::Int8, KvDtype::Bf16)] {
        let mut pair = pair(dtypes, true).await;
        let mixed = instance("m", Role::Mixed, dtypes.0, false).await;
        let mut alone = Attached::to(&mixed).await;
        let lengths = [1, 15, 16, 33, 60];
        // The second time decode holds the prompts' whole blocks: what is converted is not written again.
        for round in [0, 10] {
            for (leg, length) in (round + 1..).zip(lengths) {
                pair.dispatch(leg, &request(length)).await;
            }
            for (leg, length) in (round + 1..).zip(lengths) {
                let tokens = pair.completion(leg).await;
                alone.dispatch(leg, &request(length), whole()).await;
                assert_eq!(tokens.len(), 8, "{dtypes:?}, {length} tokens");
                assert_eq!(tokens[0], alone.until_end(leg).await.tokens[0], "the first is prefill's");
            }
            pair.until_idle().await;
        }
        assert_eq!(pair.decode.metric("baton_server_transfers_in_total"), 10.0);
        assert_eq!(pair.decode.metric("baton_server_prefill_tokens_total"), 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_is_not_converted_where_decode_is_not_set_to() {
    let mut pair = pair((KvDtype::Bf16, KvDtype::Int8), false).await;
    pair.dispatch(1, &request(33)).await;
    let refused = pair.to_prefill.until_end(1).await;
    assert_eq!(refused.failed(), ErrorCode::Unsupported);
    let Some(v1::leg_output::End::Failed(error)) = refused.end else { panic!("it failed") };
    assert!(error.message.contains("dtype bf16") && error.message.contains("handoff.convert"), "{error:?}");
    // As a coordinator does: nothing was ever offered.
    pair.to_decode.cancel(1).await;
    pair.to_decode.until_end(1).await;
    pair.until_idle().await;
}
