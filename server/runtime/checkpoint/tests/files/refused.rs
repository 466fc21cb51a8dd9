//! Whole files that are no model, or none that is served: one clear error that names file and field.

use std::{fs, path::Path};

use baton_checkpoint::Checkpoint;

use crate::{
    place::{Place, gguf_refusal, refusal},
    small::{GgufWriter, config, gguf_model},
};

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
