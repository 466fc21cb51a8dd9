//! The feed-forward blocks of a model: all layers' weights, and the activations they share.

use baton_checkpoint::{ExpertWeight, LayerWeight, Mixture, ModelConfig, Weight};

use super::loader::{Loader, plain};
use crate::{
    RuntimeError,
    device::{Device, Expert, RowOrder},
};

/// A model's feed-forward blocks.
pub(super) struct FeedForward<D: Device> {
    layers: Vec<Block<D>>,
    dense: GatedRoom<D>,
    /// Where some layers are mixtures.
    mixture: Option<MixtureRoom<D>>,
}

enum Block<D: Device> {
    Dense(Gated<D>),
    Mixture(Experts<D>),
}

/// `down(silu(gate(x)) * up(x))`.
struct Gated<D: Device> {
    /// Gate and up stacked.
    gate_up: D::Linear,
    down: D::Linear,
}

/// Some of many [`Gated`] for each row, and some that all rows share.
struct Experts<D: Device> {
    router: D::Linear,
    bias: Option<D::Vector>,
    experts: Vec<Expert<D::Linear>>,
    /// Those that all rows go through, as one.
    shared: Option<Gated<D>>,
}

/// Activations of a [`Gated`].
struct GatedRoom<D: Device> {
    gate_up: D::Tensor,
    gated: D::Tensor,
}

/// Activations of [`Experts`].
struct MixtureRoom<D: Device> {
    mixture: Mixture,
    scores: D::Tensor,
    routes: D::Routes,
    /// Of the shared experts, and their result.
    shared: Option<(GatedRoom<D>, D::Tensor)>,
}

impl<D: Device> FeedForward<D> {
    pub(super) fn new(device: &mut D, config: &ModelConfig) -> Result<Self, RuntimeError> {
        let dense = GatedRoom::new(device, config.ffn)?;
        let mixture = config.mixture.as_ref().map(|mixture| MixtureRoom::new(device, mixture, config.hidden));
        Ok(Self { layers: Vec::new(), dense, mixture: mixture.transpose()? })
    }

    /// Loads the next layer.
    pub(super) fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        let config = loader.config();
        let block = match config.mixture.as_ref().filter(|mixture| mixture.at(layer)) {
            Some(mixture) => Block::Mixture(Experts::load(loader, mixture, layer)?),
            None => {
                let bias = |weight| config.ffn_bias.then_some(weight);
                let gate_up = [
                    plain(layer, LayerWeight::Gate, bias(LayerWeight::GateBias)),
                    plain(layer, LayerWeight::Up, bias(LayerWeight::UpBias)),
                ];
                let down = plain(layer, LayerWeight::Down, bias(LayerWeight::DownBias));
                Block::Dense(Gated { gate_up: loader.linear(&gate_up)?, down: loader.linear(&[down])? })
            }
        };
        self.layers.push(block);
        Ok(())
    }

    pub(super) fn run(
        &mut self,
        device: &mut D,
        layer: u32,
        normed: &D::Tensor,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        match (&self.layers[layer as usize], &mut self.mixture) {
            (Block::Dense(weights), _) => self.dense.run(device, weights, normed, delta),
            (Block::Mixture(weights), Some(room)) => room.run(device, weights, normed, delta),
            (Block::Mixture(_), None) => unreachable!("only a configuration with a mixture has such layers"),
        }
    }
}

impl<D: Device> Experts<D> {
    fn load(loader: &mut Loader<'_, D>, mixture: &Mixture, layer: u32) -> Result<Self, RuntimeError> {
        let at = |weight| Weight::Layer(layer, weight);
        let router = loader.exact(at(LayerWeight::Router))?;
        let biased = mixture.routing.correction_bias;
        let bias = biased.then(|| loader.vector(at(LayerWeight::RouterBias))).transpose()?;
        let mut experts = Vec::with_capacity(mixture.experts as usize);
        for index in 0..mixture.experts {
            let part = |weight| (Weight::Expert(layer, index, weight), None, RowOrder::AsStored);
            let gate_up = loader.linear(&[part(ExpertWeight::Gate), part(ExpertWeight::Up)])?;
            experts.push(Expert { gate_up, down: loader.linear(&[part(ExpertWeight::Down)])? });
        }
        let shared = match mixture.shared_ffn {
            0 => None,
            _ => {
                let part = |weight| plain(layer, weight, None);
                let gate_up = [part(LayerWeight::SharedGate), part(LayerWeight::SharedUp)];
                let down = [part(LayerWeight::SharedDown)];
                Some(Gated { gate_up: loader.linear(&gate_up)?, down: loader.linear(&down)? })
            }
        };
        Ok(Self { router, bias, experts, shared })
    }
}

impl<D: Device> MixtureRoom<D> {
    fn new(device: &mut D, mixture: &Mixture, hidden: u32) -> Result<Self, RuntimeError> {
        let shared = match mixture.shared_ffn {
            0 => None,
            width => Some((GatedRoom::new(device, width)?, device.tensor(hidden as usize)?)),
        };
        Ok(Self {
            mixture: mixture.clone(),
            scores: device.tensor(mixture.experts as usize)?,
            routes: device.routes()?,
            shared,
        })
    }

    fn run(
        &mut self,
        device: &mut D,
        weights: &Experts<D>,
        normed: &D::Tensor,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        device.linear(normed, &weights.router, &mut self.scores)?;
        device.route(&self.scores, weights.bias.as_ref(), &self.mixture, &mut self.routes)?;
        let shared = match (&mut self.shared, &weights.shared) {
            (Some((room, result)), Some(weights)) => {
                room.run(device, weights, normed, result)?;
                Some(&*result)
            }
            _ => None,
        };
        device.experts(normed, &self.routes, &weights.experts, shared, delta)
    }
}

impl<D: Device> GatedRoom<D> {
    fn new(device: &mut D, width: u32) -> Result<Self, RuntimeError> {
        let width = width as usize;
        Ok(Self { gate_up: device.tensor(2 * width)?, gated: device.tensor(width)? })
    }

    fn run(
        &mut self,
        device: &mut D,
        weights: &Gated<D>,
        normed: &D::Tensor,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        device.linear(normed, &weights.gate_up, &mut self.gate_up)?;
        device.silu_mul(&self.gate_up, &mut self.gated)?;
        device.linear(&self.gated, &weights.down, delta)
    }
}
