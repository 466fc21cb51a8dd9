//! The LLaMA family: RMS norm, rotary positions, grouped-query attention, gated SiLU.

use std::sync::Arc;

use baton_checkpoint::{Checkpoint, LayerWeight, ModelConfig, Weight};

use crate::{
    BlockId, Executor, KvPool, LoadOptions, Logits, ModelShape, RuntimeError, SequenceChunk,
    batch::{self, Step},
    device::{Device, LinearPart, RowOrder},
};

/// Weights of one layer.
struct Layer<D: Device> {
    attention_norm: D::Vector,
    /// Q, K and V stacked.
    qkv: D::Linear,
    attention_output: D::Linear,
    ffn_norm: D::Vector,
    /// Gate and up stacked.
    gate_up: D::Linear,
    down: D::Linear,
}

/// Activations, kept from step to step.
struct Activations<D: Device> {
    /// The residual stream, `[rows][hidden]`.
    stream: D::Tensor,
    /// What a block of the model adds to the stream.
    delta: D::Tensor,
    normed: D::Tensor,
    qkv: D::Tensor,
    attended: D::Tensor,
    gate_up: D::Tensor,
    gated: D::Tensor,
    /// Rows of `normed` whose logits are wanted.
    last: D::Tensor,
    logits: D::Tensor,
}

/// A model of the family on a device.
pub(crate) struct Llama<D: Device> {
    device: D,
    shape: ModelShape,
    epsilon: f32,
    max_batch_tokens: usize,
    embedding: D::Linear,
    layers: Vec<Layer<D>>,
    output_norm: D::Vector,
    /// None where the embedding serves as the output projection.
    output: Option<D::Linear>,
    activations: Activations<D>,
}

/// Loads tensors and counts their bytes.
struct Loader<'a, D: Device> {
    device: &'a mut D,
    checkpoint: &'a Checkpoint,
    total: u64,
    done: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<D: Device> Loader<'_, D> {
    fn linear(&mut self, weights: &[(Weight, Option<Weight>, RowOrder)]) -> Result<D::Linear, RuntimeError> {
        let checkpoint = self.checkpoint;
        let parts = weights
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
        weights.iter().for_each(|&(weight, ..)| checkpoint.release(weight));
        Ok(linear)
    }

    fn vector(&mut self, weight: Weight) -> Result<D::Vector, RuntimeError> {
        let view = self.checkpoint.tensor(weight)?;
        self.done += view.bytes.len() as u64;
        self.device.load_vector(&view)
    }

    fn layer(&mut self, index: u32) -> Result<Layer<D>, RuntimeError> {
        let config = self.checkpoint.config();
        let at = |weight| Weight::Layer(index, weight);
        let rotary = RowOrder::Rotary { head_dim: config.head_dim as usize, stored: config.rope.order };
        let bias = |there: bool, weight| there.then_some(at(weight));
        let plain = |weight, there, its_bias| (at(weight), bias(there, its_bias), RowOrder::AsStored);
        let (qkv, out, ffn) = (config.qkv_bias, config.attention_output_bias, config.ffn_bias);
        Ok(Layer {
            attention_norm: self.vector(at(LayerWeight::AttentionNorm))?,
            qkv: self.linear(&[
                (at(LayerWeight::Query), bias(qkv, LayerWeight::QueryBias), rotary),
                (at(LayerWeight::Key), bias(qkv, LayerWeight::KeyBias), rotary),
                plain(LayerWeight::Value, qkv, LayerWeight::ValueBias),
            ])?,
            attention_output: self.linear(&[plain(
                LayerWeight::AttentionOutput,
                out,
                LayerWeight::AttentionOutputBias,
            )])?,
            ffn_norm: self.vector(at(LayerWeight::FfnNorm))?,
            gate_up: self.linear(&[
                plain(LayerWeight::Gate, ffn, LayerWeight::GateBias),
                plain(LayerWeight::Up, ffn, LayerWeight::UpBias),
            ])?,
            down: self.linear(&[plain(LayerWeight::Down, ffn, LayerWeight::DownBias)])?,
        })
    }
}

impl<D: Device> Activations<D> {
    fn new(device: &mut D, config: &ModelConfig) -> Result<Self, RuntimeError> {
        let (hidden, ffn) = (config.hidden as usize, config.ffn as usize);
        let (query, kv) = (config.query_width() as usize, config.kv_width() as usize);
        Ok(Self {
            stream: device.tensor(hidden)?,
            delta: device.tensor(hidden)?,
            normed: device.tensor(hidden)?,
            qkv: device.tensor(query + 2 * kv)?,
            attended: device.tensor(query)?,
            gate_up: device.tensor(2 * ffn)?,
            gated: device.tensor(ffn)?,
            last: device.tensor(hidden)?,
            logits: device.tensor(config.vocabulary as usize)?,
        })
    }
}

impl<D: Device> Llama<D> {
    /// Loads all weights. `progress(done, total)` counts bytes of the checkpoint.
    pub(crate) fn load(
        mut device: D,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, RuntimeError> {
        let config = checkpoint.config();
        let total = checkpoint.weight_bytes();
        let mut loader = Loader { device: &mut device, checkpoint, total, done: 0, progress };
        let embedding = loader.linear(&[(Weight::Embedding, None, RowOrder::AsStored)])?;
        let layers = (0..config.layers).map(|index| loader.layer(index)).collect::<Result<Vec<_>, _>>()?;
        let output_norm = loader.vector(Weight::OutputNorm)?;
        let untied = !config.tied_embeddings;
        let output =
            untied.then(|| loader.linear(&[(Weight::Output, None, RowOrder::AsStored)])).transpose()?;
        progress(total, total);
        Ok(Self {
            shape: ModelShape {
                layers: config.layers,
                vocabulary: config.vocabulary,
                context_tokens: config.context_tokens,
            },
            epsilon: config.rms_eps,
            max_batch_tokens: options.max_batch_tokens,
            activations: Activations::new(&mut device, config)?,
            device,
            embedding,
            layers,
            output_norm,
            output,
        })
    }

    /// Runs all layers; afterwards `activations.logits` has the rows asked for.
    fn run(&mut self, step: &Step<'_>, on_layer: &mut dyn FnMut(u32)) -> Result<(), RuntimeError> {
        let (device, a, epsilon) = (&mut self.device, &mut self.activations, self.epsilon);
        let plan = device.plan(step)?;
        device.embed(&plan, &self.embedding, &mut a.stream)?;
        let mut pending = false;
        for (index, layer) in (0..).zip(&self.layers) {
            if pending {
                device.add_rms_norm(
                    &mut a.stream,
                    &a.delta,
                    &layer.attention_norm,
                    epsilon,
                    &mut a.normed,
                )?;
            } else {
                device.rms_norm(&a.stream, &layer.attention_norm, epsilon, &mut a.normed)?;
            }
            device.linear(&a.normed, &layer.qkv, &mut a.qkv)?;
            device.rope(&plan, &mut a.qkv)?;
            device.append_kv(&plan, index, &a.qkv)?;
            on_layer(index);
            if index + 1 == self.shape.layers && step.logits_rows.is_empty() {
                return Ok(());
            }
            device.attention(&plan, index, &a.qkv, &mut a.attended)?;
            device.linear(&a.attended, &layer.attention_output, &mut a.delta)?;
            device.add_rms_norm(&mut a.stream, &a.delta, &layer.ffn_norm, epsilon, &mut a.normed)?;
            device.linear(&a.normed, &layer.gate_up, &mut a.gate_up)?;
            device.silu_mul(&a.gate_up, &mut a.gated)?;
            device.linear(&a.gated, &layer.down, &mut a.delta)?;
            pending = true;
        }
        device.add_rms_norm(&mut a.stream, &a.delta, &self.output_norm, epsilon, &mut a.normed)?;
        device.select_logits_rows(&plan, &a.normed, &mut a.last)?;
        device.linear(&a.last, self.output.as_ref().unwrap_or(&self.embedding), &mut a.logits)
    }
}

impl<D: Device> Executor for Llama<D> {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn kv_pool(&self) -> &Arc<KvPool> {
        self.device.kv_pool()
    }

    fn max_batch_tokens(&self) -> usize {
        self.max_batch_tokens
    }

    fn forward(
        &mut self,
        batch: &[SequenceChunk<'_>],
        on_layer: &mut dyn FnMut(u32),
    ) -> Result<Logits<'_>, RuntimeError> {
        let layout = self.device.kv_pool().layout().clone();
        let step = batch::plan(batch, &self.shape, &layout, self.max_batch_tokens)?;
        self.run(&step, on_layer)?;
        let vocabulary = self.shape.vocabulary as usize;
        if step.logits_rows.is_empty() {
            return Ok(Logits::new(&[], vocabulary));
        }
        let logits = Logits::new(self.device.read(&self.activations.logits)?, vocabulary);
        // Without a way out in the middle the compiler looks at several values at once.
        let finite = |row: &[f32]| row.iter().fold(true, |finite, value| finite & value.is_finite());
        match logits.rows().zip(&step.logits_sequences).find(|(row, _)| !finite(row)) {
            Some((_, &sequence)) => Err(RuntimeError::NonFinite { sequence }),
            None => Ok(logits),
        }
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), RuntimeError> {
        batch::check_copies(copies, self.device.kv_pool().layout())?;
        self.device.copy_blocks(copies)
    }
}
