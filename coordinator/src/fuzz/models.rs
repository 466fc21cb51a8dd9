//! Fuzz target of a model's files, as operators take them from whoever publishes them: GGUF or a Hugging Face directory, its
//! tensors' table, tokeniser and chat template.

use std::{fs, sync::LazyLock, time::SystemTime};

use baton_checkpoint::Checkpoint;
use tempfile::TempDir;

use crate::text::{ChatMessage, CheckpointText, TextCache, TextStops, Variables, says_what_is_written};

/// Of a directory, in the order in which they come.
const FILES: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];
const SHARD: &str = "model.safetensors";
const DATA_BYTES_MOST: usize = 64 << 10;
/// Most that a template may make of a few words, as its fuel has it.
const RENDERED_BYTES_MOST: usize = 4 << 20;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// A GGUF file; or, parted by 0xff, the text files of a directory and the head of a safetensors file, whose data are zeros.
pub fn models(bytes: &[u8]) {
    let path = if bytes.starts_with(b"GGUF") {
        let path = FOLDER.path().join("model.gguf");
        fs::write(&path, bytes).expect("is written");
        path
    } else {
        let path = FOLDER.path().join("model");
        fs::create_dir_all(&path).expect("is made");
        let mut parts = bytes.split(|&byte| byte == 0xff);
        for name in FILES {
            match parts.next().filter(|part| !part.is_empty()) {
                Some(part) => fs::write(path.join(name), part).expect("is written"),
                None => _ = fs::remove_file(path.join(name)),
            }
        }
        fs::write(path.join(SHARD), safetensors(parts.next().unwrap_or_default())).expect("is written");
        path
    };
    let Ok(model) = Checkpoint::open(&path) else { return };
    let config = model.config();
    assert!(config.layers > 0 && config.vocabulary > 0 && config.context_tokens > 0);
    for (weight, tensor) in model.tensors() {
        let rows = tensor.shape.iter().rev().skip(1).product::<usize>();
        assert_eq!((tensor.rows(), tensor.bytes.len()), (rows, rows * tensor.row_bytes()), "{weight}");
        assert!(model.tensor(weight).is_ok());
        let last = tensor.rows() - 1;
        assert_eq!(tensor.row(last).len(), tensor.row_bytes());
        let mut values = vec![0.0; tensor.columns()];
        tensor.dequantize_row(last, &mut values);
    }
    let revision = model.revision().expect("can be read");
    assert!(revision.len() == 64 && revision.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let Ok(text) = CheckpointText::open(&model, || SystemTime::UNIX_EPOCH, &TextCache::new(16 << 10)) else {
        return;
    };
    assert!(text.vocabulary() <= config.vocabulary);
    let said = "Hello, wörld\n 123 <|im_end|> \u{1f600}";
    let turns = [("system", said), ("user", ""), ("assistant", said), ("user", said)]
        .map(|(role, content)| ChatMessage { role, content: content.into() });
    if let Some(source) = model.chat_template() {
        says_what_is_written(source, &turns);
    }
    let tokens = [text.encode_text(said), text.encode_chat(&turns, &Variables::new())];
    for tokens in tokens.into_iter().flatten() {
        assert!(tokens.len() <= RENDERED_BYTES_MOST);
        assert!(tokens.iter().all(|&token| token < config.vocabulary), "{tokens:?} of {}", config.vocabulary);
        let mut reader = text.reader(&TextStops::default());
        let mut read = String::new();
        tokens.iter().take(256).for_each(|&token| _ = reader.push(token, &mut read));
        reader.finish(&mut read);
    }
}

/// A file of this head, and of as many zeros as its tensors end at.
fn safetensors(head: &[u8]) -> Vec<u8> {
    let table: serde_json::Value = serde_json::from_slice(head).unwrap_or_default();
    let ends = table.as_object().into_iter().flat_map(|table| table.values());
    let end = ends.filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max().unwrap_or(0);
    let end = usize::try_from(end).map_or(0, |end| end.min(DATA_BYTES_MOST));
    let mut file = (head.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(head);
    file.resize(file.len() + end, 0);
    file
}
