//! The real SmolLM2-135M-Instruct file, read as the services read it.

use std::path::PathBuf;

use baton_checkpoint::{
    Architecture, Attention, Checkpoint, Dtype, Format, LayerWeight, RopeOrder, RopeScaling, TokenizerSource,
    Weight,
};

fn model() -> Checkpoint {
    let path = std::env::var_os("BATON_TEST_MODEL").expect(
        "BATON_TEST_MODEL must be the path of SmolLM2-135M-Instruct.Q4_1.gguf; `deploy/run test` sets it",
    );
    Checkpoint::open(&PathBuf::from(path)).expect("the test model opens")
}

#[test]
fn configuration_and_tensors_are_as_published() {
    let model = model();
    assert_eq!((model.name(), model.format()), ("SmolLM2-135M-Instruct", Format::Gguf));
    let config = model.config();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.layers, config.hidden, config.ffn), (30, 576, 1536));
    let Attention::GroupedQuery(attention) = &config.attention else { panic!("{config:?}") };
    assert_eq!((attention.heads, attention.kv_heads, attention.head_dim), (9, 3, 64));
    assert_eq!((config.context_tokens, config.vocabulary), (8192, 49152));
    assert_eq!((config.rope.theta, config.rope.order), (100_000.0, RopeOrder::Interleaved));
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert!(config.tied_embeddings && !attention.qkv_bias && !attention.output_bias && !config.ffn_bias);
    assert!((config.rms_eps - 1e-5).abs() < 1e-9);

    let embedding = model.tensor(Weight::Embedding).expect("embedding");
    assert_eq!((embedding.dtype, embedding.shape), (Dtype::Q8_0, [49152, 576].as_slice()));
    let output = model.tensor(Weight::Output).expect("tied output");
    assert_eq!(output.bytes.as_ptr(), embedding.bytes.as_ptr());
    let key = model.tensor(Weight::Layer(29, LayerWeight::Key)).expect("key projection");
    assert_eq!(
        (key.dtype, key.shape, key.rows(), key.columns()),
        (Dtype::Q4_1, [192, 576].as_slice(), 192, 576)
    );
    let norm = model.tensor(Weight::OutputNorm).expect("norm").to_f32();
    assert!(norm.iter().all(|x| x.is_finite()) && norm.iter().any(|&x| x > 0.1));
    assert!(model.tensor(Weight::Layer(0, LayerWeight::QueryBias)).is_err());
    assert_eq!(model.tensors().count(), 272);
}

#[test]
fn tokens_and_template_are_there() {
    let model = model();
    let TokenizerSource::Ggml(tables) = model.tokenizer() else { panic!("a GGUF file carries ggml tables") };
    assert_eq!((tables.model.as_str(), tables.pre.as_str()), ("gpt2", "smollm"));
    assert_eq!((tables.tokens.len(), tables.kinds.len(), tables.merges.len()), (49152, 49152, 48900));
    assert_eq!((model.bos_token(), model.eos_token()), (Some("<|im_start|>"), Some("<|im_end|>")));
    assert_eq!(model.stop_token_ids(), [0, 2]);
    assert!(model.chat_template().is_some_and(|template| template.contains("add_generation_prompt")));
}

#[test]
fn revision_is_stable_and_cheap_to_ask_for_again() {
    let (one, two) = (model(), model());
    let revision = one.revision().expect("is read");
    assert_eq!(revision, two.revision().expect("is read"));
    assert_eq!(revision.len(), 64);
}
