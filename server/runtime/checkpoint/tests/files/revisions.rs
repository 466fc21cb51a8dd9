//! What a checkpoint's files are told from others by.

use std::fs;

use baton_checkpoint::Checkpoint;

use crate::{place::Place, small::gguf_model};

#[test]
fn revisions_follow_the_content() {
    let place = Place::new();
    let revision =
        |bytes: &[u8]| Checkpoint::open(&place.gguf(bytes)).expect("opens").revision().expect("is read");
    let bytes = gguf_model().finish();
    let mut changed = bytes.clone();
    *changed.last_mut().expect("not empty") ^= 1;
    assert_eq!(revision(&bytes), revision(&bytes));
    assert_ne!(revision(&bytes), revision(&changed));
    assert_ne!(revision(&bytes), revision(&gguf_model().u32("llama.context_length", 65).finish()));
}

/// Servers and coordinators of different releases compare revisions: what this build calls these files is what every
/// build must, until the format of revisions itself is given another number.
#[test]
fn revisions_are_the_same_in_every_release() {
    let place = Place::new();
    let gguf = Checkpoint::open(&place.gguf(&gguf_model().finish())).expect("opens");
    let directory = Checkpoint::open(place.hugging_face()).expect("opens");
    let revisions = [&gguf, &directory].map(|checkpoint| checkpoint.revision().expect("is read"));
    let known = [
        "ffced9f15378c0bef7a44d965ed376d430e532e8aab746bfcb06a7a91235ef87",
        "1d0d640d97c33ca67d545f78d6f00a4ea8fd126a0f7bee1157d48e99250217f4",
    ];
    assert_eq!(revisions, known);
}

#[test]
fn a_revision_that_cannot_be_read_is_an_error() {
    let place = Place::new();
    let directory = place.hugging_face();
    let checkpoint = Checkpoint::open(directory).expect("opens");
    fs::remove_file(directory.join("tokenizer.json")).expect("was there");
    let error = checkpoint.revision().expect_err("half a revision is none").to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}
