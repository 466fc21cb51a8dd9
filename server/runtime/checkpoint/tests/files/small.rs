//! Writes small model files for the tests: a one-layer LLaMA as GGUF bytes or as a Hugging Face directory.

use std::{fs, path::Path};

/// Bytes of a GGUF file, built entry by entry.
pub(crate) struct GgufWriter {
    version: u32,
    metadata: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

pub(crate) const ALIGNMENT: usize = 32;

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

impl GgufWriter {
    pub(crate) fn new(version: u32) -> Self {
        Self { version, metadata: Vec::new(), tensors: Vec::new() }
    }

    fn entry(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.metadata.retain(|(present, _)| present != key);
        self.metadata.push((key.to_owned(), [kind.to_le_bytes().to_vec(), value].concat()));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(present, _)| present != key);
        self.tensors.retain(|(present, ..)| present != key);
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, value.to_le_bytes().to_vec())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.entry(key, 6, value.to_le_bytes().to_vec())
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, text(value))
    }

    pub(crate) fn texts(self, key: &str, values: &[&str]) -> Self {
        let items = values.iter().flat_map(|value| text(value));
        let head = [8u32.to_le_bytes().to_vec(), (values.len() as u64).to_le_bytes().to_vec()].concat();
        self.entry(key, 9, head.into_iter().chain(items).collect())
    }

    /// An f32 tensor of ones; axes innermost first.
    pub(crate) fn ones(self, name: &str, axes: &[u64]) -> Self {
        let count = axes.iter().product::<u64>() as usize;
        self.tensor(name, axes, 0, 1f32.to_le_bytes().repeat(count))
    }

    pub(crate) fn tensor(mut self, name: &str, axes: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), axes.to_vec(), kind, bytes));
        self
    }

    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            file.extend(text(key));
            file.extend(value);
        }
        let mut data = Vec::new();
        for (name, axes, kind, bytes) in &self.tensors {
            file.extend(text(name));
            file.extend((axes.len() as u32).to_le_bytes());
            axes.iter().for_each(|axis| file.extend(axis.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(data);
        file
    }
}

/// A LLaMA of one layer: hidden 8, feed-forward 12, two heads over one KV head, vocabulary 4, tied.
pub(crate) fn gguf_model() -> GgufWriter {
    let layer =
        |writer: GgufWriter, name: &str, axes: &[u64]| writer.ones(&format!("blk.0.{name}.weight"), axes);
    let writer = GgufWriter::new(3)
        .text("general.architecture", "llama")
        .text("general.name", "Tiny")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", 8)
        .u32("llama.feed_forward_length", 12)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", &["a", "b", "ab", "<|end|>"])
        .texts("tokenizer.ggml.merges", &["a b"])
        .u32("tokenizer.ggml.eos_token_id", 3)
        .ones("token_embd.weight", &[8, 4])
        .ones("output_norm.weight", &[8]);
    let writer = layer(writer, "attn_norm", &[8]);
    let writer = layer(writer, "attn_q", &[8, 8]);
    let writer = layer(writer, "attn_k", &[8, 4]);
    let writer = layer(writer, "attn_v", &[8, 4]);
    let writer = layer(writer, "attn_output", &[8, 8]);
    let writer = layer(writer, "ffn_norm", &[8]);
    let writer = layer(writer, "ffn_gate", &[8, 12]);
    let writer = layer(writer, "ffn_up", &[8, 12]);
    layer(writer, "ffn_down", &[12, 8])
}

/// `config.json` of the same model.
pub(crate) fn config() -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 3,
    })
}

/// A tensor of a safetensors file: name, type, shape, bytes.
pub(crate) type Stored = (String, &'static str, Vec<usize>, Vec<u8>);

/// The same model's tensors, f32 ones.
pub(crate) fn stored() -> Vec<Stored> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![4, 8]),
        ("model.norm.weight".to_owned(), vec![8]),
        (layer("input_layernorm"), vec![8]),
        (layer("self_attn.q_proj"), vec![8, 8]),
        (layer("self_attn.k_proj"), vec![4, 8]),
        (layer("self_attn.v_proj"), vec![4, 8]),
        (layer("self_attn.o_proj"), vec![8, 8]),
        (layer("post_attention_layernorm"), vec![8]),
        (layer("mlp.gate_proj"), vec![12, 8]),
        (layer("mlp.up_proj"), vec![12, 8]),
        (layer("mlp.down_proj"), vec![8, 12]),
    ];
    let ones = |shape: &[usize]| 1f32.to_le_bytes().repeat(shape.iter().product());
    tensors.map(|(name, shape)| (name, "F32", shape.clone(), ones(&shape))).to_vec()
}

/// Bytes of a safetensors file.
pub(crate) fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    [(header.len() as u64).to_le_bytes().to_vec(), header.into_bytes(), data].concat()
}

/// Writes the directory.
pub(crate) fn write_hugging_face(directory: &Path) {
    let write =
        |name: &str, content: &[u8]| fs::write(directory.join(name), content).expect("a file is written");
    write("config.json", config().to_string().as_bytes());
    write("model.safetensors", &safetensors(&stored()));
    write("tokenizer.json", br#"{"added_tokens": [{"id": 3, "content": "<|end|>", "special": true}]}"#);
}
