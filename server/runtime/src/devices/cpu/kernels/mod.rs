//! The CPU's inner loops, written once over [`Lanes`] and compiled for each instruction set.
//!
//! [`best`] chooses a table of them for the CPU at hand; `ops` and `attention` call through it. Everything here is raw
//! pointers: bounds are the callers' business, who derive them from checked shapes.

mod format;
mod linear;
mod rows;
#[cfg(test)]
mod tests;

pub(crate) use format::PanelFormat;
pub(crate) use linear::{tile_height, tile_rows};

#[cfg(doc)]
use super::lanes::Lanes;

/// Most rows of [`Few`]: two passes over a panel as it is stored cost less than expanding it.
pub(crate) const MOST_FEW: usize = 8;

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

/// The kernels of one instruction set.
///
/// All functions require that the CPU has that instruction set, which [`available`] ascertains, and that pointers are
/// valid for what is said of them here and in the tasks.
pub(crate) struct Kernels {
    pub(crate) name: &'static str,
    /// By [`PanelFormat`]: `k` columns (whole blocks) of a panel to `k * 16` f32.
    pub(crate) expand: [unsafe fn(panel: *const u8, k: usize, out: *mut f32); PanelFormat::COUNT],
    /// By [`PanelFormat`].
    pub(crate) few: [unsafe fn(&Few); PanelFormat::COUNT],
    /// Most rows of a tile.
    pub(crate) tile_rows: usize,
    pub(crate) tiles: unsafe fn(&Tiles),
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
    /// `length` (a multiple of 16) bf16 to f32.
    pub(crate) widen_bf16: unsafe fn(from: *const u16, to: *mut f32, length: usize),
}

/// One function of a table for each format.
macro_rules! by_format {
    ($function:ident) => {
        [
            $function::<format::F32>,
            $function::<format::F16>,
            $function::<format::Bf16>,
            $function::<format::Q8>,
            $function::<format::Q4>,
            $function::<format::Q5>,
            $function::<format::K4>,
            $function::<format::K5>,
            $function::<format::K6>,
        ]
    };
}

/// Functions that are the generic ones compiled for one instruction set.
macro_rules! compiled {
    ($($(#[$attribute:meta])* fn $name:ident$(<$format:ident>)?($($argument:ident: $type:ty),*) $(-> $result:ty)? = $generic:expr;)*) => {
        $(
            $(#[$attribute])*
            unsafe fn $name$(<$format: super::format::Format>)?($($argument: $type),*) $(-> $result)? {
                // SAFETY: the caller keeps the contract of the table's field.
                unsafe { $generic($($argument),*) }
            }
        )*
    };
}

macro_rules! kernels {
    ($module:ident, $lanes:ident, $name:literal $(, $features:literal)?) => {
        mod $module {
            use super::{super::lanes::{$lanes as V, Lanes as _}, Few, Kernels, Tiles, format, linear, rows};

            compiled! {
                $(#[target_feature(enable = $features)])?
                fn expand<F>(panel: *const u8, k: usize, out: *mut f32) = linear::expand::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn few<F>(task: &Few) = linear::few::<V, F>;
                $(#[target_feature(enable = $features)])?
                fn tiles(task: &Tiles) = linear::tiles::<V>;
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
                fn widen_bf16(from: *const u16, to: *mut f32, length: usize) = rows::widen_bf16::<V>;
            }

            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                expand: by_format!(expand),
                few: by_format!(few),
                tile_rows: V::TILE_ROWS,
                tiles,
                rms_norm,
                add,
                silu_mul,
                softmax,
                widen_bf16,
            };
        }
    };
}

kernels!(portable, Portable, "portable");
#[cfg(target_arch = "x86_64")]
kernels!(avx2, Avx2, "avx2", "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(avx512, Avx512, "avx512", "avx512f,avx2,fma,f16c");

/// The kernels this CPU can run, best first. The last are the portable ones, which any can.
pub(crate) fn available() -> Vec<&'static Kernels> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        if avx2 && is_x86_feature_detected!("avx512f") {
            found.push(&avx512::KERNELS);
        }
        if avx2 {
            found.push(&avx2::KERNELS);
        }
    }
    found.push(&portable::KERNELS);
    found
}

/// The fastest kernels this CPU can run.
pub(crate) fn best() -> &'static Kernels {
    available()[0]
}
