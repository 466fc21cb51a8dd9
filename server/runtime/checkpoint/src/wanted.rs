//! The tensors that a configuration calls for. `checkpoint` compares them with those that are there.

use crate::{
    Attention, ExpertWeight, GroupedQuery, LatentAttention, LayerWeight, Mixture, ModelConfig, Weight,
};

type LayerList = Vec<(LayerWeight, Vec<usize>)>;

/// The tensors outside of layers that a checked configuration calls for, with their shapes.
pub(crate) fn outside(config: &ModelConfig) -> Vec<(Weight, Vec<usize>)> {
    let (hidden, vocabulary) = (config.hidden as usize, config.vocabulary as usize);
    let mut list = vec![(Weight::Embedding, vec![vocabulary, hidden]), (Weight::OutputNorm, vec![hidden])];
    if !config.tied_embeddings {
        list.push((Weight::Output, vec![vocabulary, hidden]));
    }
    list
}

/// The tensors of a layer that a checked configuration calls for, with their shapes.
pub(crate) fn of_layer(config: &ModelConfig, layer: u32) -> Vec<(Weight, Vec<usize>)> {
    let hidden = config.hidden as usize;
    let mut list = vec![(LayerWeight::AttentionNorm, vec![hidden]), (LayerWeight::FfnNorm, vec![hidden])];
    match &config.attention {
        Attention::GroupedQuery(attention) => grouped_query(attention, hidden, &mut list),
        Attention::Latent(attention) => latent(attention, hidden, &mut list),
    }
    let mixture = config.mixture.as_ref().filter(|mixture| mixture.at(layer));
    match mixture {
        Some(mixture) => router(mixture, hidden, &mut list),
        None => dense(config, &mut list),
    }
    let named = list.into_iter().map(|(weight, shape)| (Weight::Layer(layer, weight), shape));
    named.chain(mixture.into_iter().flat_map(|mixture| experts(mixture, hidden, layer))).collect()
}

fn router(mixture: &Mixture, hidden: usize, list: &mut LayerList) {
    let (experts, shared) = (mixture.experts as usize, mixture.shared_ffn as usize);
    list.push((LayerWeight::Router, vec![experts, hidden]));
    if mixture.routing.correction_bias {
        list.push((LayerWeight::RouterBias, vec![experts]));
    }
    if shared > 0 {
        list.extend([
            (LayerWeight::SharedGate, vec![shared, hidden]),
            (LayerWeight::SharedUp, vec![shared, hidden]),
            (LayerWeight::SharedDown, vec![hidden, shared]),
        ]);
    }
}

fn experts(mixture: &Mixture, hidden: usize, layer: u32) -> impl Iterator<Item = (Weight, Vec<usize>)> {
    let ffn = mixture.expert_ffn as usize;
    let shapes = [
        (ExpertWeight::Gate, [ffn, hidden]),
        (ExpertWeight::Up, [ffn, hidden]),
        (ExpertWeight::Down, [hidden, ffn]),
    ];
    let of =
        move |expert| shapes.map(|(weight, shape)| (Weight::Expert(layer, expert, weight), shape.to_vec()));
    (0..mixture.experts).flat_map(of)
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

fn latent(attention: &LatentAttention, hidden: usize, list: &mut LayerList) {
    let [heads, rank, nope, value] =
        [attention.heads, attention.kv_rank, attention.nope_dim, attention.value_dim].map(|n| n as usize);
    let queries = heads * attention.query_dim() as usize;
    match attention.query_rank.map(|rank| rank as usize) {
        Some(rank) => list.extend([
            (LayerWeight::QueryDown, vec![rank, hidden]),
            (LayerWeight::QueryDownNorm, vec![rank]),
            (LayerWeight::QueryUp, vec![queries, rank]),
        ]),
        None => list.push((LayerWeight::Query, vec![queries, hidden])),
    }
    list.extend([
        (LayerWeight::KvDown, vec![attention.kept_dim() as usize, hidden]),
        (LayerWeight::KvDownNorm, vec![rank]),
        (LayerWeight::AttentionOutput, vec![hidden, heads * value]),
    ]);
    if attention.split_up {
        list.extend([
            (LayerWeight::KeyUp, vec![heads, rank, nope]),
            (LayerWeight::ValueUp, vec![heads, value, rank]),
        ]);
    } else {
        list.push((LayerWeight::KvUp, vec![heads * (nope + value), rank]));
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
