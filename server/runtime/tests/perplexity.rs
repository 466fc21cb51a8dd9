//! Quantised weights against llama.cpp: the same file finds the same text as likely. What the reference holds stands in
//! reference/README.md; `examples/perplexity.rs` tells the figures of any file.

mod likelihood;
#[allow(dead_code, reason = "only the real model is needed of it")]
mod session;

use baton_runtime::KvDtype;
use likelihood::{Reference, perplexity};
use session::smollm2;

/// Largest difference from llama.cpp with the same file, as a share of its figure. It rounds activations to 8 bits,
/// which costs it two thirds of this.
const BOUND: f64 = 0.01;
/// Largest difference from llama.cpp with the file's weights as F32, where neither side rounds much but the KV cache:
/// f16 there, f32 or bf16 here.
const EXACT_BOUND: f64 = 0.002;
/// The same where the cache is kept in bytes.
const INT8_BOUND: f64 = 0.01;

#[test]
fn smollm2_finds_a_text_as_likely_as_with_llama_cpp() {
    let reference = Reference::read().unwrap();
    for kv_dtype in KvDtype::ALL {
        let exact = if kv_dtype == KvDtype::Int8 { INT8_BOUND } else { EXACT_BOUND };
        let found = perplexity(&smollm2(), kv_dtype, 2, &reference.windows).unwrap();
        let kv = kv_dtype.name();
        println!("KV in {kv}: {found:.4}, llama.cpp {:.4} and {:.4}", reference.perplexity, reference.exact);
        for (want, bound) in [(reference.perplexity, BOUND), (reference.exact, exact)] {
            let share = (found - want).abs() / want;
            assert!(share <= bound, "KV in {kv}: {found} is {share} off {}'s {want}", reference.model);
        }
    }
}
