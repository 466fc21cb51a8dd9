//! What writing a packed copy and using it cost in memory. Alone in its file: the peak is the whole process's.
#![cfg(target_os = "linux")]

#[allow(dead_code, reason = "only the real model is needed of it")]
mod session;

use std::fs;

use baton_checkpoint::Checkpoint;
use baton_runtime::{LoadOptions, load};
use session::{peak_bytes, smollm2};

#[test]
fn a_copy_takes_no_more_than_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&smollm2()).unwrap();
    let before = peak_bytes();
    let packed_copies = Some(folder.path().to_owned());
    let options = LoadOptions { threads: 2, kv_blocks: 64, packed_copies, ..LoadOptions::default() };
    load(&checkpoint, &options, &mut |_, _| {}).unwrap();
    let (taken, weights) = (peak_bytes() - before, checkpoint.weight_bytes());
    assert!(taken * 100 <= weights * 125, "{taken} bytes for {weights} bytes of weights");
    assert!(fs::read_dir(folder.path()).unwrap().count() > 0, "nothing was written");
}
