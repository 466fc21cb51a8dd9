//! The CPU's inner loops, written once over [`Lanes`] and compiled for each instruction set.
//!
//! [`best`] chooses a table of them for the CPU at hand; the device's operations call through it. Everything here is raw
//! pointers: bounds are the callers' business, who derive them from checked shapes.

/// Calls `$panels::<V, F, rows, panels>($task, row, panel)` for all of a task's rows and panels: up to [`FEW_TILE`] rows at
/// once, and of one or two rows two panels, so that there are enough sums to hide each other's latency.
macro_rules! few_at_once {
    ($panels:ident, $task:expr) => {{
        let height = tile_height($task.rows, FEW_TILE);
        let together = if height <= 2 { 2 } else { 1 };
        for panel in (0..$task.panels).step_by(together) {
            let two = panel + together <= $task.panels && together == 2;
            // The second pass over a panel finds it in a cache.
            for row in (0..$task.rows).step_by(height) {
                match (height.min($task.rows - row), two) {
                    (1, true) => $panels::<V, F, 1, 2>($task, row, panel),
                    (1, false) => $panels::<V, F, 1, 1>($task, row, panel),
                    (2, true) => $panels::<V, F, 2, 2>($task, row, panel),
                    (2, false) => $panels::<V, F, 2, 1>($task, row, panel),
                    (3, _) => $panels::<V, F, 3, 1>($task, row, panel),
                    _ => $panels::<V, F, FEW_TILE, 1>($task, row, panel),
                }
            }
        }
    }};
}

mod cache;
mod dense;
mod format;
mod quantised;
mod rows;
mod tasks;
#[cfg(test)]
mod tests;

use super::lanes::Lanes;
use crate::KvDtype;
pub(crate) use format::{B12, DenseFormat, PanelFormat, QuantisedFormat};
pub(crate) use tasks::{Few, QuantisedFew, QuantisedTiles, Rows, Scores, Tiles, Weigh};

/// Most rows of [`Few`] and [`QuantisedFew`]: two passes over a panel as it is stored cost less than expanding it.
pub(crate) const MOST_FEW: usize = 8;
/// Columns of a row of quantised activations that share a scale.
pub(crate) const X_BLOCK: usize = 256;
/// Columns of a row of quantised activations whose sum is kept.
pub(crate) const SUM_COLUMNS: usize = 32;

/// Rows that `few` multiplies with a panel in one pass.
const FEW_TILE: usize = 4;

const CACHE_LINE: usize = 64;
/// How far ahead of the weights in use the next ones are asked for, in bytes.
const PREFETCH: usize = 1536;

/// Asks for the weights a little after those at `weights`: the hardware's own prefetching stops at the end of a page.
///
/// # Safety
/// The CPU has `V`'s features.
#[inline(always)]
unsafe fn prefetch<V: Lanes>(weights: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(CACHE_LINE) {
        // SAFETY: the caller's promise; the line need not be valid.
        unsafe { V::prefetch(weights.wrapping_add(PREFETCH + line)) };
    }
}

/// Rows of each tile when `rows` rows are cut into as few tiles as there can be, of nearly equal height.
pub(crate) fn tile_height(rows: usize, most: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Copies rows of `k` words into tiles: of each tile `[k][height]`, so that a kernel reads one run of memory. A word is
/// an f32 or a pair of i16, aligned or not.
///
/// # Safety
/// `x` can be read and `out` written for `rows * k` words.
pub(crate) unsafe fn tile_rows(x: *const u32, rows: usize, k: usize, height: usize, out: *mut u32) {
    for first in (0..rows).step_by(height) {
        let height = height.min(rows - first);
        for row in 0..height {
            for at in 0..k {
                // SAFETY: within the first `rows * k` words of both.
                unsafe {
                    let word = x.add((first + row) * k + at).read_unaligned();
                    out.add(first * k + at * height + row).write_unaligned(word);
                }
            }
        }
    }
}

/// `k` columns (whole blocks) of a panel to f32, `[k][16]`.
type Expand = unsafe fn(panel: *const u8, k: usize, out: *mut f32);
/// `k` columns (whole blocks) of a panel to `[k / 2][16][2]` quants, scales and minima of groups, `[group][16]`.
type Unpack = unsafe fn(panel: *const u8, k: usize, quants: *mut i16, scales: *mut f32, minima: *mut f32);

/// Values of the KV cache to f32.
type Widen = unsafe fn(from: *const u8, scales: *const f32, to: *mut f32, length: usize);

/// The kernels of one instruction set.
///
/// All functions require that the CPU has that instruction set, which [`available`] ascertains, and that pointers are
/// valid for what is said of them here and in the tasks.
pub(crate) struct Kernels {
    pub(crate) name: &'static str,
    /// By [`DenseFormat`].
    pub(crate) expand_dense: [Expand; DenseFormat::COUNT],
    /// By [`QuantisedFormat`].
    pub(crate) expand_quantised: [Expand; QuantisedFormat::COUNT],
    /// By [`DenseFormat`].
    pub(crate) few: [unsafe fn(&Few); DenseFormat::COUNT],
    /// Most rows of a tile.
    pub(crate) tile_rows: usize,
    pub(crate) tiles: unsafe fn(&Tiles),
    /// A row of `k` activations, a multiple of [`SUM_COLUMNS`], to quants, a scale for each [`X_BLOCK`] of them and a sum
    /// for each [`SUM_COLUMNS`].
    pub(crate) quantise:
        unsafe fn(x: *const f32, k: usize, quants: *mut i16, scales: *mut f32, sums: *mut f32),
    /// By [`QuantisedFormat`].
    pub(crate) quantised_few: [unsafe fn(&QuantisedFew); QuantisedFormat::COUNT],
    /// By [`QuantisedFormat`].
    pub(crate) unpack: [Unpack; QuantisedFormat::COUNT],
    /// Most rows of a tile of quantised ones.
    pub(crate) quantised_tile_rows: usize,
    pub(crate) quantised_tiles: unsafe fn(&QuantisedTiles),
    /// `out = x / sqrt(mean(x^2) + epsilon) * weight`, all `length` long.
    pub(crate) rms_norm:
        unsafe fn(x: *const f32, weight: *const f32, epsilon: f32, out: *mut f32, length: usize),
    /// `x += delta`.
    pub(crate) add: unsafe fn(x: *mut f32, delta: *const f32, length: usize),
    /// `out = silu(gate) * up`.
    pub(crate) silu_mul: unsafe fn(gate: *const f32, up: *const f32, out: *mut f32, length: usize),
    /// Replaces the first `visible` (at least 1) scores by `exp(score - largest)` and gives their sum; what follows up
    /// to the next multiple of 16 becomes 0 and must be writable.
    pub(crate) softmax: unsafe fn(scores: *mut f32, visible: usize) -> f32,
    /// By [`KvDtype`].
    pub(crate) scores: [unsafe fn(&Scores); KvDtype::COUNT],
    /// By [`KvDtype`].
    pub(crate) weigh: [unsafe fn(&Weigh); KvDtype::COUNT],
    /// By [`KvDtype`]: `length` (a multiple of 16) values of sixteen tokens side by side, with the tokens' scales if they
    /// have any, to f32.
    pub(crate) widen: [Widen; KvDtype::COUNT],
    /// `x *= factors`, sixteen values.
    pub(crate) scale: unsafe fn(x: *mut f32, factors: *const f32),
}

impl Kernels {
    /// What turns `k` columns (whole blocks) of a panel of that format into f32, `[k][16]`.
    pub(crate) fn expand(&self, format: PanelFormat) -> Expand {
        match format {
            PanelFormat::Dense(format) => self.expand_dense[format as usize],
            PanelFormat::Quantised(format) => self.expand_quantised[format as usize],
        }
    }
}

/// One function of a table for each dense format.
macro_rules! by_dense_format {
    ($function:ident) => {
        [$function::<format::F32>, $function::<format::F16>, $function::<format::Bf16>]
    };
}

/// One function of a table for each quantised format.
macro_rules! by_quantised_format {
    ($function:ident) => {
        [
            $function::<format::Q8>,
            $function::<format::Q4>,
            $function::<format::Q4Minimum>,
            $function::<format::Q5Minimum>,
            $function::<format::K4>,
            $function::<format::K5>,
            $function::<format::K6>,
            $function::<format::B12>,
        ]
    };
}

/// One function of a table for each type of KV cache.
macro_rules! by_kv_dtype {
    ($function:ident) => {
        [$function::<cache::F32>, $function::<cache::Bf16>, $function::<cache::Int8>]
    };
}

/// Functions that are the generic ones compiled for one instruction set.
macro_rules! compiled {
    ($($(#[$attribute:meta])* fn $name:ident$(<$format:ident: $kind:ident>)?($($argument:ident: $type:ty),*) $(-> $result:ty)? = $generic:expr;)*) => {
        $(
            $(#[$attribute])*
            unsafe fn $name$(<$format: $kind>)?($($argument: $type),*) $(-> $result)? {
                // SAFETY: the caller keeps the contract of the table's field.
                unsafe { $generic($($argument),*) }
            }
        )*
    };
}

macro_rules! kernels {
    ($module:ident, $lanes:ty, $name:literal $(, $features:literal)?) => {
        mod $module {
            use super::{
                super::lanes::{self, Lanes as _},
                Few, Kernels, QuantisedFew, QuantisedTiles, Scores, Tiles, Weigh,
                cache::{self, Stored},
                dense,
                format::{self, Dense, Quantised},
                quantised, rows,
            };

            type V = $lanes;

            compiled! {
                $(#[target_feature(enable = $features)])?
                fn expand_dense<F: Dense>(panel: *const u8, k: usize, out: *mut f32) = dense::expand::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn expand_quantised<F: Quantised>(panel: *const u8, k: usize, out: *mut f32)
                    = quantised::expand::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn few<F: Dense>(task: &Few) = dense::few::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn tiles(task: &Tiles) = dense::tiles::<V>;
                $(#[target_feature(enable = $features)])?
                fn quantise(x: *const f32, k: usize, quants: *mut i16, scales: *mut f32, sums: *mut f32)
                    = quantised::quantise::<V>;
                $(#[target_feature(enable = $features)])?
                fn quantised_few<F: Quantised>(task: &QuantisedFew) = quantised::few::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn unpack<F: Quantised>(
                    panel: *const u8,
                    k: usize,
                    quants: *mut i16,
                    scales: *mut f32,
                    minima: *mut f32
                ) = quantised::unpack::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn quantised_tiles(task: &QuantisedTiles) = quantised::tiles::<V>;
                $(#[target_feature(enable = $features)])?
                fn rms_norm(x: *const f32, weight: *const f32, epsilon: f32, out: *mut f32, length: usize)
                    = rows::rms_norm::<V>;
                $(#[target_feature(enable = $features)])?
                fn add(x: *mut f32, delta: *const f32, length: usize) = rows::add::<V>;
                $(#[target_feature(enable = $features)])?
                fn silu_mul(gate: *const f32, up: *const f32, out: *mut f32, length: usize) = rows::silu_mul::<V>;
                $(#[target_feature(enable = $features)])?
                fn softmax(scores: *mut f32, visible: usize) -> f32 = rows::softmax::<V>;
                $(#[target_feature(enable = $features)])?
                fn scores<S: Stored>(task: &Scores) = cache::scores::<V, S>;
                $(#[target_feature(enable = $features)])?
                fn weigh<S: Stored>(task: &Weigh) = cache::weigh::<V, S>;
                $(#[target_feature(enable = $features)])?
                fn widen<S: Stored>(from: *const u8, scales: *const f32, to: *mut f32, length: usize)
                    = cache::widen::<V, S>;
                $(#[target_feature(enable = $features)])?
                fn scale(x: *mut f32, factors: *const f32) = rows::scale::<V>;
            }

            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                expand_dense: by_dense_format!(expand_dense),
                expand_quantised: by_quantised_format!(expand_quantised),
                few: by_dense_format!(few),
                tile_rows: V::TILE_ROWS,
                tiles,
                quantise,
                quantised_few: by_quantised_format!(quantised_few),
                unpack: by_quantised_format!(unpack),
                quantised_tile_rows: V::INT_TILE_ROWS,
                quantised_tiles,
                rms_norm,
                add,
                silu_mul,
                softmax,
                scores: by_kv_dtype!(scores),
                weigh: by_kv_dtype!(weigh),
                widen: by_kv_dtype!(widen),
                scale,
            };
        }
    };
}

kernels!(portable, lanes::Portable, "portable");
#[cfg(target_arch = "x86_64")]
kernels!(avx2, lanes::Avx2, "avx2", "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(avx512, lanes::Avx512<false>, "avx512", "avx512f,avx512bw,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(avx512vnni, lanes::Avx512<true>, "avx512 vnni", "avx512f,avx512bw,avx512vnni,avx2,fma,f16c");
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
kernels!(neon, lanes::Neon, "neon", "neon");

/// The kernels this CPU can run, best first. The last are the portable ones, which any can.
pub(crate) fn available() -> Vec<&'static Kernels> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        if avx512 && is_x86_feature_detected!("avx512vnni") {
            found.push(&avx512vnni::KERNELS);
        }
        if avx512 {
            found.push(&avx512::KERNELS);
        }
        if avx2 {
            found.push(&avx2::KERNELS);
        }
    }
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    if std::arch::is_aarch64_feature_detected!("neon") {
        found.push(&neon::KERNELS);
    }
    found.push(&portable::KERNELS);
    found
}

/// The fastest kernels this CPU can run.
pub(crate) fn best() -> &'static Kernels {
    available()[0]
}
