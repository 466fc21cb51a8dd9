//! The attention blocks of a model: all layers' weights of one kind, and the activations they share.

use baton_checkpoint::{self as checkpoint, LayerWeight, Weight};

use super::loader::{Loader, plain};
use crate::{
    RuntimeError,
    device::{Device, RowOrder},
};

/// A model's attention, in the kind that its family has.
pub(super) enum Attention<D: Device> {
    GroupedQuery(GroupedQuery<D>),
}

impl<D: Device> Attention<D> {
    pub(super) fn new(device: &mut D, config: &checkpoint::ModelConfig) -> Result<Self, RuntimeError> {
        match &config.attention {
            checkpoint::Attention::GroupedQuery(shape) => {
                GroupedQuery::new(device, shape, config.rms_eps).map(Self::GroupedQuery)
            }
        }
    }

    /// Loads the next layer.
    pub(super) fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        match self {
            Self::GroupedQuery(attention) => attention.load_layer(loader, layer),
        }
    }

    /// Computes what the cache keeps of every row and writes it to the pool.
    pub(super) fn append(
        &mut self,
        device: &mut D,
        plan: &D::Plan,
        layer: u32,
        normed: &D::Tensor,
    ) -> Result<(), RuntimeError> {
        match self {
            Self::GroupedQuery(attention) => attention.append(device, plan, layer, normed),
        }
    }

    /// Attends and projects; follows `append` of the same layer.
    pub(super) fn attend(
        &mut self,
        device: &mut D,
        plan: &D::Plan,
        layer: u32,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        match self {
            Self::GroupedQuery(attention) => attention.attend(device, plan, layer, delta),
        }
    }
}

/// Keys and values shared by groups of query heads.
pub(super) struct GroupedQuery<D: Device> {
    epsilon: f32,
    layers: Vec<GroupedQueryLayer<D>>,
    qkv: D::Tensor,
    attended: D::Tensor,
}

struct GroupedQueryLayer<D: Device> {
    /// Q, K and V stacked.
    qkv: D::Linear,
    /// Of each head of Q and of K.
    head_norms: Option<(D::Vector, D::Vector)>,
    output: D::Linear,
}

impl<D: Device> GroupedQuery<D> {
    fn new(device: &mut D, shape: &checkpoint::GroupedQuery, epsilon: f32) -> Result<Self, RuntimeError> {
        let (query, kv) = (shape.query_width() as usize, shape.kv_width() as usize);
        Ok(Self {
            epsilon,
            layers: Vec::new(),
            qkv: device.tensor(query + 2 * kv)?,
            attended: device.tensor(query)?,
        })
    }

    fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        let config = loader.config();
        let checkpoint::Attention::GroupedQuery(shape) = &config.attention;
        let rotary = RowOrder::Rotary { head_dim: shape.head_dim as usize, stored: config.rope.order };
        let biased = |bias| shape.qkv_bias.then_some(bias);
        let rotated = |weight, bias| {
            let (weight, bias, _) = plain(layer, weight, biased(bias));
            (weight, bias, rotary)
        };
        let qkv = loader.linear(&[
            rotated(LayerWeight::Query, LayerWeight::QueryBias),
            rotated(LayerWeight::Key, LayerWeight::KeyBias),
            plain(layer, LayerWeight::Value, biased(LayerWeight::ValueBias)),
        ])?;
        let mut norm = |weight| loader.vector(Weight::Layer(layer, weight));
        let head_norms = match shape.head_norms {
            true => Some((norm(LayerWeight::QueryNorm)?, norm(LayerWeight::KeyNorm)?)),
            false => None,
        };
        let bias = shape.output_bias.then_some(LayerWeight::AttentionOutputBias);
        let output = loader.linear(&[plain(layer, LayerWeight::AttentionOutput, bias)])?;
        self.layers.push(GroupedQueryLayer { qkv, head_norms, output });
        Ok(())
    }

    fn append(
        &mut self,
        device: &mut D,
        plan: &D::Plan,
        layer: u32,
        normed: &D::Tensor,
    ) -> Result<(), RuntimeError> {
        let weights = &self.layers[layer as usize];
        device.linear(normed, &weights.qkv, &mut self.qkv)?;
        if let Some((query, key)) = &weights.head_norms {
            device.head_norm(&mut self.qkv, query, key, self.epsilon)?;
        }
        device.rope(plan, &mut self.qkv)?;
        device.append_kv(plan, layer, &self.qkv)
    }

    fn attend(
        &mut self,
        device: &mut D,
        plan: &D::Plan,
        layer: u32,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        device.attention(plan, layer, &self.qkv, &mut self.attended)?;
        device.linear(&self.attended, &self.layers[layer as usize].output, delta)
    }
}
