//! The runtime against Hugging Face transformers: logits within a bound, greedy tokens equal, for every tiny reference
//! model and for SmolLM2. What the reference files hold stands in reference/README.md.

mod session;

use std::{fs, path::Path};

use baton_runtime::{KvDtype, LoadOptions};
use serde::Deserialize;
use session::{Session, argmax, blocks, smollm2, tiny};

/// Largest difference of a logit with an f32 KV cache: only the order of f32 sums separates us from the reference.
const F32_BOUND: f32 = 2e-4;
/// With a bf16 cache K and V are rounded to 8 bits: 0.4% each.
const BF16_BOUND: f32 = 0.1;
/// SmolLM2 sums over 30 layers, and its logits are about 20.
const SMOLLM2_F32_BOUND: f32 = 2e-3;

#[derive(Deserialize)]
struct Tiny {
    prompt: Vec<u32>,
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Smollm2 {
    vocabulary: usize,
    indices: Vec<usize>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    prompt: Vec<u32>,
    logits: Vec<f32>,
    top: Vec<u32>,
    top_logits: Vec<f32>,
    logsumexp: f64,
    greedy: Vec<u32>,
}

fn reference(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn options(kv_dtype: KvDtype) -> LoadOptions {
    LoadOptions { threads: 2, kv_dtype, kv_blocks: 64, max_batch_tokens: 1024, ..LoadOptions::default() }
}

fn difference(got: impl IntoIterator<Item = f32>, want: &[f32]) -> f32 {
    let pairs = got.into_iter().zip(want);
    pairs.map(|(got, want)| (got - want).abs()).fold(0.0, |largest, d| if d <= largest { largest } else { d })
}

fn check_tiny(name: &str) {
    let expected: Tiny = serde_json::from_str(&reference(&format!("tiny/{name}/expected.json"))).unwrap();
    let blocks = blocks(0..4);
    let length = expected.prompt.len();
    for (kv_dtype, bound) in [(KvDtype::F32, F32_BOUND), (KvDtype::Bf16, BF16_BOUND)] {
        let mut session = Session::open(&tiny(name), &options(kv_dtype));
        let mut last = Vec::new();
        for (index, want) in expected.logits.iter().enumerate() {
            // Once as a prompt of its own, once token by token.
            let prefilled = session.step(&expected.prompt[..=index], 0, &blocks);
            last = session.step(&expected.prompt[index..=index], index, &blocks);
            assert_eq!(prefilled.len(), want.len(), "{name}: vocabulary");
            for logits in [prefilled, last.clone()] {
                let difference = difference(logits, want);
                assert!(
                    difference <= bound,
                    "{name}, {kv_dtype:?}: a logit after token {index} is {difference} off"
                );
            }
        }
        if kv_dtype == KvDtype::F32 {
            let greedy = session.greedy(last, length, expected.greedy.len(), &blocks);
            assert_eq!(greedy, expected.greedy, "{name}: greedy tokens");
        }
    }
}

macro_rules! tiny_models {
    ($($test:ident = $name:literal;)*) => {
        $(
            #[test]
            fn $test() {
                check_tiny($name);
            }
        )*

        #[test]
        fn no_tiny_model_is_forgotten() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny");
            for entry in fs::read_dir(directory).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!([$($name),*].contains(&name.as_str()), "no test for {name}");
            }
        }
    };
}

tiny_models! {
    gguf_f16_tied = "gguf-f16-tied";
    gguf_f32 = "gguf-f32";
    gguf_q4_0 = "gguf-q4_0";
    gguf_q4_1_like_smollm2 = "gguf-q4_1-like-smollm2";
    gguf_k_quants = "gguf-q4_k-q5_k-q6_k";
    gguf_q5 = "gguf-q5_0-q5_1";
    gguf_q8_0_bias = "gguf-q8_0-bias";
    gguf_q8_0_llama3_divisors = "gguf-q8_0-llama3-divisors";
    bf16_ratio_4_llama3 = "hf-bf16-ratio4-llama3";
    bf16_sharded_yarn = "hf-bf16-sharded-yarn";
    f16_ratio_3_wide_heads = "hf-f16-ratio3-wide-heads";
    f32_bias_linear = "hf-f32-bias-linear";
    f32_ratio_1_tied = "hf-f32-ratio1-tied";
}

#[test]
fn smollm2_gives_the_same_logits_and_tokens() {
    let expected: Smollm2 = serde_json::from_str(&reference("smollm2.json")).unwrap();
    let blocks = blocks(0..64);
    let mut session = Session::open(&smollm2(), &options(KvDtype::F32));
    for case in &expected.cases {
        let name = &case.name;
        let logits = session.step(&case.prompt, 0, &blocks);
        assert_eq!(logits.len(), expected.vocabulary);
        let sampled = difference(expected.indices.iter().map(|&i| logits[i]), &case.logits);
        assert!(sampled <= SMOLLM2_F32_BOUND, "{name}: a logit is {sampled} off");
        let top = difference(case.top.iter().map(|&i| logits[i as usize]), &case.top_logits);
        assert!(top <= SMOLLM2_F32_BOUND, "{name}: one of the best logits is {top} off");
        assert_eq!(argmax(&logits), case.top[0], "{name}: the most likely token");
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((sum.ln() - case.logsumexp).abs() <= f64::from(SMOLLM2_F32_BOUND), "{name}: log of the sum");
        let greedy = session.greedy(logits, case.prompt.len(), case.greedy.len(), &blocks);
        assert_eq!(greedy, case.greedy, "{name}: greedy tokens");
        println!("{name}: {} tokens, logits within {}", case.prompt.len(), sampled.max(top));
    }
}
