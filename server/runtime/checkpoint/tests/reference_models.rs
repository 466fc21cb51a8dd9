//! The runtime's tiny reference models open, every kind of them, and say what they are.

use std::path::{Path, PathBuf};

use baton_checkpoint::{
    Attention, Checkpoint, Dtype, GroupedQuery, LayerWeight, RopeOrder, RopeScaling, TokenizerSource, Weight,
};

fn open(name: &str) -> Checkpoint {
    let directory: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/tiny").join(name);
    let path = if name.starts_with("hf-") { directory } else { directory.join("model.gguf") };
    Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}"))
}

fn grouped_query(model: &Checkpoint) -> &GroupedQuery {
    let Attention::GroupedQuery(attention) = &model.config().attention;
    attention
}

#[test]
fn hugging_face_directories_open() {
    let model = open("hf-bf16-ratio4-llama3");
    let config = model.config();
    let attention = grouped_query(&model);
    assert_eq!(
        (model.name(), attention.heads, attention.kv_heads, attention.head_dim),
        ("hf-bf16-ratio4-llama3", 8, 2, 16)
    );
    assert_eq!((config.rope.theta, config.rope.order), (50_000.0, RopeOrder::Halves));
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_tokens: 64,
    };
    assert_eq!(config.rope.scaling, scaling);
    assert_eq!(model.stop_token_ids(), [269, 271]);
    assert_eq!((model.bos_token(), model.eos_token()), (Some("<|im_start|>"), Some("<|im_end|>")));
    assert!(model.chat_template().is_some_and(|template| template.contains("add_generation_prompt")));
    assert!(
        matches!(model.tokenizer(), TokenizerSource::HuggingFaceJson(path) if path.ends_with("tokenizer.json"))
    );

    let sharded = open("hf-bf16-sharded-yarn");
    assert!(matches!(sharded.config().rope.scaling, RopeScaling::Yarn { factor: 4.0, truncate: true, .. }));
    assert_eq!(sharded.tensors().count(), 3 + 2 * 9);
    assert_eq!(sharded.tensor(Weight::Output).expect("output").dtype, Dtype::Bf16);

    let biased = open("hf-f32-bias-linear");
    assert_eq!(biased.config().rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let bias = biased.tensor(Weight::Layer(0, LayerWeight::GateBias)).expect("bias");
    assert_eq!((bias.shape, bias.rows(), bias.columns()), ([56].as_slice(), 1, 56));

    let wide = open("hf-f16-ratio3-wide-heads");
    assert_eq!((grouped_query(&wide).query_width(), wide.config().hidden), (120, 48));
    assert!(open("hf-f32-ratio1-tied").config().tied_embeddings);
}

#[test]
fn gguf_files_open() {
    let types = [
        ("gguf-f32", Dtype::F32),
        ("gguf-f16-tied", Dtype::F16),
        ("gguf-q8_0-bias", Dtype::Q8_0),
        ("gguf-q4_0", Dtype::Q4_0),
        ("gguf-q4_1-like-smollm2", Dtype::Q4_1),
        ("gguf-q5_0-q5_1", Dtype::Q5_0),
        ("gguf-q4_k-q5_k-q6_k", Dtype::Q4K),
    ];
    for (name, dtype) in types {
        let model = open(name);
        assert_eq!(model.name(), name, "the file's own name is no name");
        assert_eq!(model.config().rope.order, RopeOrder::Interleaved);
        assert_eq!(model.tensor(Weight::Layer(0, LayerWeight::Query)).expect("query").dtype, dtype);
        assert_eq!(model.stop_token_ids(), [269, 271]);
    }
    assert!(grouped_query(&open("gguf-q8_0-bias")).qkv_bias);
    let divisors = open("gguf-q8_0-llama3-divisors");
    let same = open("hf-bf16-ratio4-llama3");
    let (a, b) = (divisors.config().rope.frequencies(16), same.config().rope.frequencies(16));
    for (a, b) in divisors_of(&a.inverse).into_iter().zip(divisors_of(&b.inverse)) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
}

/// Frequencies relative to the first, which no scaling here changes.
fn divisors_of(inverse: &[f32]) -> Vec<f32> {
    inverse.iter().map(|f| f / inverse[0]).collect()
}
