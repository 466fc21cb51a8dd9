//! Brings weights from the checkpoint to the device and counts their bytes.

use baton_checkpoint::{Checkpoint, LayerWeight, ModelConfig, Weight};

use crate::{
    RuntimeError,
    device::{Device, LinearPart, RowOrder},
};

/// A matrix to be stacked: weight, bias and how its rows are ordered.
pub(super) type Stacked = (Weight, Option<Weight>, RowOrder);

pub(super) struct Loader<'a, D: Device> {
    pub(super) device: &'a mut D,
    checkpoint: &'a Checkpoint,
    total: u64,
    done: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

/// A matrix of a layer as it is stored, with a bias if `there` is one.
pub(super) fn plain(layer: u32, weight: LayerWeight, bias: Option<LayerWeight>) -> Stacked {
    (Weight::Layer(layer, weight), bias.map(|bias| Weight::Layer(layer, bias)), RowOrder::AsStored)
}

impl<'a, D: Device> Loader<'a, D> {
    pub(super) fn new(
        device: &'a mut D,
        checkpoint: &'a Checkpoint,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        Self { device, checkpoint, total: checkpoint.weight_bytes(), done: 0, progress }
    }

    pub(super) fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    /// Loads matrices, stacked by output.
    pub(super) fn linear(&mut self, stacked: &[Stacked]) -> Result<D::Linear, RuntimeError> {
        let checkpoint = self.checkpoint;
        let parts = stacked
            .iter()
            .map(|&(weight, bias, rows)| {
                let bias = bias.map(|bias| checkpoint.tensor(bias)).transpose()?;
                Ok(LinearPart { name: weight.to_string(), weight: checkpoint.tensor(weight)?, bias, rows })
            })
            .collect::<Result<Vec<_>, RuntimeError>>()?;
        let (done, total, progress) = (&mut self.done, self.total, &mut *self.progress);
        let linear = self.device.load_linear(&parts, &mut |bytes| {
            *done = (*done + bytes).min(total);
            progress(*done, total);
        })?;
        stacked.iter().for_each(|&(weight, ..)| checkpoint.release(weight));
        Ok(linear)
    }

    pub(super) fn vector(&mut self, weight: Weight) -> Result<D::Vector, RuntimeError> {
        let view = self.checkpoint.tensor(weight)?;
        self.done += view.bytes.len() as u64;
        self.device.load_vector(&view)
    }

    /// Says that all is loaded.
    pub(super) fn finish(self) {
        (self.progress)(self.total, self.total);
    }
}
