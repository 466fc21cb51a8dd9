//! Brings weights from the checkpoint to the device and counts their bytes.

use baton_checkpoint::{Checkpoint, Dtype, LayerWeight, ModelConfig, TensorView, Weight};

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

    /// A tensor as it is stored, to be loaded by [`Self::rows`]; [`Self::done_with`] follows.
    pub(super) fn stored(&self, weight: Weight) -> Result<TensorView<'a>, RuntimeError> {
        Ok(self.checkpoint.tensor(weight)?)
    }

    /// Loads some rows of a tensor, or of what was made of it, in the order given.
    pub(super) fn rows(
        &mut self,
        weight: Weight,
        view: &TensorView<'_>,
        rows: impl IntoIterator<Item = usize>,
    ) -> Result<D::Linear, RuntimeError> {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for row in rows {
            view.append_row(row, &mut bytes);
            count += 1;
        }
        let shape = [count, view.columns()];
        let picked = TensorView::new(view.row_dtype(), &shape, &bytes);
        let part =
            LinearPart { name: weight.to_string(), weight: picked, bias: None, rows: RowOrder::AsStored };
        self.device.load_linear(&[part], &mut |_| {})
    }

    /// Counts a tensor's bytes as loaded.
    pub(super) fn done_with(&mut self, weight: Weight) -> Result<(), RuntimeError> {
        let bytes = self.checkpoint.tensor(weight)?.bytes.len();
        self.checkpoint.release(weight);
        self.took(bytes);
        Ok(())
    }

    /// Loads a matrix as f32 whatever it is stored as: for a router, where a little rounding may choose other experts.
    pub(super) fn exact(&mut self, weight: Weight) -> Result<D::Linear, RuntimeError> {
        let stored = self.checkpoint.tensor(weight)?;
        let bytes: Vec<u8> = stored.to_f32().into_iter().flat_map(f32::to_le_bytes).collect();
        let view = TensorView::new(Dtype::F32, stored.shape, &bytes);
        let part =
            LinearPart { name: weight.to_string(), weight: view, bias: None, rows: RowOrder::AsStored };
        let linear = self.device.load_linear(&[part], &mut |_| {})?;
        self.took(stored.bytes.len());
        Ok(linear)
    }

    pub(super) fn vector(&mut self, weight: Weight) -> Result<D::Vector, RuntimeError> {
        let view = self.checkpoint.tensor(weight)?;
        let vector = self.device.load_vector(&view)?;
        self.took(view.bytes.len());
        Ok(vector)
    }

    /// Counts bytes that were taken in.
    fn took(&mut self, bytes: usize) {
        self.done = (self.done + bytes as u64).min(self.total);
        (self.progress)(self.done, self.total);
    }

    /// Says that all is loaded.
    pub(super) fn finish(self) {
        self.device.finish_loading();
        (self.progress)(self.total, self.total);
    }
}
