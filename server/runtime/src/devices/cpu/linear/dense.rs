//! A task of a product whose weights are dense.

use super::{Block, K_BLOCK, Piece, Scratch};
use crate::devices::cpu::{
    kernels::{DenseFormat, Few, Kernels, PanelFormat, Rows, Tiles},
    lanes::LANES,
};

/// Columns that every piece of a panel is a multiple of.
const K_UNIT: usize = 32;

/// Columns that are expanded at once: pieces of nearly equal length.
fn piece_columns(k: usize) -> usize {
    k.div_ceil(k.div_ceil(K_BLOCK)).next_multiple_of(K_UNIT)
}

/// Few rows by panels as they are stored: those from `first` on, `panels` of them.
///
/// # Safety
/// `out` has room for the rows' outputs of these panels, and they are this task's only.
pub(super) unsafe fn few(
    kernels: &Kernels,
    format: DenseFormat,
    piece: &Piece<'_>,
    block: &Block<'_>,
    (first, panels): (usize, usize),
    (out, out_stride): (*mut f32, usize),
) {
    let part = piece.part;
    let task = Few {
        x: block.product.x.as_ptr(),
        x_stride: part.k,
        rows: block.rows,
        k: part.k,
        panel: part.bytes.as_slice()[first * part.panel_bytes..].as_ptr(),
        panel_bytes: part.panel_bytes,
        panels,
        init: part.init[first * LANES..].as_ptr(),
        out,
        out_stride,
    };
    // SAFETY: `x` has `rows` rows of `k`; the panels and their starts are there; of `out` the caller says so.
    unsafe { kernels.few[format as usize](&task) };
}

/// Many rows by one panel after the other, piece by piece along k: each piece is turned into f32 once and multiplied
/// with all rows while it lies in the first-level cache.
pub(super) fn gemm(
    kernels: &Kernels,
    format: DenseFormat,
    piece: &Piece<'_>,
    block: &Block<'_>,
    height: usize,
    scratch: &mut Scratch,
) {
    let part = piece.part;
    let step = piece_columns(part.k);
    let x = &block.room.dense[block.ready.values + block.first * part.k..];
    for start in (0..part.k).step_by(step) {
        let columns = step.min(part.k - start);
        for index in 0..piece.panels {
            let panel = piece.first_panel + index;
            let bytes = &part.bytes.as_slice()[panel * part.panel_bytes..][..part.panel_bytes];
            let stored = bytes[PanelFormat::Dense(format).panel_bytes(start)..].as_ptr();
            let weights = if format == DenseFormat::F32 {
                stored.cast()
            } else {
                let room = &mut scratch.expanded[..columns * LANES];
                // SAFETY: these columns of the panel, whole blocks, and room for them.
                unsafe { kernels.expand_dense[format as usize](stored, columns, room.as_mut_ptr()) };
                room.as_ptr()
            };
            let (out, out_stride) = piece.place(block, index, &mut scratch.edge);
            let task = Tiles {
                x: x.as_ptr(),
                layout: Rows::Tiled { height, k: part.k, start },
                rows: block.rows,
                k: columns,
                panel: weights,
                panel_stride: LANES,
                init: if start == 0 { part.init[panel * LANES..].as_ptr() } else { std::ptr::null() },
                out,
                out_stride,
            };
            // SAFETY: `x` has `rows` rows of `k`; a whole panel's outputs are sixteen columns of `out` that no other
            // task has for these rows; an edge has room for them.
            unsafe { (kernels.tiles)(&task) };
        }
    }
}
