//! The runtime against Hugging Face transformers: logits within a bound, greedy tokens equal, for every tiny reference
//! model and for SmolLM2. What the reference files hold stands in reference/README.md.

mod parity;
mod session;

use std::{fs, path::Path};

use baton_checkpoint::Architecture;
use baton_runtime::{KvDtype, LoadOptions};
use parity::{Check, How, Outcome, Weights, difference};
use serde::Deserialize;
use session::{Session, argmax, blocks, smollm2};

/// Largest difference of a logit with an f32 KV cache and weights as they are in the file: only the order of f32 sums
/// separates us from the reference.
const EXACT_BOUND: f32 = 2e-4;
/// Quantised weights are multiplied with activations that are rounded to 16 bits.
const QUANTISED_BOUND: f32 = 4e-3;
/// Weights in bf16 are rounded to 12 bits of the largest of 32.
const BF16_BLOCKS_BOUND: f32 = 5e-2;
/// With a bf16 cache K and V are rounded to 8 bits: 0.4% each.
const BF16_BOUND: f32 = 0.1;
/// With an int8 cache they are rounded to a 127th of the largest of their vector, which may even change the choice of
/// experts: this says no more than that nothing is wrong. What it costs a real model is measured as perplexity.
const INT8_BOUND: f32 = 0.5;
/// SmolLM2's logits are about 20, and some of its activations some thousand times as large as others.
const SMOLLM2_BOUND: f32 = 2.5e-2;

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

/// Every tiny model, with every check, and a report of it.
#[test]
fn every_family_gives_the_same_logits_and_tokens() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny");
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    let all = names.iter().flat_map(|name| How::all(name).into_iter().map(|how| parity::examine(name, how)));
    let outcomes: Vec<Outcome> = all.collect();
    println!("the report is {}", parity::report(&outcomes).display());
    for architecture in Architecture::ALL {
        assert!(outcomes.iter().any(|o| o.family == architecture.name()), "no model of {architecture}");
    }
    let wrong: Vec<String> = outcomes.iter().flat_map(faults).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is out of bounds.
fn faults(outcome: &Outcome) -> Vec<String> {
    let bound = match (outcome.kv_dtype, outcome.weights) {
        (KvDtype::F32, Weights::Exact) => EXACT_BOUND,
        (KvDtype::F32, Weights::Quantised) => QUANTISED_BOUND,
        (KvDtype::F32, Weights::Bf16Blocks) => BF16_BLOCKS_BOUND,
        (KvDtype::Bf16, _) => BF16_BOUND,
        (KvDtype::Int8, _) => INT8_BOUND,
    };
    let who = format!("{}, KV in {}", outcome.model, outcome.kv_dtype.name());
    let beyond = |(check, difference): (&Check, &f32)| {
        let within = difference.partial_cmp(&bound).is_some_and(|order| order.is_le());
        (!within).then(|| format!("{who}: {check:?}: a logit is {difference} off"))
    };
    let mut found: Vec<String> = outcome.differences.iter().filter_map(beyond).collect();
    if outcome.differences.len() != Check::ALL.len() {
        found.push(format!("{who}: only {} checks", outcome.differences.len()));
    }
    let (equal, tokens) = outcome.equal_tokens;
    if outcome.kv_dtype == KvDtype::F32 && (equal != tokens || tokens == 0) {
        found.push(format!("{who}: {equal} of {tokens} greedy tokens are the same"));
    }
    found
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
        assert!(sampled <= SMOLLM2_BOUND, "{name}: a logit is {sampled} off");
        let top = difference(case.top.iter().map(|&i| logits[i as usize]), &case.top_logits);
        assert!(top <= SMOLLM2_BOUND, "{name}: one of the best logits is {top} off");
        assert_eq!(argmax(&logits), case.top[0], "{name}: the most likely token");
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        assert!((sum.ln() - case.logsumexp).abs() <= f64::from(SMOLLM2_BOUND), "{name}: log of the sum");
        let greedy = session.greedy(logits, case.prompt.len(), case.greedy.len(), &blocks);
        assert_eq!(greedy, case.greedy, "{name}: greedy tokens");
        println!("{name}: {} tokens, logits within {}", case.prompt.len(), sampled.max(top));
    }
}
