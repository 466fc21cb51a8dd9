//! Where tests put small files, and how these are opened.

use std::{
    fs,
    path::{Path, PathBuf},
};

use baton_checkpoint::Checkpoint;
use tempfile::TempDir;

use crate::small::{GgufWriter, write_hugging_face};

pub(crate) struct Place(pub(crate) TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(crate) fn gguf(&self, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join("tiny.gguf");
        fs::write(&path, bytes).expect("a file is written");
        path
    }

    pub(crate) fn hugging_face(&self) -> &Path {
        write_hugging_face(self.0.path());
        self.0.path()
    }
}

pub(crate) fn refusal(path: &Path) -> String {
    Checkpoint::open(path).expect_err("it is refused").to_string()
}

pub(crate) fn gguf_refusal(writer: &GgufWriter) -> String {
    let place = Place::new();
    let path = place.gguf(&writer.finish());
    let message = refusal(&path);
    assert!(message.contains("tiny.gguf"), "{message}");
    message
}

/// Reads all that there is to read.
pub(crate) fn use_it(checkpoint: &Checkpoint) {
    for (_, view) in checkpoint.tensors() {
        assert_eq!(view.bytes.len(), view.rows() * view.row_bytes());
        view.to_f32();
    }
    checkpoint.revision().expect("is read");
}
