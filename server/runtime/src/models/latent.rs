//! Multi-head latent attention in the absorbed form: what would make every head's key of a token's latent is applied to
//! the head's query instead, and what would make its value to the weighted sum of latents. So the cache keeps a token's
//! latent once for all heads, and prompts and single tokens go the same way.

use std::mem;

use baton_checkpoint::{self as checkpoint, Dtype, LayerWeight, RopeOrder, TensorView, Weight};

use super::loader::{Loader, plain};
use crate::{RuntimeError, device::Device};

/// All layers' weights, and the activations they share.
pub(super) struct Latent<D: Device> {
    shape: checkpoint::LatentAttention,
    order: RopeOrder,
    layers: Vec<Layer<D>>,
    /// The latent of queries, and it normalised.
    query_latent: Option<(D::Tensor, D::Tensor)>,
    /// Parts of queries, `[rows][heads][nope_dim]` and `[rows][heads][rope_dim]`.
    query: D::Tensor,
    rotated: D::Tensor,
    /// Rows of the two whose logits are wanted.
    selected: [D::Tensor; 2],
    /// Queries as latents ask for them, `[rows][heads][kv_rank]`.
    absorbed: D::Tensor,
    /// What the cache keeps of each row.
    kept: D::Tensor,
    /// Sums of latents, `[rows][heads][kv_rank]`, and values made of them.
    attended: D::Tensor,
    values: D::Tensor,
}

struct Layer<D: Device> {
    /// To the latent of queries, and its norm.
    query_down: Option<(D::Linear, D::Vector)>,
    /// To the parts of queries that are not rotated, and to those that are.
    query: D::Linear,
    rotated: D::Linear,
    /// To the latent and the rotated key side by side.
    kv_down: D::Linear,
    kv_norm: D::Vector,
    /// Of each head: `[kv_rank, nope_dim]`.
    key_up: Vec<D::Linear>,
    /// Of each head: `[value_dim, kv_rank]`.
    value_up: Vec<D::Linear>,
    output: D::Linear,
}

/// Matrices of each head: for keys, and for values.
type ByHead<D> = (Vec<<D as Device>::Linear>, Vec<<D as Device>::Linear>);

impl<D: Device> Latent<D> {
    pub(super) fn new(
        device: &mut D,
        shape: &checkpoint::LatentAttention,
        order: RopeOrder,
    ) -> Result<Self, RuntimeError> {
        let mut tensor = |width: u32| device.tensor(width as usize);
        let query_latent = match shape.query_rank {
            Some(rank) => Some((tensor(rank)?, tensor(rank)?)),
            None => None,
        };
        Ok(Self {
            query_latent,
            query: tensor(shape.heads * shape.nope_dim)?,
            rotated: tensor(shape.heads * shape.rope_dim)?,
            selected: [tensor(shape.heads * shape.nope_dim)?, tensor(shape.heads * shape.rope_dim)?],
            absorbed: tensor(shape.heads * shape.kv_rank)?,
            kept: tensor(shape.kept_dim())?,
            attended: tensor(shape.heads * shape.kv_rank)?,
            values: tensor(shape.heads * shape.value_dim)?,
            shape: shape.clone(),
            order,
            layers: Vec::new(),
        })
    }

    pub(super) fn load_layer(&mut self, loader: &mut Loader<'_, D>, layer: u32) -> Result<(), RuntimeError> {
        let at = |weight| Weight::Layer(layer, weight);
        let query_down = match self.shape.query_rank {
            Some(_) => Some((
                loader.linear(&[plain(layer, LayerWeight::QueryDown, None)])?,
                loader.vector(at(LayerWeight::QueryDownNorm))?,
            )),
            None => None,
        };
        let (query, rotated) = self.load_queries(loader, layer)?;
        let (rank, rope) = (self.shape.kv_rank as usize, self.shape.rope_dim as usize);
        let order = self.order;
        let kv_rows = (0..rank).chain((0..rope).map(|row| rank + order.stored_row(row, rope)));
        let kv_down = at(LayerWeight::KvDown);
        let view = loader.stored(kv_down)?;
        let kv_down_linear = loader.rows(kv_down, &view, kv_rows)?;
        loader.done_with(kv_down)?;
        let kv_norm = loader.vector(at(LayerWeight::KvDownNorm))?;
        let (key_up, value_up) = self.load_up(loader, layer)?;
        let output = loader.linear(&[plain(layer, LayerWeight::AttentionOutput, None)])?;
        self.layers.push(Layer {
            query_down,
            query,
            rotated,
            kv_down: kv_down_linear,
            kv_norm,
            key_up,
            value_up,
            output,
        });
        Ok(())
    }

    /// What makes queries: the rows of all heads that are not rotated, and those that are, in halves.
    fn load_queries(
        &self,
        loader: &mut Loader<'_, D>,
        layer: u32,
    ) -> Result<(D::Linear, D::Linear), RuntimeError> {
        let shape = &self.shape;
        let direct = shape.query_rank.is_none();
        let weight = Weight::Layer(layer, if direct { LayerWeight::Query } else { LayerWeight::QueryUp });
        let [heads, nope, rope] = [shape.heads, shape.nope_dim, shape.rope_dim].map(|n| n as usize);
        let (view, order) = (loader.stored(weight)?, self.order);
        let starts = || (0..heads).map(|head| head * (nope + rope));
        let plain_rows = starts().flat_map(|start| start..start + nope);
        let rotated_rows =
            starts().flat_map(|start| (0..rope).map(move |row| start + nope + order.stored_row(row, rope)));
        let parts = (loader.rows(weight, &view, plain_rows)?, loader.rows(weight, &view, rotated_rows)?);
        loader.done_with(weight)?;
        Ok(parts)
    }

    /// What would make keys, transposed for use on queries, and what makes values, head by head.
    fn load_up(&self, loader: &mut Loader<'_, D>, layer: u32) -> Result<ByHead<D>, RuntimeError> {
        let shape = &self.shape;
        let [heads, rank, nope, value] =
            [shape.heads, shape.kv_rank, shape.nope_dim, shape.value_dim].map(|n| n as usize);
        let (mut keys, mut values) = (Vec::with_capacity(heads), Vec::with_capacity(heads));
        if shape.split_up {
            let [key_up, value_up] =
                [LayerWeight::KeyUp, LayerWeight::ValueUp].map(|weight| Weight::Layer(layer, weight));
            let (key_view, value_view) = (loader.stored(key_up)?, loader.stored(value_up)?);
            for head in 0..heads {
                keys.push(loader.rows(key_up, &key_view, head * rank..(head + 1) * rank)?);
                values.push(loader.rows(value_up, &value_view, head * value..(head + 1) * value)?);
            }
            loader.done_with(key_up)?;
            loader.done_with(value_up)?;
            return Ok((keys, values));
        }
        let up = Weight::Layer(layer, LayerWeight::KvUp);
        let view = loader.stored(up)?;
        for head in 0..heads {
            let start = head * (nope + value);
            let (dtype, bytes) = transposed(&view, start..start + nope);
            let shape = [rank, nope];
            let turned = TensorView::new(dtype, &shape, &bytes);
            keys.push(loader.rows(up, &turned, 0..rank)?);
            values.push(loader.rows(up, &view, start + nope..start + nope + value)?);
        }
        loader.done_with(up)?;
        Ok((keys, values))
    }

    pub(super) fn append(
        &mut self,
        device: &mut D,
        plan: &D::Plan,
        layer: u32,
        normed: &D::Tensor,
    ) -> Result<(), RuntimeError> {
        let (weights, epsilon) = (&self.layers[layer as usize], self.shape.norm_eps);
        let source = match (&weights.query_down, &mut self.query_latent) {
            (Some((down, norm)), Some((latent, normed_latent))) => {
                device.linear(normed, down, latent)?;
                device.rms_norm(latent, norm, epsilon, normed_latent)?;
                &*normed_latent
            }
            _ => normed,
        };
        device.linear(source, &weights.query, &mut self.query)?;
        device.linear(source, &weights.rotated, &mut self.rotated)?;
        device.linear(normed, &weights.kv_down, &mut self.kept)?;
        device.append_latents(plan, layer, &mut self.kept, &weights.kv_norm, epsilon)
    }

    pub(super) fn select_logits_rows(&mut self, device: &mut D, plan: &D::Plan) -> Result<(), RuntimeError> {
        for (rows, selected) in [&mut self.query, &mut self.rotated].into_iter().zip(&mut self.selected) {
            device.select_logits_rows(plan, rows, selected)?;
            mem::swap(rows, selected);
        }
        Ok(())
    }

    pub(super) fn attend(
        &mut self,
        device: &mut D,
        plan: &D::Plan,
        layer: u32,
        delta: &mut D::Tensor,
    ) -> Result<(), RuntimeError> {
        let weights = &self.layers[layer as usize];
        device.rope_latent_queries(plan, &mut self.rotated)?;
        device.linear_by_head(&self.query, &weights.key_up, &mut self.absorbed)?;
        device.latent_attention(plan, layer, (&self.absorbed, &self.rotated), &mut self.attended)?;
        device.linear_by_head(&self.attended, &weights.value_up, &mut self.values)?;
        device.linear(&self.values, &weights.output, delta)
    }
}

/// The transpose of a run of rows: elements as they are stored if each stands alone, else as f32.
fn transposed(view: &TensorView<'_>, rows: std::ops::Range<usize>) -> (Dtype, Vec<u8>) {
    let (count, columns) = (rows.len(), view.columns());
    let alone = view.row_dtype().block_elements() == 1;
    let dtype = if alone { view.row_dtype() } else { Dtype::F32 };
    let size = dtype.block_bytes();
    let mut turned = vec![0; count * columns * size];
    let mut plain = vec![0.0; columns];
    let mut row_bytes = Vec::new();
    for (to, row) in rows.enumerate() {
        row_bytes.clear();
        if alone {
            view.append_row(row, &mut row_bytes);
        } else {
            view.dequantize_row(row, &mut plain);
            row_bytes.extend(plain.iter().flat_map(|value| value.to_le_bytes()));
        }
        for (column, element) in row_bytes.chunks_exact(size).enumerate() {
            turned[(column * count + to) * size..][..size].copy_from_slice(element);
        }
    }
    (dtype, turned)
}
