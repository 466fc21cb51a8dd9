//! Tensors by what they are for, and a view of one's bytes.

use std::fmt;

use half::bf16;

use crate::Dtype;

/// What a tensor is for. Both formats' names map to this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Weight {
    /// Token embedding, `[vocabulary, hidden]`.
    Embedding,
    Layer(u32, LayerWeight),
    /// Of a layer's expert: (layer, expert, what).
    Expert(u32, u32, ExpertWeight),
    /// RMS norm before the output projection, `[hidden]`.
    OutputNorm,
    /// Output projection, `[vocabulary, hidden]`; the embedding itself where that is tied.
    Output,
}

/// A tensor of one layer. Projections are `[out, in]`, so that each output element is a dot product with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerWeight {
    /// RMS norm before attention, `[hidden]`.
    AttentionNorm,
    /// `[heads * head_dim, hidden]`, rows of a head in the order of [`crate::Rope::order`]. In latent attention without
    /// a latent of queries `[heads * (nope_dim + rope_dim), hidden]`, where that order is of the last `rope_dim` rows.
    Query,
    /// `[heads * head_dim]`, in the order of [`crate::Rope::order`].
    QueryBias,
    /// `[kv_heads * head_dim, hidden]`, rows of a head in the order of [`crate::Rope::order`].
    Key,
    /// `[kv_heads * head_dim]`, in the order of [`crate::Rope::order`].
    KeyBias,
    /// `[kv_heads * head_dim, hidden]`.
    Value,
    /// `[kv_heads * head_dim]`.
    ValueBias,
    /// RMS norm of each query head, `[head_dim]`, in the order of [`crate::Rope::order`].
    QueryNorm,
    /// RMS norm of each key head, `[head_dim]`, in the order of [`crate::Rope::order`].
    KeyNorm,
    /// Hidden state to the latent of queries, `[query_rank, hidden]`.
    QueryDown,
    /// RMS norm of that latent, `[query_rank]`.
    QueryDownNorm,
    /// Latent to queries, `[heads * (nope_dim + rope_dim), query_rank]`; the last `rope_dim` rows of each head in the
    /// order of [`crate::Rope::order`].
    QueryUp,
    /// Hidden state to the latent of keys and values and to the shared rotated key, `[kv_rank + rope_dim, hidden]`; the
    /// last `rope_dim` rows in the order of [`crate::Rope::order`].
    KvDown,
    /// RMS norm of the latent, `[kv_rank]`.
    KvDownNorm,
    /// Latent to keys and values, `[heads * (nope_dim + value_dim), kv_rank]`.
    KvUp,
    /// Instead of [`Self::KvUp`]: the keys' part transposed, `[heads, kv_rank, nope_dim]`.
    KeyUp,
    /// Instead of [`Self::KvUp`]: the values' part, `[heads, value_dim, kv_rank]`.
    ValueUp,
    /// `[hidden, heads * head_dim]`; in latent attention `[hidden, heads * value_dim]`.
    AttentionOutput,
    /// `[hidden]`.
    AttentionOutputBias,
    /// RMS norm before the feed-forward part, `[hidden]`.
    FfnNorm,
    /// `[ffn, hidden]`.
    Gate,
    /// `[ffn]`.
    GateBias,
    /// `[ffn, hidden]`.
    Up,
    /// `[ffn]`.
    UpBias,
    /// `[hidden, ffn]`.
    Down,
    /// `[hidden]`.
    DownBias,
    /// Of a mixture of experts: `[experts, hidden]`.
    Router,
    /// Added to the router's scores for choosing, `[experts]`.
    RouterBias,
    /// Of the shared experts together, `[shared_ffn, hidden]`.
    SharedGate,
    /// `[shared_ffn, hidden]`.
    SharedUp,
    /// `[hidden, shared_ffn]`.
    SharedDown,
}

/// A tensor of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpertWeight {
    /// `[expert_ffn, hidden]`.
    Gate,
    /// `[expert_ffn, hidden]`.
    Up,
    /// `[hidden, expert_ffn]`.
    Down,
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer, weight) => write!(f, "{weight:?} of layer {layer}"),
            Self::Expert(layer, expert, weight) => {
                write!(f, "{weight:?} of expert {expert} of layer {layer}")
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// One tensor in the mapped file.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    /// Elements along each axis, outermost first: `[out, in]`.
    pub shape: &'a [usize],
    /// Row-major; `rows() * row_bytes()` long. Not aligned to anything.
    pub bytes: &'a [u8],
    /// What the elements are to be multiplied with.
    pub scales: Option<BlockScales<'a>>,
}

/// One factor for each block of rows and columns of a matrix; blocks at its edges may be smaller.
#[derive(Debug, Clone, Copy)]
pub struct BlockScales<'a> {
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// F32 or Bf16.
    pub dtype: Dtype,
    /// `[blocks along rows][blocks along columns]`.
    pub bytes: &'a [u8],
}

impl BlockScales<'_> {
    /// Multiplies a row of the matrix.
    fn scale_row(&self, row: usize, values: &mut [f32]) {
        let across = values.len().div_ceil(self.block[1]);
        let size = self.dtype.block_bytes();
        let scales = &self.bytes[row / self.block[0] * across * size..][..across * size];
        for (bytes, values) in scales.chunks_exact(size).zip(values.chunks_mut(self.block[1])) {
            let mut scale = [0.0];
            self.dtype.dequantize(bytes, &mut scale);
            values.iter_mut().for_each(|value| *value *= scale[0]);
        }
    }
}

impl<'a> TensorView<'a> {
    /// A tensor whose elements are what their bytes say.
    pub fn new(dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> Self {
        Self { dtype, shape, bytes, scales: None }
    }

    /// Elements of one row: the innermost axis.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: the product of all axes but the innermost.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.columns()).unwrap_or(0)
    }

    /// Bytes of row `row`, not scaled. Panics if there is no such row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let length = self.row_bytes();
        &self.bytes[row * length..(row + 1) * length]
    }

    /// The type of rows that are taken out of the matrix: bf16 where scales lie beside it, else as they are stored.
    pub fn row_dtype(&self) -> Dtype {
        if self.scales.is_some() { Dtype::Bf16 } else { self.dtype }
    }

    /// Appends row `row` in [`Self::row_dtype`]. Panics if there is no such row.
    pub fn append_row(&self, row: usize, to: &mut Vec<u8>) {
        if self.scales.is_none() {
            return to.extend_from_slice(self.row(row));
        }
        let mut values = vec![0.0; self.columns()];
        self.dequantize_row(row, &mut values);
        to.extend(values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()));
    }

    /// Row `row` as f32. Panics if there is no such row or `out` is not [`Self::columns`] long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns(), "a row of this tensor has another length");
        self.dtype.dequantize(self.row(row), out);
        if let Some(scales) = &self.scales {
            scales.scale_row(row, out);
        }
    }

    /// The whole tensor as f32, row-major: for norms, biases and tests.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows() * self.columns()];
        if !values.is_empty() {
            let rows = values.chunks_exact_mut(self.columns()).enumerate();
            rows.for_each(|(row, values)| self.dequantize_row(row, values));
        }
        values
    }
}
