//! The runtime's tiny reference models open, every kind of them, and say what they are.

use std::path::{Path, PathBuf};

use baton_checkpoint::{
    Architecture, Attention, Checkpoint, Dtype, ExpertWeight, GroupScore, GroupedQuery, LayerWeight,
    RopeOrder, RopeScaling, RouterScores, TokenizerSource, Weight,
};

fn open(name: &str) -> Checkpoint {
    let directory: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/tiny").join(name);
    let path = if name.starts_with("hf-") { directory } else { directory.join("model.gguf") };
    Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}"))
}

fn grouped_query(model: &Checkpoint) -> &GroupedQuery {
    match &model.config().attention {
        Attention::GroupedQuery(attention) => attention,
        other => panic!("{other:?}"),
    }
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
        matches!(model.tokenizer(), TokenizerSource::HuggingFaceJson { file, .. } if file.path().ends_with("tokenizer.json"))
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

#[test]
fn deepseek_is_read_alike_from_both_formats() {
    let directory = open("hf-bf16-deepseek3-yarn-mtp");
    let Attention::Latent(attention) = &directory.config().attention else { panic!("{directory:?}") };
    assert_eq!((attention.query_rank, attention.kept_dim(), attention.query_dim()), (Some(16), 24, 16));
    let mscale = 0.1 * 0.7 * 8f32.ln() + 1.0;
    assert!((attention.scale - mscale * mscale / 4.0).abs() < 1e-6, "{}", attention.scale);
    let mixture = directory.config().mixture.as_ref().expect("a mixture");
    assert_eq!((mixture.at(0), mixture.at(1), mixture.shared_ffn), (false, true, 16));
    assert_eq!(directory.config().rope.order, RopeOrder::Interleaved);

    let file = open("gguf-q8_0-deepseek3-split");
    assert_eq!(file.config().architecture, Architecture::DeepseekV3);
    let Attention::Latent(attention) = &file.config().attention else { panic!("{file:?}") };
    assert_eq!((attention.query_rank, attention.kept_dim(), attention.query_dim()), (Some(32), 40, 40));
    let mscale = 0.1 * 8f32.ln() + 1.0;
    assert!((attention.scale - mscale * mscale / 40f32.sqrt()).abs() < 1e-6, "{}", attention.scale);
    let mixture = file.config().mixture.as_ref().expect("a mixture");
    assert_eq!(mixture.routing.scores, RouterScores::Sigmoid);
    assert_eq!(mixture.routing.groups.map(|groups| groups.score), Some(GroupScore::BestTwo));
    let expert = file.tensor(Weight::Expert(1, 7, ExpertWeight::Down)).expect("the last expert");
    assert_eq!((expert.shape, expert.dtype), ([32, 32].as_slice(), Dtype::Q8_0));
    assert_eq!(open("gguf-q8_0-deepseek2").config().architecture, Architecture::DeepseekV2);
}
