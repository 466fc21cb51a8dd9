//! The attention blocks of a model, in the kind that its family has.

use baton_checkpoint::{self as checkpoint, ModelConfig};

use super::{grouped_query::GroupedQuery, latent::Latent, loader::Loader};
use crate::{RuntimeError, device::Device};

/// All layers' weights of one kind, and the activations they share.
pub(super) enum Attention<D: Device> {
    GroupedQuery(GroupedQuery<D>),
    Latent(Latent<D>),
}

impl<D: Device> Attention<D> {
    pub(super) fn new(device: &mut D, config: &ModelConfig) -> Result<Self, RuntimeError> {
        match &config.attention {
            checkpoint::Attention::GroupedQuery(shape) => {
                GroupedQuery::new(device, shape, config.rms_eps).map(Self::GroupedQuery)
            }
            checkpoint::Attention::Latent(shape) => {
                Latent::new(device, shape, config.rope.order).map(Self::Latent)
            }
        }
    }

    /// Loads the next layer.
    pub(super) fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        match self {
            Self::GroupedQuery(attention) => attention.load_layer(loader, layer),
            Self::Latent(attention) => attention.load_layer(loader, layer),
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
            Self::Latent(attention) => attention.append(device, plan, layer, normed),
        }
    }

    /// Keeps of what `append` computed the rows whose logits are wanted; `attend` is then given their plan.
    pub(super) fn select_logits_rows(&mut self, device: &mut D, plan: &D::Plan) -> Result<(), RuntimeError> {
        match self {
            Self::GroupedQuery(attention) => attention.select_logits_rows(device, plan),
            Self::Latent(attention) => attention.select_logits_rows(device, plan),
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
            Self::Latent(attention) => attention.attend(device, plan, layer, delta),
        }
    }
}
