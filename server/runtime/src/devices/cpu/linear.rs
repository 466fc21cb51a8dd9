//! Matrix products with packed weights: how the work is cut into tasks for the kernels.
//!
//! Up to four rows go through `few`, which reads panels as stored. More rows go block by block: a piece of a panel is turned
//! into f32 once and multiplied with all rows of the block while it lies in the first-level cache. The cuts differ
//! between the two and with the number of rows; the order in which an output's products are added does not.

use std::sync::{Mutex, PoisonError};

use super::{
    kernels::{Few, Kernels, MOST_FEW, Tiles},
    lanes::LANES,
    memory::Disjoint,
    pack::Packed,
    threads::Pool,
};

/// Most rows of one task: with `K_BLOCK` columns they stay in the second-level cache. A multiple of the six rows that
/// the kernel takes at a time.
const ROW_BLOCK: usize = 96;
/// Activations that stay in the second-level cache while a task goes through its panels: 256 KiB of f32.
const CACHED: usize = 64 * 1024;
/// Columns of a panel that are expanded at once: 16 KiB of f32. A multiple of every format's group.
const K_BLOCK: usize = 256;
/// Most panels of one task.
const PANEL_BLOCK: usize = 8;
/// Tasks for each thread to aim at, so that all end at about the same time.
const TASKS_PER_THREAD: usize = 6;
/// Fewest panels of a `few` task: below, handing out tasks costs more than it evens out.
const FEW_PANELS: usize = 4;

/// A worker's own memory.
pub(crate) struct Scratch {
    expanded: Vec<f32>,
    /// Outputs of a last panel that is not full: `[ROW_BLOCK][16]`.
    edge: Vec<f32>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { expanded: vec![0.0; K_BLOCK * LANES], edge: vec![0.0; ROW_BLOCK * LANES] }
    }
}

/// Weights as packed: parts that follow each other in the outputs.
pub(crate) struct Linear {
    pub(crate) parts: Vec<Packed>,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
}

/// A run of panels of one part.
struct Piece<'a> {
    part: &'a Packed,
    first_panel: usize,
    panels: usize,
    /// Output that the first panel begins with, counted over all parts.
    output: usize,
}

impl Linear {
    /// Cuts all panels into pieces of at most `most`.
    fn pieces(&self, most: usize) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        let mut output = 0;
        for part in &self.parts {
            for first_panel in (0..part.panels()).step_by(most) {
                let panels = most.min(part.panels() - first_panel);
                pieces.push(Piece { part, first_panel, panels, output: output + first_panel * LANES });
            }
            output += part.rows;
        }
        pieces
    }

    fn panels(&self) -> usize {
        self.parts.iter().map(Packed::panels).sum()
    }

    /// `out[rows][outputs] = x[rows][inputs] * weights^T + bias`.
    pub(crate) fn apply(
        &self,
        kernels: &Kernels,
        pool: &mut Pool,
        scratch: &[Mutex<Scratch>],
        x: &[f32],
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), x.len() / self.inputs * self.outputs, "activations of another shape");
        let product = Product { weight: self, x, out: Disjoint::new(out) };
        // SAFETY: `out` has room for the product's rows and is borrowed until this returns.
        unsafe { multiply(&[product], kernels, pool, scratch) };
    }

    /// The part that has output `row`, and the row's index in it.
    pub(crate) fn locate(&self, mut row: usize) -> (&Packed, usize) {
        for part in &self.parts {
            if row < part.rows {
                return (part, row);
            }
            row -= part.rows;
        }
        panic!("row outside the matrix: token ids were checked against the vocabulary");
    }
}

/// A matrix product: `out[rows][outputs] = x[rows][inputs] * weight^T + bias`.
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a Linear,
    /// Whole rows.
    pub(crate) x: &'a [f32],
    pub(crate) out: Disjoint<f32>,
}

/// Part of a product that one task computes.
struct Share<'a> {
    product: &'a Product<'a>,
    piece: Piece<'a>,
    first_row: usize,
    rows: usize,
}

/// Computes all products in one job of the threads, however many they are: a mixture's experts, an attention's heads.
///
/// # Safety
/// Each `out` is valid for its product's rows, nobody else uses it meanwhile, and no two products share any of it.
pub(crate) unsafe fn multiply(
    products: &[Product<'_>],
    kernels: &Kernels,
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
) {
    let tasks = pool.threads() * TASKS_PER_THREAD;
    let mut shares = Vec::new();
    let panels: usize = products.iter().map(|product| product.weight.panels()).sum();
    for product in products {
        let rows = product.x.len() / product.weight.inputs;
        assert_eq!(product.x.len(), rows * product.weight.inputs, "activations of another shape");
        if rows == 0 {
            continue;
        }
        if rows <= MOST_FEW {
            let most = panels.div_ceil(tasks).next_multiple_of(2).max(FEW_PANELS);
            let pieces = product.weight.pieces(most).into_iter();
            shares.extend(pieces.map(|piece| Share { product, piece, first_row: 0, rows }));
            continue;
        }
        let row_blocks = rows.div_ceil(ROW_BLOCK);
        let row_block = rows.div_ceil(row_blocks).next_multiple_of(6);
        let most = (panels * row_blocks).div_ceil(tasks).clamp(1, PANEL_BLOCK);
        for first_row in (0..rows).step_by(row_block) {
            let rows = row_block.min(rows - first_row);
            let pieces = product.weight.pieces(most).into_iter();
            shares.extend(pieces.map(|piece| Share { product, piece, first_row, rows }));
        }
    }
    pool.run(shares.len(), &|worker, task| {
        let Share { product: Product { weight, x, out }, piece, first_row: first, rows } = &shares[task];
        let block = Block { x: &x[first * weight.inputs..], first: *first, rows: *rows };
        if x.len() <= MOST_FEW * weight.inputs {
            few(kernels, piece, &block, weight.outputs, *out);
        } else {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            gemm(kernels, piece, &block, weight.outputs, *out, &mut scratch);
        }
    });
}

/// Rows of activations that one task multiplies.
struct Block<'a> {
    /// From the first row on.
    x: &'a [f32],
    first: usize,
    rows: usize,
}

fn few(kernels: &Kernels, piece: &Piece<'_>, block: &Block<'_>, outputs: usize, out: Disjoint<f32>) {
    let part = piece.part;
    let kernel = kernels.few[part.format as usize];
    let full = (part.rows / LANES).saturating_sub(piece.first_panel).min(piece.panels);
    let task = |index: usize, panels, out: *mut f32, out_stride| Few {
        x: block.x.as_ptr(),
        x_stride: part.k,
        rows: block.rows,
        k: part.k,
        panel: part.bytes.as_slice()[(piece.first_panel + index) * part.panel_bytes..].as_ptr(),
        panel_bytes: part.panel_bytes,
        panels,
        init: part.init[(piece.first_panel + index) * LANES..].as_ptr(),
        out,
        out_stride,
    };
    if full > 0 {
        let to = out.pointer().wrapping_add(block.first * outputs + piece.output);
        // SAFETY: `x` has `rows` rows of `k`; the panels and their starts are there; the outputs of whole panels lie
        // within `out`'s rows and are one piece's only.
        unsafe { kernel(&task(0, full, to, outputs)) };
    }
    if full < piece.panels {
        let mut edge = [0.0; MOST_FEW * LANES];
        // SAFETY: as above for the last panel, whose outputs go to `edge`.
        unsafe { kernel(&task(full, 1, edge.as_mut_ptr(), LANES)) };
        let (rows, output) = (part.rows % LANES, piece.output + full * LANES);
        for (row, values) in edge.chunks_exact(LANES).take(block.rows).enumerate() {
            // SAFETY: the part's last outputs, this piece's only.
            let to = unsafe { out.slice((block.first + row) * outputs + output, rows) };
            to.copy_from_slice(&values[..rows]);
        }
    }
}

fn gemm(
    kernels: &Kernels,
    piece: &Piece<'_>,
    block: &Block<'_>,
    outputs: usize,
    out: Disjoint<f32>,
    scratch: &mut Scratch,
) {
    let part = piece.part;
    let expand = kernels.expand[part.format as usize];
    let out_at = |row: usize, output: usize| (block.first + row) * outputs + output;
    let steps = part.k.div_ceil(K_BLOCK);
    // Panel by panel reads the weights in the order of memory; where the rows are too many for the cache, a piece of
    // every panel at a time reads the rows less often.
    let by_panel = block.rows * part.k <= CACHED;
    for turn in 0..steps * piece.panels {
        let (index, step) =
            if by_panel { (turn / steps, turn % steps) } else { (turn % piece.panels, turn / piece.panels) };
        let (panel, start) = (piece.first_panel + index, step * K_BLOCK);
        let columns = K_BLOCK.min(part.k - start);
        let offset = panel * part.panel_bytes + part.format.panel_bytes(start);
        // SAFETY: `columns` columns of the panel from `start` on, whole groups, and room for K_BLOCK of them.
        unsafe { expand(part.bytes.as_slice()[offset..].as_ptr(), columns, scratch.expanded.as_mut_ptr()) };
        let whole = (panel + 1) * LANES <= part.rows;
        let (to, out_stride) = if whole {
            (out.pointer().wrapping_add(out_at(0, piece.output + index * LANES)), outputs)
        } else {
            (scratch.edge.as_mut_ptr(), LANES)
        };
        let task = Tiles {
            x: block.x[start..].as_ptr(),
            x_stride: part.k,
            rows: block.rows,
            k: columns,
            panel: scratch.expanded.as_ptr(),
            panel_stride: LANES,
            init: if start == 0 { part.init[panel * LANES..].as_ptr() } else { std::ptr::null() },
            out: to,
            out_stride,
        };
        // SAFETY: `x` has `rows` rows of `k`; a whole panel's outputs are sixteen columns of `out` that no other task
        // has for these rows, an edge has ROW_BLOCK rows.
        unsafe { (kernels.tiles)(&task) };
    }
    let edge = part.rows % LANES;
    if edge > 0 && piece.first_panel + piece.panels == part.panels() {
        let output = piece.output + (piece.panels - 1) * LANES;
        for (row, values) in scratch.edge.chunks_exact(LANES).take(block.rows).enumerate() {
            // SAFETY: the part's last outputs for these rows, this task's only.
            unsafe { out.slice(out_at(row, output), edge) }.copy_from_slice(&values[..edge]);
        }
    }
}
