//! What kernels are asked to do: pointers and shapes. Who makes one vouches that all of it can be read, and written where
//! results go.

#[cfg(doc)]
use super::{MOST_FEW, SUM_COLUMNS, X_BLOCK, tile_rows};

/// A few rows of activations times consecutive packed panels.
pub(crate) struct Few {
    /// `rows` rows of `k` values, `x_stride` values apart.
    pub(crate) x: *const f32,
    pub(crate) x_stride: usize,
    /// 1 to [`MOST_FEW`].
    pub(crate) rows: usize,
    pub(crate) k: usize,
    /// First of `panels` panels, each `panel_bytes` after the other.
    pub(crate) panel: *const u8,
    pub(crate) panel_bytes: usize,
    pub(crate) panels: usize,
    /// What the sums start from: 16 values for each panel.
    pub(crate) init: *const f32,
    /// `rows` rows of 16 values for each panel, `out_stride` values apart.
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

/// Where the rows of [`Tiles`] lie.
#[derive(Clone, Copy)]
pub(crate) enum Rows {
    /// Each so many values after the one before.
    Apart(usize),
    /// Tiles of `height` rows, the last of what is left over, each `[k][height]` as [`tile_rows`] makes them; used are
    /// the columns from `start` on.
    Tiled { height: usize, k: usize, start: usize },
}

/// Rows of activations times sixteen f32 columns.
pub(crate) struct Tiles {
    /// `rows` rows of `k` values.
    pub(crate) x: *const f32,
    pub(crate) layout: Rows,
    pub(crate) rows: usize,
    pub(crate) k: usize,
    /// `k` times 16 values, `panel_stride` values apart.
    pub(crate) panel: *const f32,
    pub(crate) panel_stride: usize,
    /// What every row's sums start from: 16 values; null to go on from what `out` holds.
    pub(crate) init: *const f32,
    /// `rows` rows of 16 values, `out_stride` values apart.
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

/// A few rows of quantised activations times consecutive packed panels.
pub(crate) struct QuantisedFew {
    /// `rows` rows of `k` values.
    pub(crate) x: *const i16,
    /// `rows` rows of a scale for each [`X_BLOCK`] columns, the last of fewer.
    pub(crate) scales: *const f32,
    /// `rows` rows of a sum for each [`SUM_COLUMNS`] columns.
    pub(crate) sums: *const f32,
    /// 1 to [`MOST_FEW`].
    pub(crate) rows: usize,
    pub(crate) k: usize,
    /// First of `panels` panels, each `panel_bytes` after the other.
    pub(crate) panel: *const u8,
    pub(crate) panel_bytes: usize,
    pub(crate) panels: usize,
    /// What the sums start from: 16 values for each panel.
    pub(crate) init: *const f32,
    /// `rows` rows of 16 values for each panel, `out_stride` values apart.
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

/// Rows of quantised activations times a piece of a panel that was unpacked, of at most [`X_BLOCK`] columns.
pub(crate) struct QuantisedTiles {
    /// Tiles of `height` rows, the last of what is left over, each `[row_columns / 2][height][2]`; used are the columns
    /// from `start` on.
    pub(crate) x: *const i16,
    pub(crate) height: usize,
    pub(crate) row_columns: usize,
    pub(crate) start: usize,
    /// The scale of those columns of the first row, and how far the next row's is.
    pub(crate) scales: *const f32,
    pub(crate) scales_stride: usize,
    /// The sums of those columns of the first row, and how far the next row's are.
    pub(crate) sums: *const f32,
    pub(crate) sums_stride: usize,
    pub(crate) rows: usize,
    pub(crate) k: usize,
    /// `[k / 2][16][2]`.
    pub(crate) panel: *const i16,
    /// Columns that share a scale of the panel's, and a minimum.
    pub(crate) group: usize,
    /// `[k / group][16]`.
    pub(crate) panel_scales: *const f32,
    /// `[k / group][16]`; null if all are zero.
    pub(crate) panel_minima: *const f32,
    /// What every row's sums start from: 16 values; null to go on from what `out` holds.
    pub(crate) init: *const f32,
    /// `rows` rows of 16 values, `out_stride` values apart.
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

/// Scores of queries, all of them with all tokens of some blocks of the KV pool, for one KV head.
pub(crate) struct Scores {
    /// `[rows][dim]`.
    pub(crate) queries: *const f32,
    pub(crate) rows: usize,
    /// Rows that go together.
    pub(crate) height: usize,
    pub(crate) dim: usize,
    /// The slices of `blocks` blocks.
    pub(crate) slices: *const *const u8,
    pub(crate) blocks: usize,
    /// Where in a slice the head's keys begin, `[dim][16 tokens]`.
    pub(crate) keys: usize,
    /// Where in a slice the sixteen scales of those keys begin, if they have any.
    pub(crate) scales: usize,
    /// `rows` rows of 16 values for each block, `out_stride` values apart.
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
}

/// Sums of values of the KV pool, each times its token's score, for one KV head.
pub(crate) struct Weigh {
    /// `rows` rows of `tokens` values, `scores_stride` values apart.
    pub(crate) scores: *const f32,
    pub(crate) scores_stride: usize,
    pub(crate) rows: usize,
    /// Rows that go together.
    pub(crate) height: usize,
    /// The slices of the blocks that hold the tokens.
    pub(crate) slices: *const *const u8,
    pub(crate) tokens: usize,
    /// Where in a slice the head's values begin, `[columns][16 tokens][16]`.
    pub(crate) values: usize,
    /// Sixteens of elements.
    pub(crate) columns: usize,
    /// `rows` rows of 16 values for each of `columns`, `sums_stride` values apart.
    pub(crate) sums: *mut f32,
    pub(crate) sums_stride: usize,
    /// Whether the sums go on from what is there.
    pub(crate) resume: bool,
}
