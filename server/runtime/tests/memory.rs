//! What loading costs in memory. Alone in its file: the peak is the whole process's.
#![cfg(target_os = "linux")]

#[allow(dead_code, reason = "only the real model is needed of it")]
mod session;

use baton_checkpoint::Checkpoint;
use baton_runtime::{LoadOptions, load};
use session::{peak_bytes, smollm2};

#[test]
fn loading_takes_little_more_than_the_weights() {
    let checkpoint = Checkpoint::open(&smollm2()).unwrap();
    let before = peak_bytes();
    let options = LoadOptions { threads: 2, kv_blocks: 8192, ..LoadOptions::default() };
    let executor = load(&checkpoint, &options, &mut |_, _| {}).unwrap();
    let (taken, weights) = (peak_bytes() - before, checkpoint.weight_bytes());
    assert!(executor.kv_pool().layout().total_bytes() as u64 > 20 * weights, "a pool that would be noticed");
    assert!(taken * 100 <= weights * 125, "{taken} bytes for {weights} bytes of weights");
}
