//! The feed-forward blocks of a model: all layers' weights, and the activations they share.

use baton_checkpoint::{LayerWeight, ModelConfig};

use super::loader::{Loader, plain};
use crate::{RuntimeError, device::Device};

/// A model's feed-forward blocks.
pub(super) struct FeedForward<D: Device> {
    layers: Vec<Gated<D>>,
    room: GatedRoom<D>,
}

/// `down(silu(gate(x)) * up(x))`.
struct Gated<D: Device> {
    /// Gate and up stacked.
    gate_up: D::Linear,
    down: D::Linear,
}

/// Activations of a [`Gated`].
struct GatedRoom<D: Device> {
    gate_up: D::Tensor,
    gated: D::Tensor,
}

impl<D: Device> FeedForward<D> {
    pub(super) fn new(device: &mut D, config: &ModelConfig) -> Result<Self, RuntimeError> {
        Ok(Self { layers: Vec::new(), room: GatedRoom::new(device, config.ffn)? })
    }

    /// Loads the next layer.
    pub(super) fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        let bias = |weight| loader.config().ffn_bias.then_some(weight);
        let gate_up = [
            plain(layer, LayerWeight::Gate, bias(LayerWeight::GateBias)),
            plain(layer, LayerWeight::Up, bias(LayerWeight::UpBias)),
        ];
        let down = plain(layer, LayerWeight::Down, bias(LayerWeight::DownBias));
        self.layers.push(Gated { gate_up: loader.linear(&gate_up)?, down: loader.linear(&[down])? });
        Ok(())
    }

    pub(super) fn run(
        &mut self,
        device: &mut D,
        layer: u32,
        normed: &D::Tensor,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        self.room.run(device, &self.layers[layer as usize], normed, delta)
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
