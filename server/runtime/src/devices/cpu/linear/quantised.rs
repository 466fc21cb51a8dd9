//! A task of a product whose weights are quantised; its rows are, too.

use super::{
    Block, Piece, Scratch,
    rows::{scales_of, sums_of},
};
use crate::devices::cpu::{
    kernels::{Kernels, PanelFormat, QuantisedFew, QuantisedFormat, QuantisedTiles, SUM_COLUMNS, X_BLOCK},
    lanes::LANES,
};

/// Most groups of one block of columns.
const GROUPS: usize = X_BLOCK / 16;

/// A piece of a panel as i16.
pub(super) struct Unpacked {
    quants: Vec<i16>,
    scales: Vec<f32>,
    minima: Vec<f32>,
}

impl Unpacked {
    pub(super) fn new() -> Self {
        let (scales, minima) = (vec![0.0; GROUPS * LANES], vec![0.0; GROUPS * LANES]);
        Self { quants: vec![0; X_BLOCK * LANES], scales, minima }
    }
}

/// Few rows by panels as they are stored: those from `first` on, `panels` of them.
///
/// # Safety
/// `out` has room for the rows' outputs of these panels, and they are this task's only.
pub(super) unsafe fn few(
    kernels: &Kernels,
    format: QuantisedFormat,
    piece: &Piece<'_>,
    block: &Block<'_>,
    (first, panels): (usize, usize),
    (out, out_stride): (*mut f32, usize),
) {
    let (part, ready) = (piece.part, &block.ready);
    let task = QuantisedFew {
        x: block.room.quants[ready.values..].as_ptr(),
        scales: block.room.scales[ready.scales..].as_ptr(),
        sums: block.room.sums[ready.sums..].as_ptr(),
        rows: block.rows,
        k: part.k,
        panel: part.bytes.as_slice()[first * part.panel_bytes..].as_ptr(),
        panel_bytes: part.panel_bytes,
        panels,
        init: part.init[first * LANES..].as_ptr(),
        out,
        out_stride,
    };
    // SAFETY: the room has `rows` rows of `k` with their scales and sums; the panels and their starts are there; of
    // `out` the caller says so.
    unsafe { kernels.quantised_few[format as usize](&task) };
}

/// Many rows by one panel after the other, block by block of columns that share the scales of activations: each piece of
/// a panel is turned into i16 once and multiplied with all rows while it lies in the first-level cache.
pub(super) fn gemm(
    kernels: &Kernels,
    format: QuantisedFormat,
    piece: &Piece<'_>,
    block: &Block<'_>,
    height: usize,
    scratch: &mut Scratch,
) {
    let (part, ready, room) = (piece.part, &block.ready, block.room);
    let (scales_stride, sums_stride) = (scales_of(part.k), sums_of(part.k));
    for (x_block, start) in (0..part.k).step_by(X_BLOCK).enumerate() {
        let columns = X_BLOCK.min(part.k - start);
        for index in 0..piece.panels {
            let panel = piece.first_panel + index;
            let bytes = &part.bytes.as_slice()[panel * part.panel_bytes..][..part.panel_bytes];
            let stored = bytes[PanelFormat::Quantised(format).panel_bytes(start)..].as_ptr();
            let Unpacked { quants, scales, minima } = &mut scratch.unpacked;
            let (to, to_scales, to_minima) = (quants.as_mut_ptr(), scales.as_mut_ptr(), minima.as_mut_ptr());
            // SAFETY: these columns of the panel, whole blocks, and room for them and their groups.
            unsafe { kernels.unpack[format as usize](stored, columns, to, to_scales, to_minima) };
            let (out, out_stride) = piece.place(block, index, &mut scratch.edge);
            let task = QuantisedTiles {
                x: room.quants[ready.values + block.first * part.k..].as_ptr(),
                height,
                row_columns: part.k,
                start,
                scales: room.scales[ready.scales + block.first * scales_stride + x_block..].as_ptr(),
                scales_stride,
                sums: room.sums[ready.sums + block.first * sums_stride + start / SUM_COLUMNS..].as_ptr(),
                sums_stride,
                rows: block.rows,
                k: columns,
                panel: to,
                group: format.group(),
                panel_scales: to_scales,
                panel_minima: if format.has_minima() { to_minima } else { std::ptr::null() },
                init: if start == 0 { part.init[panel * LANES..].as_ptr() } else { std::ptr::null() },
                out,
                out_stride,
            };
            // SAFETY: the room has `rows` rows of `k` from the block's first on, in tiles, with scales and sums; a whole
            // panel's outputs are sixteen columns of `out` that no other task has for these rows; an edge has room for the rows.
            unsafe { (kernels.quantised_tiles)(&task) };
        }
    }
}
