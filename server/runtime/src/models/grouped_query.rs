//! Grouped-query attention: keys and values shared by groups of query heads, with biases and norms of heads where the
//! family has them.

use std::mem;

use baton_checkpoint::{self as checkpoint, LayerWeight, Weight};

use super::loader::{Loader, plain};
use crate::{
    RuntimeError,
    device::{Device, RowOrder},
};

/// All layers' weights, and the activations they share.
pub(super) struct GroupedQuery<D: Device> {
    shape: checkpoint::GroupedQuery,
    epsilon: f32,
    layers: Vec<GroupedQueryLayer<D>>,
    qkv: D::Tensor,
    /// Rows of `qkv` whose logits are wanted.
    selected: D::Tensor,
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
    pub(super) fn new(
        device: &mut D,
        shape: &checkpoint::GroupedQuery,
        epsilon: f32,
    ) -> Result<Self, RuntimeError> {
        let (query, kv) = (shape.query_width() as usize, shape.kv_width() as usize);
        Ok(Self {
            shape: shape.clone(),
            epsilon,
            layers: Vec::new(),
            qkv: device.tensor(query + 2 * kv)?,
            selected: device.tensor(query + 2 * kv)?,
            attended: device.tensor(query)?,
        })
    }

    pub(super) fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        let shape = &self.shape;
        let stored = loader.config().rope.order;
        let rotary = RowOrder::Rotary { head_dim: shape.head_dim as usize, stored };
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

    pub(super) fn append(
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

    pub(super) fn select_logits_rows(&mut self, device: &mut D, plan: &D::Plan) -> Result<(), RuntimeError> {
        device.select_logits_rows(plan, &self.qkv, &mut self.selected)?;
        mem::swap(&mut self.qkv, &mut self.selected);
        Ok(())
    }

    pub(super) fn attend(
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
