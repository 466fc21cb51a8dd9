//! Files that are cut, changed or made up: an error, never a panic, never memory for what only a number in the file claims.

use std::fs;

use baton_checkpoint::Checkpoint;
use proptest::prelude::*;

use crate::{
    place::{Place, gguf_refusal, refusal, use_it},
    small::{GgufWriter, gguf_model, safetensors, stored},
};

#[test]
fn claims_of_huge_counts_cost_nothing() {
    let place = Place::new();
    let whole = gguf_model().finish();
    // Number of tensors, number of metadata entries, length of the first key, length of the first value's text.
    for at in [8, 16, 24, 24 + 8 + "general.architecture".len() + 4] {
        for count in [u64::MAX, u64::MAX / 8, 1 << 40, 1 << 32] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            refusal(&place.gguf(&bytes));
        }
    }
}

/// Each line stands for 16,384 experts and takes no byte of the file.
#[test]
fn lines_that_stand_for_millions_of_tensors_are_refused() {
    let with = |lines: u32| {
        let add =
            |file: GgufWriter, layer| file.ones(&format!("blk.{layer}.ffn_up_exps.weight"), &[0, 1, 1 << 14]);
        gguf_refusal(&(0..lines).fold(gguf_model(), add))
    };
    assert!(with(3).contains("does not call for it"), "{}", with(3));
    assert!(with(400).contains("more than 262144"), "{}", with(400));
}

#[test]
fn every_cut_of_a_file_is_noticed() {
    let place = Place::new();
    let whole = gguf_model().finish();
    // The last tensor fills its alignment, so that every byte counts.
    for length in 0..whole.len() {
        refusal(&place.gguf(&whole[..length]));
    }
    let directory = place.hugging_face();
    let whole = safetensors(&stored());
    for length in (0..whole.len()).step_by(3) {
        fs::write(directory.join("model.safetensors"), &whole[..length]).expect("written");
        let message = refusal(directory);
        assert!(message.contains("model.safetensors"), "{message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn changed_gguf_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let place = Place::new();
        let mut bytes = gguf_model().finish();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(checkpoint) = Checkpoint::open(&place.gguf(&bytes)) {
            use_it(&checkpoint);
        }
    }

    #[test]
    fn changed_numbers_never_panic(at in any::<prop::sample::Index>(), number in any::<u64>(), wide in any::<bool>()) {
        let place = Place::new();
        let mut bytes = gguf_model().finish();
        let width = if wide { 8 } else { 4 };
        let at = at.index(bytes.len() - width);
        bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        if let Ok(checkpoint) = Checkpoint::open(&place.gguf(&bytes)) {
            use_it(&checkpoint);
        }
    }

    #[test]
    fn changed_safetensors_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let place = Place::new();
        let directory = place.hugging_face();
        let mut bytes = safetensors(&stored());
        for (at, value) in changes {
            // Mostly the header, where it matters.
            let at = at.index(bytes.len().min(1200));
            bytes[at] = value;
        }
        fs::write(directory.join("model.safetensors"), &bytes).expect("written");
        if let Ok(checkpoint) = Checkpoint::open(directory) {
            use_it(&checkpoint);
        }
    }

    #[test]
    fn made_up_headers_never_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let place = Place::new();
        let bytes = [b"GGUF\x03\0\0\0".as_slice(), &tail].concat();
        prop_assert!(Checkpoint::open(&place.gguf(&bytes)).is_err());
    }
}
