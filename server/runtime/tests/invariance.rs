//! What apart == mixed rests on: a sequence's logits are bit for bit the same however its prompt was chunked, whatever
//! shares its batch, with any number of threads, and after its KV slices moved to other blocks of another pool.

mod session;

use std::path::Path;

use baton_runtime::{
    BatchFault, BlockId, Executor, KvContent, KvDtype, LoadOptions, RuntimeError, SequenceChunk,
};
use session::{Session, argmax, blocks, slice, smollm2, tiny, write_slice};

/// Unlike in head sizes (64-wide groups, 20, 12), KV sharing, head norms, experts, latents and weight types.
const MODELS: [&str; 11] = [
    "gguf-q4_1-like-smollm2",
    "hf-f16-ratio3-wide-heads",
    "hf-f32-ratio1-tied",
    "gguf-q4_k-q5_k-q6_k",
    "hf-bf16-qwen3-wide-heads",
    "hf-bf16-qwen3moe-some-dense",
    "gguf-q8_0-qwen3moe",
    "hf-bf16-deepseek2-lite-yarn",
    "hf-f32-deepseek2-groups",
    "hf-f32-deepseek3-halves",
    "gguf-q8_0-deepseek3-split",
];

fn options(threads: usize, kv_dtype: KvDtype) -> LoadOptions {
    LoadOptions { threads, kv_dtype, kv_blocks: 48, max_batch_tokens: 256, ..LoadOptions::default() }
}

fn prompt(executor: &dyn Executor, length: u32, seed: u32) -> Vec<u32> {
    (0..length).map(|i| (i * i * 31 + i * 7 + seed * 101) % executor.shape().vocabulary).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|value| value.to_bits()).collect()
}

/// The reference: the prompt at once, alone, then some greedy tokens.
fn alone(session: &mut Session, prompt: &[u32]) -> (Vec<f32>, Vec<u32>) {
    let blocks = blocks(0..16);
    let logits = session.step(prompt, 0, &blocks);
    let greedy = session.greedy(logits.clone(), prompt.len(), 8, &blocks);
    (logits, greedy)
}

fn chunked_and_batched_is_the_same(model: &Path, kv_dtype: KvDtype, chunks: &[usize]) {
    let mut one = Session::open(model, &options(1, kv_dtype));
    let prompt_a = prompt(one.executor.as_ref(), 107, 1);
    let (want, greedy) = alone(&mut one, &prompt_a);
    for threads in [2, 3] {
        let mut session = Session::open(model, &options(threads, kv_dtype));
        assert_eq!(bits(&alone(&mut session, &prompt_a).0), bits(&want), "{threads} threads");
        for &chunk in chunks {
            let got = in_chunks(&mut session, &prompt_a, chunk);
            assert_eq!(bits(&got), bits(&want), "chunks of {chunk}, {threads} threads, {kv_dtype:?}");
        }
        let (got, output) = in_company(&mut session, &prompt_a);
        assert_eq!(bits(&got), bits(&want), "in a batch, {threads} threads, {kv_dtype:?}");
        assert_eq!(output, greedy[..output.len()], "decoded in a batch");
    }
}

fn in_chunks(session: &mut Session, prompt: &[u32], chunk: usize) -> Vec<f32> {
    let blocks = blocks(20..40);
    let mut last = Vec::new();
    for (index, tokens) in prompt.chunks(chunk).enumerate() {
        last = session.step(tokens, index * chunk, &blocks);
    }
    last
}

/// Prefills a prompt in chunks of 32, decoding another sequence and prefilling a third in the same batches; then
/// decodes all three together.
fn in_company(session: &mut Session, prompt_a: &[u32]) -> (Vec<f32>, Vec<u32>) {
    let (at_a, at_b, at_c) = (blocks(3..15), blocks(16..28), blocks(30..42));
    let prompt_b = prompt(session.executor.as_ref(), 21, 2);
    let prompt_c = prompt(session.executor.as_ref(), 160, 3);
    let mut token_b = argmax(&session.step(&prompt_b, 0, &at_b));
    let (mut length_b, mut length_c) = (21_usize, 0_usize);
    let mut last = Vec::new();
    for (index, tokens) in prompt_a.chunks(32).enumerate() {
        let b = [token_b];
        let batch = [
            SequenceChunk { tokens: &b, start: length_b as u32, blocks: &at_b, logits: true },
            SequenceChunk { tokens, start: index as u32 * 32, blocks: &at_a, logits: true },
            SequenceChunk {
                tokens: &prompt_c[length_c..][..16],
                start: length_c as u32,
                blocks: &at_c,
                logits: false,
            },
        ];
        let logits = session.executor.forward(&batch, &mut |_| {}).unwrap();
        let rows: Vec<&[f32]> = logits.rows().collect();
        (token_b, last) = (argmax(rows[0]), rows[1].to_vec());
        (length_b, length_c) = (length_b + 1, length_c + 16);
    }
    let mut output = vec![argmax(&last)];
    for step in 0..4 {
        let (a, b, c) = ([output[step]], [token_b], [prompt_c[length_c + step]]);
        let batch = [(&c, length_c, &at_c), (&a, prompt_a.len(), &at_a), (&b, length_b, &at_b)].map(
            |(tokens, start, blocks)| SequenceChunk {
                tokens,
                start: (start + step) as u32,
                blocks,
                logits: true,
            },
        );
        let logits = session.executor.forward(&batch, &mut |_| {}).unwrap();
        let rows: Vec<&[f32]> = logits.rows().collect();
        output.push(argmax(rows[1]));
        token_b = argmax(rows[2]);
    }
    (last, output)
}

#[test]
fn tiny_models_do_not_care_how_they_are_batched() {
    for model in MODELS {
        for kv_dtype in KvDtype::ALL {
            chunked_and_batched_is_the_same(&tiny(model), kv_dtype, &[16, 32, 48]);
        }
    }
}

#[test]
fn smollm2_does_not_care_how_it_is_batched() {
    chunked_and_batched_is_the_same(&smollm2(), KvDtype::F32, &[48]);
}

#[test]
fn slices_mean_the_same_in_other_blocks_of_another_pool() {
    for (model, kv_dtype) in MODELS.into_iter().zip(KvDtype::ALL.into_iter().cycle()) {
        let mut prefill = Session::open(&tiny(model), &options(2, kv_dtype));
        let mut decode = Session::open(&tiny(model), &options(1, kv_dtype));
        let (from, to) = (blocks(2..8), [40, 3, 17, 4, 9, 30].map(BlockId));
        let prompt = prompt(prefill.executor.as_ref(), 70, 5);
        let logits = prefill.step(&prompt, 0, &from);
        // What blocks held before must not matter: all bits set is a NaN.
        let layout = decode.executor.kv_pool().layout().clone();
        for layer in 0..layout.layers {
            for block in blocks(0..layout.blocks) {
                write_slice(decode.executor.as_mut(), layer, block, &vec![0xff; layout.slice_bytes()]);
            }
            for (&from, &to) in from.iter().zip(&to).take(5) {
                let bytes = slice(prefill.executor.as_ref(), layer, from).to_vec();
                write_slice(decode.executor.as_mut(), layer, to, &bytes);
            }
        }
        let token = [argmax(&logits)];
        let (here, there) = (prefill.step(&token, 70, &from), decode.step(&token, 70, &to));
        assert_eq!(bits(&here), bits(&there), "{model}");
        let apart = decode.greedy(there, 71, 20, &to);
        assert_eq!(prefill.greedy(here, 71, 20, &from), apart, "{model}");
    }
}

/// Bits of the logits after `prompt`, whose first 64 tokens were left in blocks 0 to 3 by a sequence that was given 37
/// of them and was fed the others one at a time, and of those after the same prompt computed at once.
fn with_and_without_a_prefix(model: &Path, kv_dtype: KvDtype) -> (Vec<u32>, Vec<u32>) {
    let mut session = Session::open(model, &options(2, kv_dtype));
    let prompt = prompt(session.executor.as_ref(), 75, 4);
    session.step(&prompt[..37], 0, &blocks(0..4));
    for position in 37..64 {
        session.step(&prompt[position..=position], position, &blocks(0..4));
    }
    let shared = [blocks(0..4), blocks(30..31)].concat();
    let warm = session.step(&prompt[64..], 64, &shared);
    (bits(&warm), bits(&session.step(&prompt, 0, &blocks(10..15))))
}

#[test]
fn a_prefix_that_another_sequence_decoded_is_as_good_as_one_computed_at_once() {
    for model in MODELS.map(tiny).into_iter().chain([smollm2()]) {
        for kv_dtype in KvDtype::ALL {
            let (warm, cold) = with_and_without_a_prefix(&model, kv_dtype);
            assert_eq!(warm, cold, "{} {kv_dtype:?}", model.display());
        }
    }
}

#[test]
fn a_copied_block_serves_a_fork_and_leaves_the_first_alone() {
    for (model, kv_dtype) in MODELS.into_iter().zip(KvDtype::ALL.into_iter().rev().cycle()) {
        let mut session = Session::open(&tiny(model), &options(2, kv_dtype));
        let prompt = prompt(session.executor.as_ref(), 40, 9);
        let alone: Vec<Vec<u32>> = [3, 5]
            .map(|token| bits(&session.step(&[&prompt[..], &[token]].concat(), 0, &blocks(20..24))))
            .into();
        session.step(&prompt, 0, &blocks(0..3));
        session.executor.copy_blocks(&[(BlockId(2), BlockId(7)), (BlockId(7), BlockId(8))]).unwrap();
        let fork = [BlockId(0), BlockId(1), BlockId(8)];
        assert_eq!(bits(&session.step(&[5], 40, &fork)), alone[1], "{model}: the fork");
        assert_eq!(bits(&session.step(&[3], 40, &blocks(0..3))), alone[0], "{model}: the first");
        let error = session.executor.copy_blocks(&[(BlockId(0), BlockId(48))]).unwrap_err();
        let no_such_block = BatchFault::NoSuchBlock { block: 48, blocks: 48 };
        assert!(matches!(error, RuntimeError::Batch(fault) if fault == no_such_block));
    }
}

#[test]
fn a_layer_is_announced_when_its_slices_are_final() {
    let mut session = Session::open(&tiny(MODELS[0]), &options(2, KvDtype::F32));
    let pool = session.executor.kv_pool().clone();
    let (at, prompt) = (blocks(5..9), prompt(session.executor.as_ref(), 50, 1));
    let read = |layer: u32| -> Vec<Vec<u8>> {
        let bytes = pool.layout().slice_bytes();
        let one = |&block: &BlockId| {
            // SAFETY: a whole slice inside the pool, read where the executor promises that it is written.
            unsafe {
                std::slice::from_raw_parts(pool.base().as_ptr().add(pool.slice_offset(layer, block)), bytes)
            }
        };
        at.iter().map(|block| one(block).to_vec()).collect()
    };
    let mut announced = Vec::new();
    let chunk = SequenceChunk { tokens: &prompt, start: 0, blocks: &at, logits: false };
    let logits =
        session.executor.forward(&[chunk], &mut |layer| announced.push((layer, read(layer)))).unwrap();
    assert_eq!(logits.rows().len(), 0);
    let layers = pool.layout().layers;
    assert_eq!(
        announced.iter().map(|(layer, _)| *layer).collect::<Vec<_>>(),
        (0..layers).collect::<Vec<_>>()
    );
    for (layer, slices) in announced {
        assert_eq!(slices, read(layer));
        assert!(slices.iter().all(|slice| slice.iter().any(|&byte| byte != 0)));
    }
}

#[test]
fn a_refused_batch_leaves_no_trace() {
    let mut session = Session::open(&tiny(MODELS[0]), &options(2, KvDtype::F32));
    let at = blocks(0..2);
    let good = SequenceChunk { tokens: &[1, 2], start: 0, blocks: &at, logits: true };
    let bad = SequenceChunk { tokens: &[1 << 20], start: 0, blocks: &at[1..], logits: true };
    let error = session.executor.forward(&[good, bad], &mut |_| panic!("nothing runs")).unwrap_err();
    assert!(
        matches!(error, RuntimeError::Sequence { sequence: 1, fault: BatchFault::UnknownToken { .. } }),
        "{error}"
    );
    assert!(slice(session.executor.as_ref(), 0, BlockId(0)).iter().all(|&byte| byte == 0));
}

#[test]
fn logits_that_are_not_finite_are_one_sequence_s_alone() {
    let mut session = Session::open(&tiny(MODELS[0]), &options(2, KvDtype::F32));
    let (at, other) = (blocks(0..2), blocks(2..4));
    session.step(&[1, 2, 3], 0, &at);
    session.step(&[1, 2, 3], 0, &other);
    let alone = session.step(&[4], 3, &at);
    let bytes = vec![0xff; session.executor.kv_pool().layout().slice_bytes()];
    write_slice(session.executor.as_mut(), 0, BlockId(2), &bytes);
    let chunk = |blocks| SequenceChunk { tokens: &[4], start: 3, blocks, logits: true };
    for batch in [[chunk(&at), chunk(&other)], [chunk(&other), chunk(&at)]] {
        let logits = session.executor.forward(&batch, &mut |_| {}).unwrap();
        let (broken, whole): (Vec<&[f32]>, Vec<&[f32]>) =
            logits.rows().partition(|row| row.iter().any(|logit| logit.is_nan()));
        assert_eq!((broken.len(), whole.len()), (1, 1));
        assert_eq!(bits(whole[0]), bits(&alone));
    }
}

#[test]
fn loading_reports_its_progress_and_refuses_nonsense() {
    let checkpoint = baton_checkpoint::Checkpoint::open(&tiny(MODELS[0])).unwrap();
    let mut seen = Vec::new();
    let good = options(1, KvDtype::Bf16);
    let executor =
        baton_runtime::load(&checkpoint, &good, &mut |done, total| seen.push((done, total))).unwrap();
    assert!(seen.len() > 3 && seen.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 == pair[1].1));
    assert_eq!(seen.last(), Some(&(checkpoint.weight_bytes(), checkpoint.weight_bytes())));
    assert_eq!(executor.kv_pool().layout(), &baton_runtime::kv_layout(checkpoint.config(), &good));
    let nonsense = [
        LoadOptions { kv_blocks: 0, ..good.clone() },
        LoadOptions { max_batch_tokens: 0, ..good.clone() },
        LoadOptions { threads: 100_000, ..good.clone() },
        LoadOptions { kv_blocks: u32::MAX, ..good },
    ];
    for options in nonsense {
        assert!(baton_runtime::load(&checkpoint, &options, &mut |_, _| {}).is_err(), "{options:?}");
    }
}

#[test]
fn a_latent_is_kept_once_for_all_heads() {
    let session = Session::open(&tiny("hf-bf16-deepseek3-yarn-mtp"), &options(1, KvDtype::Bf16));
    let layout = session.executor.kv_pool().layout();
    assert_eq!(
        (layout.content, layout.kv_heads, layout.head_dim),
        (KvContent::Latents { rope_dim: 8 }, 1, 16 + 8)
    );
    assert_eq!(layout.slice_bytes(), 16 * (16 + 8) * 2);
    let grouped = Session::open(&tiny("hf-bf16-mistral"), &options(1, KvDtype::Bf16));
    let other = grouped.executor.kv_pool().layout();
    assert_eq!((other.content, other.slice_bytes()), (KvContent::KeysAndValues, 2 * 16 * 2 * 16 * 2));
    assert_ne!(layout.format, other.format);
    for (model, values) in [("hf-bf16-deepseek3-yarn-mtp", 16 + 8), ("hf-bf16-mistral", 2 * 2 * 16)] {
        let session = Session::open(&tiny(model), &options(1, KvDtype::Int8));
        let (layout, vectors) =
            (session.executor.kv_pool().layout().clone(), if values == 24 { 2 } else { 4 });
        assert_eq!(
            layout.slice_bytes(),
            16 * (values + vectors * 4),
            "{model}: a byte a value, a scale a vector"
        );
    }
}
