//! Matrix products with packed weights: how the work is cut into tasks for the kernels.
//!
//! `rows` makes the activations ready. Up to eight rows are then multiplied with panels as they are stored; more are in
//! tiles and go block by block with pieces of panels that are turned into f32 or i16 once. A task is a block of rows by a
//! run of panels; `dense` and `quantised` do its arithmetic. The cuts differ with the number of rows; the order in which
//! an output's products are added does not.

mod dense;
mod quantised;
mod rows;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, PoisonError};

use self::rows::{Heights, Ready, Room};
use super::{
    kernels::{Kernels, MOST_FEW, PanelFormat},
    lanes::LANES,
    memory::Disjoint,
    threads::Pool,
    weights::Packed,
};

/// Most rows of one task: `K_BLOCK` columns of them stay in the second-level cache, as f32 and as i16. Multiples of every
/// instruction set's tiles, so that whole tiles are no more than these.
const ROW_BLOCK: usize = 192;
const QUANTISED_ROW_BLOCK: usize = 300;
/// Most columns of a panel that are expanded at once: 16 KiB of f32.
const K_BLOCK: usize = 256;
/// Most panels of one task.
const PANEL_BLOCK: usize = 8;
/// Tasks for each thread to aim at, so that all end at about the same time.
const TASKS_PER_THREAD: usize = 6;
/// Fewest panels of a task with few rows: below, handing out tasks costs more than it evens out.
const FEW_PANELS: usize = 2;

/// Memory that matrix products need, kept from one to the next.
pub(crate) struct Workspace {
    room: Room,
    workers: Vec<Mutex<Scratch>>,
}

impl Workspace {
    pub(crate) fn new(threads: usize) -> Self {
        let workers = (0..threads).map(|_| Mutex::new(Scratch::new())).collect();
        Self { room: Room::default(), workers }
    }
}

/// A worker's own memory.
struct Scratch {
    /// Rows that are being quantised.
    rows: Vec<i16>,
    /// A piece of a dense panel as f32.
    expanded: Vec<f32>,
    unpacked: quantised::Unpacked,
    /// Outputs of a last panel that is not full: `[QUANTISED_ROW_BLOCK][16]`.
    edge: Vec<f32>,
}

impl Scratch {
    fn new() -> Self {
        Self {
            rows: Vec::new(),
            expanded: vec![0.0; K_BLOCK * LANES],
            unpacked: quantised::Unpacked::new(),
            edge: vec![0.0; QUANTISED_ROW_BLOCK * LANES],
        }
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

/// Rows of one product that one task multiplies.
struct Block<'a> {
    product: &'a Product<'a>,
    room: &'a Room,
    ready: Ready,
    first: usize,
    rows: usize,
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

    fn has_dense(&self) -> bool {
        self.parts.iter().any(|part| matches!(part.format, PanelFormat::Dense(_)))
    }

    fn has_quantised(&self) -> bool {
        self.parts.iter().any(|part| matches!(part.format, PanelFormat::Quantised(_)))
    }

    /// `out[rows][outputs] = x[rows][inputs] * weights^T + bias`.
    pub(crate) fn apply(
        &self,
        kernels: &Kernels,
        pool: &mut Pool,
        workspace: &mut Workspace,
        x: &[f32],
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), x.len() / self.inputs * self.outputs, "activations of another shape");
        let product = Product { weight: self, x, out: Disjoint::new(out) };
        // SAFETY: `out` has room for the product's rows and is borrowed until this returns.
        unsafe { multiply(&[product], kernels, pool, workspace) };
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

impl Product<'_> {
    fn rows(&self) -> usize {
        self.x.len() / self.weight.inputs
    }
}

/// Computes all products in one job of the threads (after another that makes their rows ready), however many they are: a
/// mixture's experts, an attention's heads.
///
/// # Safety
/// Each `out` is valid for its product's rows, nobody else uses it meanwhile, and no two products share any of it.
pub(crate) unsafe fn multiply(
    products: &[Product<'_>],
    kernels: &Kernels,
    pool: &mut Pool,
    workspace: &mut Workspace,
) {
    let Workspace { room, workers } = workspace;
    let ready = room.prepare(products, kernels, pool, workers);
    let tasks = pool.threads() * TASKS_PER_THREAD;
    let panels: usize = products.iter().map(|product| product.weight.panels()).sum();
    let mut shares = Vec::new();
    for (product, ready) in products.iter().zip(ready) {
        let rows = product.rows();
        let mut cut = |row_block: usize, most: usize, wanted: &dyn Fn(&Piece<'_>) -> bool| {
            for first in (0..rows).step_by(row_block) {
                let rows = row_block.min(rows - first);
                let block = |piece| (Block { product, room: &*room, ready, first, rows }, piece);
                shares.extend(product.weight.pieces(most).into_iter().filter(wanted).map(block));
            }
        };
        let Some(Heights { dense, quantised }) = ready.heights else {
            let most = panels.div_ceil(tasks).next_multiple_of(2).max(FEW_PANELS);
            cut(rows.max(1), most, &|_| true);
            continue;
        };
        for (is_dense, height, row_block) in
            [(true, dense, ROW_BLOCK), (false, quantised, QUANTISED_ROW_BLOCK)]
        {
            // Blocks of nearly equal size, of whole tiles.
            let row_blocks = rows.div_ceil(row_block);
            let row_block = rows.div_ceil(row_blocks).next_multiple_of(height);
            let most = (panels * row_blocks).div_ceil(tasks).clamp(1, PANEL_BLOCK);
            cut(row_block, most, &|piece| matches!(piece.part.format, PanelFormat::Dense(_)) == is_dense);
        }
    }
    pool.run(shares.len(), &|worker, task| {
        let (block, piece) = &shares[task];
        let Some(heights) = block.ready.heights else { return few(kernels, piece, block) };
        let mut scratch = workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
        match piece.part.format {
            PanelFormat::Dense(format) => {
                dense::gemm(kernels, format, piece, block, heights.dense, &mut scratch);
            }
            PanelFormat::Quantised(format) => {
                quantised::gemm(kernels, format, piece, block, heights.quantised, &mut scratch);
            }
        }
        piece.copy_edge(block, &scratch.edge);
    });
}

/// A task of few rows: all whole panels, then the last if it is not full.
fn few(kernels: &Kernels, piece: &Piece<'_>, block: &Block<'_>) {
    let part = piece.part;
    let whole = (part.rows / LANES).saturating_sub(piece.first_panel).min(piece.panels);
    let run = |panels, to| {
        // SAFETY: the outputs of whole panels lie within the product's rows and are this task's only; those of a last
        // panel go to `edge`.
        unsafe {
            match part.format {
                PanelFormat::Dense(format) => dense::few(kernels, format, piece, block, panels, to),
                PanelFormat::Quantised(format) => quantised::few(kernels, format, piece, block, panels, to),
            }
        }
    };
    let outputs = block.product.weight.outputs;
    if whole > 0 {
        let to = block.product.out.pointer().wrapping_add(block.first * outputs + piece.output);
        run((piece.first_panel, whole), (to, outputs));
    }
    if whole < piece.panels {
        let mut edge = [0.0; MOST_FEW * LANES];
        run((piece.first_panel + whole, 1), (edge.as_mut_ptr(), LANES));
        piece.copy_edge(block, &edge);
    }
}

impl Piece<'_> {
    /// Where the outputs of the panel of that index go, and how far apart rows are: to the product's, or, if the panel
    /// is not full, to `edge`.
    fn place(&self, block: &Block<'_>, index: usize, edge: &mut [f32]) -> (*mut f32, usize) {
        if (self.first_panel + index + 1) * LANES > self.part.rows {
            assert!(block.rows * LANES <= edge.len(), "rows of a task that the edge has no room for");
            return (edge.as_mut_ptr(), LANES);
        }
        let outputs = block.product.weight.outputs;
        let at = block.first * outputs + self.output + index * LANES;
        (block.product.out.pointer().wrapping_add(at), outputs)
    }

    /// Copies the outputs of a last panel that is not full, if this piece has it, from `edge` to the product's.
    fn copy_edge(&self, block: &Block<'_>, edge: &[f32]) {
        let (part, outputs) = (self.part, block.product.weight.outputs);
        let filled = part.rows % LANES;
        if filled == 0 || self.first_panel + self.panels < part.panels() {
            return;
        }
        let output = self.output + (self.panels - 1) * LANES;
        for (row, values) in edge.chunks_exact(LANES).take(block.rows).enumerate() {
            // SAFETY: the part's last outputs for these rows, this task's only.
            let to = unsafe { block.product.out.slice((block.first + row) * outputs + output, filled) };
            to.copy_from_slice(&values[..filled]);
        }
    }
}
