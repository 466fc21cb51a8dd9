//! The decoder-only transformer that all families are: embedding, layers of attention and feed-forward blocks around a
//! residual stream, a norm and an output projection.

use std::{mem, sync::Arc};

use baton_checkpoint::{Checkpoint, LayerWeight, ModelConfig, Weight};

use super::{attention::Attention, feed_forward::FeedForward, loader::Loader};
use crate::{
    BlockId, Executor, KvPool, LoadOptions, Logits, ModelShape, RuntimeError, SequenceChunk,
    batch::{self, Step},
    device::{Device, RowOrder},
};

/// RMS norms of one layer.
struct Norms<D: Device> {
    attention: D::Vector,
    feed_forward: D::Vector,
}

/// Activations of the residual stream, kept from step to step.
struct Activations<D: Device> {
    /// The residual stream, `[rows][hidden]`.
    stream: D::Tensor,
    /// What a block of the model adds to the stream.
    delta: D::Tensor,
    normed: D::Tensor,
    /// Rows of `stream` whose logits are wanted.
    selected: D::Tensor,
    logits: D::Tensor,
}

/// A model on a device.
pub(crate) struct Decoder<D: Device> {
    device: D,
    shape: ModelShape,
    epsilon: f32,
    max_batch_tokens: usize,
    embedding: D::Linear,
    norms: Vec<Norms<D>>,
    attention: Attention<D>,
    feed_forward: FeedForward<D>,
    output_norm: D::Vector,
    /// None where the embedding serves as the output projection.
    output: Option<D::Linear>,
    activations: Activations<D>,
}

impl<D: Device> Activations<D> {
    fn new(device: &mut D, config: &ModelConfig) -> Result<Self, RuntimeError> {
        let hidden = config.hidden as usize;
        Ok(Self {
            stream: device.tensor(hidden)?,
            delta: device.tensor(hidden)?,
            normed: device.tensor(hidden)?,
            selected: device.tensor(hidden)?,
            logits: device.tensor(config.vocabulary as usize)?,
        })
    }
}

impl<D: Device> Decoder<D> {
    /// Loads all weights. `progress(done, total)` counts bytes of the checkpoint.
    pub(crate) fn load(
        mut device: D,
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, RuntimeError> {
        let config = checkpoint.config();
        let activations = Activations::new(&mut device, config)?;
        let mut attention = Attention::new(&mut device, config)?;
        let mut feed_forward = FeedForward::new(&mut device, config)?;
        let mut loader = Loader::new(&mut device, checkpoint, progress);
        let whole = |weight| [(weight, None, RowOrder::AsStored)];
        let embedding = loader.linear(&whole(Weight::Embedding))?;
        let mut norms = Vec::new();
        for layer in 0..config.layers {
            let attention_norm = loader.vector(Weight::Layer(layer, LayerWeight::AttentionNorm))?;
            attention.load_layer(&mut loader, layer)?;
            let ffn_norm = loader.vector(Weight::Layer(layer, LayerWeight::FfnNorm))?;
            feed_forward.load_layer(&mut loader, layer)?;
            norms.push(Norms { attention: attention_norm, feed_forward: ffn_norm });
        }
        let output_norm = loader.vector(Weight::OutputNorm)?;
        let untied = !config.tied_embeddings;
        let output = untied.then(|| loader.linear(&whole(Weight::Output))).transpose()?;
        loader.finish();
        Ok(Self {
            shape: ModelShape {
                layers: config.layers,
                vocabulary: config.vocabulary,
                context_tokens: config.context_tokens,
            },
            epsilon: config.rms_eps,
            max_batch_tokens: options.max_batch_tokens,
            device,
            embedding,
            norms,
            attention,
            feed_forward,
            output_norm,
            output,
            activations,
        })
    }

    pub(crate) fn device(&self) -> &D {
        &self.device
    }

    /// Runs all layers; afterwards `activations.logits` has the rows asked for.
    fn run(&mut self, step: &Step<'_>, on_layer: &mut dyn FnMut(u32)) -> Result<(), RuntimeError> {
        let (device, a, epsilon) = (&mut self.device, &mut self.activations, self.epsilon);
        let mut plan = device.plan(step)?;
        device.embed(&plan, &self.embedding, &mut a.stream)?;
        for (layer, norms) in (0..).zip(&self.norms) {
            if layer == 0 {
                device.rms_norm(&a.stream, &norms.attention, epsilon, &mut a.normed)?;
            } else {
                device.add_rms_norm(&mut a.stream, &a.delta, &norms.attention, epsilon, &mut a.normed)?;
            }
            self.attention.append(device, &plan, layer, &a.normed)?;
            on_layer(layer);
            if layer + 1 == self.shape.layers && step.logits_rows.len() < step.tokens.len() {
                if step.logits_rows.is_empty() {
                    return Ok(());
                }
                // Nothing reads the other rows any more.
                device.select_logits_rows(&plan, &a.stream, &mut a.selected)?;
                mem::swap(&mut a.stream, &mut a.selected);
                self.attention.select_logits_rows(device, &plan)?;
                plan = device.plan(&step.of_logits_rows())?;
            }
            self.attention.attend(device, &plan, layer, &mut a.delta)?;
            device.add_rms_norm(&mut a.stream, &a.delta, &norms.feed_forward, epsilon, &mut a.normed)?;
            self.feed_forward.run(device, layer, &a.normed, &mut a.delta)?;
        }
        device.add_rms_norm(&mut a.stream, &a.delta, &self.output_norm, epsilon, &mut a.normed)?;
        device.linear(&a.normed, self.output.as_ref().unwrap_or(&self.embedding), &mut a.logits)
    }
}

impl<D: Device> Executor for Decoder<D> {
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
        Ok(Logits::new(self.device.read(&self.activations.logits)?, vocabulary))
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), RuntimeError> {
        batch::check_copies(copies, self.device.kv_pool().layout())?;
        self.device.copy_blocks(copies)
    }
}
