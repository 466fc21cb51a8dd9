//! The tensors that a configuration calls for. `checkpoint` compares them with those that are there.

use crate::{Attention, GroupedQuery, LayerWeight, ModelConfig, Weight};

type LayerList = Vec<(LayerWeight, Vec<usize>)>;

/// Every tensor that a checked configuration calls for, with its shape.
pub(crate) fn wanted(config: &ModelConfig) -> Vec<(Weight, Vec<usize>)> {
    let (hidden, vocabulary) = (config.hidden as usize, config.vocabulary as usize);
    let mut list = vec![(Weight::Embedding, vec![vocabulary, hidden]), (Weight::OutputNorm, vec![hidden])];
    if !config.tied_embeddings {
        list.push((Weight::Output, vec![vocabulary, hidden]));
    }
    let mut layer_list =
        vec![(LayerWeight::AttentionNorm, vec![hidden]), (LayerWeight::FfnNorm, vec![hidden])];
    match &config.attention {
        Attention::GroupedQuery(attention) => grouped_query(attention, hidden, &mut layer_list),
    }
    dense(config, &mut layer_list);
    for layer in 0..config.layers {
        list.extend(layer_list.iter().map(|(weight, shape)| (Weight::Layer(layer, *weight), shape.clone())));
    }
    list
}

fn grouped_query(attention: &GroupedQuery, hidden: usize, list: &mut LayerList) {
    let [query, kv, head] =
        [attention.query_width(), attention.kv_width(), attention.head_dim].map(|n| n as usize);
    list.extend([
        (LayerWeight::Query, vec![query, hidden]),
        (LayerWeight::Key, vec![kv, hidden]),
        (LayerWeight::Value, vec![kv, hidden]),
        (LayerWeight::AttentionOutput, vec![hidden, query]),
    ]);
    if attention.qkv_bias {
        let biases =
            [(LayerWeight::QueryBias, query), (LayerWeight::KeyBias, kv), (LayerWeight::ValueBias, kv)];
        list.extend(biases.map(|(weight, width)| (weight, vec![width])));
    }
    if attention.output_bias {
        list.push((LayerWeight::AttentionOutputBias, vec![hidden]));
    }
    if attention.head_norms {
        list.extend([(LayerWeight::QueryNorm, vec![head]), (LayerWeight::KeyNorm, vec![head])]);
    }
}

fn dense(config: &ModelConfig, list: &mut LayerList) {
    let (hidden, ffn) = (config.hidden as usize, config.ffn as usize);
    list.extend([
        (LayerWeight::Gate, vec![ffn, hidden]),
        (LayerWeight::Up, vec![ffn, hidden]),
        (LayerWeight::Down, vec![hidden, ffn]),
    ]);
    if config.ffn_bias {
        let biases =
            [(LayerWeight::GateBias, ffn), (LayerWeight::UpBias, ffn), (LayerWeight::DownBias, hidden)];
        list.extend(biases.map(|(weight, width)| (weight, vec![width])));
    }
}
