//! Files that are cut, changed or made up: one clear error that names file and field, never a panic, never memory for
//! what only a number in the file claims.

mod files;

use std::{
    fs,
    path::{Path, PathBuf},
};

use baton_checkpoint::{Checkpoint, CheckpointError, LayerWeight, Suggested, Weight};
use files::{GgufWriter, config, gguf_model, safetensors, stored, write_hugging_face};
use proptest::prelude::*;
use tempfile::TempDir;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn gguf(&self, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join("tiny.gguf");
        fs::write(&path, bytes).expect("a file is written");
        path
    }

    fn hugging_face(&self) -> &Path {
        write_hugging_face(self.0.path());
        self.0.path()
    }
}

fn refusal(path: &Path) -> String {
    Checkpoint::open(path).expect_err("it is refused").to_string()
}

fn gguf_refusal(writer: &GgufWriter) -> String {
    let place = Place::new();
    let path = place.gguf(&writer.finish());
    let message = refusal(&path);
    assert!(message.contains("tiny.gguf"), "{message}");
    message
}

/// Reads all that there is to read.
fn use_it(checkpoint: &Checkpoint) {
    for (_, view) in checkpoint.tensors() {
        assert_eq!(view.bytes.len(), view.rows() * view.row_bytes());
        view.to_f32();
    }
    checkpoint.revision().expect("is read");
}

#[test]
fn whole_files_open_in_both_versions_and_formats() {
    let place = Place::new();
    for version in [2, 3] {
        let mut bytes = gguf_model().finish();
        bytes[4] = version;
        let checkpoint = Checkpoint::open(&place.gguf(&bytes)).expect("the tiny GGUF opens");
        assert_eq!((checkpoint.name(), checkpoint.stop_token_ids()), ("tiny", [3].as_slice()));
        use_it(&checkpoint);
    }
    let checkpoint = Checkpoint::open(place.hugging_face()).expect("the tiny directory opens");
    assert_eq!((checkpoint.eos_token(), checkpoint.stop_token_ids()), (Some("<|end|>"), [3].as_slice()));
    assert!(matches!(
        checkpoint.tensor(Weight::Layer(1, LayerWeight::Query)),
        Err(CheckpointError::NoTensor { .. })
    ));
    use_it(&checkpoint);
}

#[test]
fn known_endings_count_where_nothing_says_what_ends_a_turn() {
    let place = Place::new();
    let directory = place.hugging_face();
    let mut config = config();
    config["eos_token_id"] = serde_json::Value::Null;
    fs::write(directory.join("config.json"), config.to_string()).expect("written");
    assert_eq!(Checkpoint::open(directory).expect("opens").stop_token_ids(), [3]);
    fs::write(directory.join("generation_config.json"), r#"{"eos_token_id": [1, 2]}"#).expect("written");
    assert_eq!(Checkpoint::open(directory).expect("opens").stop_token_ids(), [1, 2]);
}

#[test]
fn what_a_model_suggests_for_sampling_is_told_as_its_file_has_it() {
    let place = Place::new();
    let told = |path: &Path| {
        let checkpoint = Checkpoint::open(path).expect("opens");
        let sampling = checkpoint.sampling().clone();
        let all = [
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
        ];
        let name = sampling.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let number = |value: Suggested| value.expect("is a number");
        (name, all.map(|one| one.map(|one| (one.field, number(one.value)))))
    };
    let directory = place.hugging_face();
    assert_eq!(told(directory), (None, [None; 5]));
    let write = |text: &str| fs::write(directory.join("generation_config.json"), text).expect("written");
    // As Qwen3's, with a value that no request may have: whoever uses it says what it may be.
    write(r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": null, "repetition_penalty": 11}"#);
    let expected =
        [Some(("temperature", 0.6)), None, Some(("top_k", 20.0)), None, Some(("repetition_penalty", 11.0))];
    assert_eq!(told(directory), (Some("generation_config.json".to_owned()), expected));
    let gguf = gguf_model()
        .f32("general.sampling.temp", 0.5)
        .u32("general.sampling.top_k", 20)
        .f32("general.sampling.top_p", 0.75)
        .f32("general.sampling.min_p", 0.25)
        .f32("general.sampling.penalty_repeat", 1.5);
    let expected = [
        Some(("general.sampling.temp", 0.5)),
        Some(("general.sampling.top_p", 0.75)),
        Some(("general.sampling.top_k", 20.0)),
        Some(("general.sampling.min_p", 0.25)),
        Some(("general.sampling.penalty_repeat", 1.5)),
    ];
    assert_eq!(told(&place.gguf(&gguf.finish())), (Some("tiny.gguf".to_owned()), expected));
}

/// Servers open it: they do not use it.
#[test]
fn what_is_suggested_need_not_be_a_number() {
    let place = Place::new();
    let temperature = |path: &Path| {
        let checkpoint = Checkpoint::open(path).expect("opens");
        checkpoint.sampling().temperature.clone().expect("is suggested").value
    };
    let directory = place.hugging_face();
    for value in [r#""hot""#, "[0.6]", "true"] {
        let text = format!(r#"{{"temperature": {value}}}"#);
        fs::write(directory.join("generation_config.json"), text).expect("written");
        assert_eq!(temperature(directory), Err(value.to_owned()));
    }
    let gguf = gguf_model().text("general.sampling.temp", "warm");
    assert_eq!(temperature(&place.gguf(&gguf.finish())), Err("\"warm\"".to_owned()));
}

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

#[test]
fn what_is_no_model_is_told_so() {
    let place = Place::new();
    assert!(refusal(&place.0.path().join("absent")).contains("cannot read"));
    assert!(refusal(&place.gguf(b"")).contains("is not a model"));
    assert!(refusal(&place.gguf(b"PK\x03\x04 something else")).contains("is not a model"));
    let directory = place.0.path().join("empty");
    fs::create_dir(&directory).expect("created");
    assert!(refusal(&directory).contains("no config.json; give"));
    fs::write(directory.join("a.gguf"), "").expect("written");
    assert!(refusal(&directory).contains("no config.json, though it holds a.gguf"));
    fs::write(directory.join("adapter_config.json"), "{}").expect("written");
    assert!(refusal(&directory).contains("it is a LoRA adapter"));
    assert!(refusal(Path::new("/dev/null")).contains("neither a file nor a directory"));
}

#[test]
fn gguf_errors_name_the_field() {
    let table: Vec<(GgufWriter, &[&str])> = vec![
        (
            gguf_model().text("general.architecture", "mamba"),
            &["general.architecture", "mamba", "supported: llama"],
        ),
        (gguf_model().without("general.architecture"), &["general.architecture", "not there"]),
        (gguf_model().without("llama.block_count"), &["llama.block_count"]),
        (gguf_model().text("llama.block_count", "one"), &["llama.block_count", "\"one\"", "32-bit number"]),
        (gguf_model().u32("llama.block_count", 2), &["AttentionNorm of layer 1", "not there"]),
        (gguf_model().u32("llama.block_count", u32::MAX), &["layers", "not within"]),
        (gguf_model().u32("llama.attention.head_count", 0), &["heads"]),
        (gguf_model().u32("llama.attention.head_count_kv", 3), &["key/value heads"]),
        (gguf_model().u32("llama.attention.head_count", 4), &["blk.0.attn_k.weight", "[2, 8]"]),
        (gguf_model().u32("llama.expert_count", 8), &["llama.expert_count", "dense"]),
        (
            gguf_model().ones("blk.0.ffn_gate_exps.weight", &[8]),
            &["blk.0.ffn_gate_exps.weight", "stack of matrices"],
        ),
        (
            gguf_model().ones("blk.0.ffn_gate_exps.weight", &[8, 12, 2]),
            &["blk.0.ffn_gate_exps.weight", "does not call for it"],
        ),
        (gguf_model().u32("split.count", 3), &["split.count", "llama-gguf-split"]),
        (gguf_model().u32("general.alignment", 7), &["general.alignment"]),
        (gguf_model().f32("llama.attention.layer_norm_rms_epsilon", f32::NAN), &["epsilon"]),
        (gguf_model().f32("llama.rope.freq_base", -1.0), &["rotary"]),
        (
            gguf_model().text("llama.rope.scaling.type", "longrope").f32("llama.rope.scaling.factor", 2.0),
            &["llama.rope.scaling.type", "longrope"],
        ),
        (gguf_model().u32("tokenizer.ggml.eos_token_id", 4), &["tokenizer.ggml.eos_token_id", "4 tokens"]),
        (gguf_model().without("tokenizer.ggml.tokens"), &["tokenizer.ggml.tokens"]),
        (gguf_model().without("blk.0.attn_k.weight"), &["Key of layer 0", "not there"]),
        (gguf_model().ones("blk.0.attn_q_norm.weight", &[4]), &["blk.0.attn_q_norm.weight"]),
        (gguf_model().ones("blk.0.attn_q.bias", &[8]), &["KeyBias of layer 0"]),
        (gguf_model().ones("token_embd.weight", &[8, 4]), &["token_embd.weight", "twice"]),
        (
            gguf_model().without("output_norm.weight").ones("output_norm.weight", &[9]),
            &["output_norm.weight", "[9]"],
        ),
        (
            gguf_model().tensor("output.weight", &[8, 4], 16, vec![0; 64]),
            &["output.weight", "type 16", "Q4_K"],
        ),
        (
            gguf_model().tensor("output.weight", &[8, 4], 8, vec![0; 64]),
            &["output.weight", "whole blocks of Q8_0"],
        ),
        (
            gguf_model().tensor("output.weight", &[8, u64::MAX / 2], 0, vec![0; 64]),
            &["output.weight", "size"],
        ),
        (
            gguf_model().tensor("output.weight", &[8, 1 << 40], 0, vec![0; 64]),
            &["output.weight", "ends at byte"],
        ),
        (gguf_model().tensor("output.weight", &[], 0, vec![0; 64]), &["output.weight", "axes"]),
        (GgufWriter::new(1), &["version", "2, 3"]),
        (GgufWriter::new(3u32.swap_bytes()), &["version", "big-endian"]),
    ];
    for (writer, words) in table {
        let message = gguf_refusal(&writer);
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }
}

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

fn with_config(change: impl Fn(&mut serde_json::Value)) -> String {
    let place = Place::new();
    let directory = place.hugging_face();
    let mut config = config();
    change(&mut config);
    fs::write(directory.join("config.json"), config.to_string()).expect("written");
    refusal(directory)
}

fn with_mixture(change: impl Fn(&mut serde_json::Value)) -> String {
    with_config(|config| {
        config["model_type"] = "qwen3_moe".into();
        config["num_experts"] = 4.into();
        config["num_experts_per_tok"] = 2.into();
        config["moe_intermediate_size"] = 4.into();
        change(config);
    })
}

fn with_deepseek(change: impl Fn(&mut serde_json::Value)) -> String {
    with_config(|config| {
        config["model_type"] = "deepseek_v3".into();
        config["num_key_value_heads"] = 2.into();
        let numbers = [
            ("kv_lora_rank", 4),
            ("qk_nope_head_dim", 4),
            ("qk_rope_head_dim", 2),
            ("v_head_dim", 4),
            ("n_routed_experts", 4),
            ("num_experts_per_tok", 2),
            ("moe_intermediate_size", 4),
            ("n_group", 2),
            ("topk_group", 1),
        ];
        for (field, number) in numbers {
            config[field] = number.into();
        }
        change(config);
    })
}

#[test]
fn hugging_face_errors_name_the_field() {
    let cases: Vec<(String, &[&str])> = vec![
        (
            with_config(|c| c["model_type"] = "gpt_neox".into()),
            &["config.json", "model_type", "gpt_neox", "llama"],
        ),
        (with_config(|c| c["hidden_size"] = "wide".into()), &["config.json", "hidden_size", "\"wide\""]),
        (
            with_config(|c| c["hidden_size"] = serde_json::Value::Null),
            &["config.json", "hidden_size", "not there"],
        ),
        (with_config(|c| c["num_hidden_layers"] = 4_294_967_296u64.into()), &["num_hidden_layers"]),
        (
            with_config(|c| c["vocab_size"] = 5.into()),
            &["model.safetensors", "embed_tokens", "[4, 8]", "[5, 8]"],
        ),
        (with_config(|c| c["tie_word_embeddings"] = false.into()), &["Output", "not there"]),
        (with_config(|c| c["attention_bias"] = true.into()), &["QueryBias"]),
        (with_config(|c| c["hidden_act"] = "gelu".into()), &["hidden_act", "silu"]),
        (
            with_config(|c| c["quantization_config"] = serde_json::json!({"quant_method": "gptq"})),
            &["gptq", "GGUF"],
        ),
        (with_config(|c| c["quantize"] = "w8a8s".into()), &["quantize", "w8a8s", "GGUF"]),
        (with_config(|c| c["quantize"] = 8.into()), &["quantize", "text"]),
        (
            with_config(|c| c["rope_scaling"] = serde_json::json!({"type": "dynamic", "factor": 2.0})),
            &["rope_scaling.rope_type", "dynamic"],
        ),
        (
            with_config(|c| c["rope_scaling"] = serde_json::json!({"rope_type": "linear"})),
            &["rope_scaling.factor"],
        ),
        (with_config(|c| c["eos_token_id"] = "end".into()), &["eos_token_id"]),
        (
            with_config(|c| (c["model_type"], c["sliding_window"]) = ("mistral".into(), 32.into())),
            &["sliding_window", "32", "64 tokens"],
        ),
        (
            with_config(|c| {
                (c["model_type"], c["sliding_window"]) = ("qwen2".into(), 32.into());
                c["use_sliding_window"] = true.into();
            }),
            &["sliding_window", "32"],
        ),
        (
            with_config(|c| {
                c["model_type"] = "qwen3".into();
                c["layer_types"] = serde_json::json!(["sliding_attention"]);
            }),
            &["layer_types", "sliding_attention", "full_attention"],
        ),
        (with_mixture(|c| c["num_experts_per_tok"] = 5.into()), &["experts of a token", "1 to 4"]),
        (with_mixture(|c| c["mlp_only_layers"] = 0.into()), &["mlp_only_layers", "list"]),
        (with_mixture(|c| c["decoder_sparse_step"] = 0.into()), &["decoder_sparse_step"]),
        (with_mixture(|c| c["num_experts"] = serde_json::Value::Null), &["num_local_experts"]),
        (with_deepseek(|c| c["scoring_func"] = "softmax".into()), &["scoring_func", "softmax", "sigmoid"]),
        (with_deepseek(|c| c["topk_method"] = "greedy".into()), &["topk_method", "greedy", "noaux_tc"]),
        (with_deepseek(|c| c["n_group"] = 3.into()), &["groups of experts", "4 experts"]),
        (with_deepseek(|c| c["topk_group"] = 3.into()), &["chosen groups", "1 to 2"]),
        (with_deepseek(|c| c["num_experts_per_tok"] = 3.into()), &["experts of a token", "1 groups"]),
        (with_deepseek(|c| c["attention_bias"] = true.into()), &["attention_bias", "false"]),
        (with_deepseek(|c| c["num_key_value_heads"] = 1.into()), &["num_key_value_heads", "2"]),
        (with_deepseek(|c| c["moe_layer_freq"] = 2.into()), &["moe_layer_freq"]),
        (with_deepseek(|c| c["qk_rope_head_dim"] = 3.into()), &["head size with positions", "odd"]),
        (with_deepseek(|c| c["kv_lora_rank"] = 0.into()), &["rank of keys and values"]),
        (
            with_deepseek(|c| {
                (c["model_type"], c["topk_method"]) = ("deepseek_v2".into(), "greedy".into());
                c["norm_topk_prob"] = true.into();
            }),
            &["norm_topk_prob", "deepseek_v2", "false"],
        ),
        // As many tensors as cannot be listed are not.
        (
            with_mixture(|c| (c["num_experts"], c["num_hidden_layers"]) = (16_384.into(), 4096.into())),
            &["not there"],
        ),
        // What the family has and the file has not.
        (with_config(|c| c["model_type"] = "qwen2".into()), &["QueryBias of layer 0"]),
        (with_config(|c| c["model_type"] = "qwen3".into()), &["Norm of layer 0"]),
    ];
    for (message, words) in cases {
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }
}

#[test]
fn a_window_that_nothing_feels_is_no_window() {
    let place = Place::new();
    let directory = place.hugging_face();
    let mut config = config();
    config["model_type"] = "mistral".into();
    config["sliding_window"] = 64.into();
    fs::write(directory.join("config.json"), config.to_string()).expect("written");
    Checkpoint::open(directory).expect("as long as the context");
}

#[test]
fn indexes_cannot_lead_out_of_the_directory() {
    let place = Place::new();
    let directory = place.hugging_face();
    for name in ["../model.safetensors", "/etc/passwd", "notes.txt"] {
        let index = serde_json::json!({"weight_map": {"lm_head.weight": name}});
        fs::write(directory.join("model.safetensors.index.json"), index.to_string()).expect("written");
        let message = refusal(directory);
        assert!(message.contains("weight_map.lm_head.weight"), "{message}");
    }
    let index = serde_json::json!({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}});
    fs::write(directory.join("model.safetensors.index.json"), index.to_string()).expect("written");
    assert!(refusal(directory).contains("model-00002-of-00002.safetensors"));
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
