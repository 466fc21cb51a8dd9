//! Matrix products with packed weights: how the work is cut into tasks for the kernels.
//!
//! Up to eight rows go through `few`, which reads panels as stored. More rows are first copied into tiles; then, block by block, a
//! piece of a panel is turned into f32 once and multiplied with all rows of the block while it lies in the first-level
//! cache. The cuts differ between the two and with the number of rows; the order in which an output's products are
//! added does not.

use std::sync::{Mutex, PoisonError};

use super::{
    kernels::{Few, Kernels, MOST_FEW, PanelFormat, Rows, Tiles, tile_height, tile_rows},
    lanes::LANES,
    memory::Disjoint,
    pack::Packed,
    threads::Pool,
};

/// Most rows of one task: with `K_BLOCK` columns they stay in the second-level cache.
const ROW_BLOCK: usize = 192;
/// Most columns of a panel that are expanded at once: 16 KiB of f32.
const K_BLOCK: usize = 256;
/// Columns that every piece of a panel is a multiple of, unless the format's blocks are larger.
const K_UNIT: usize = 32;
/// Most panels of one task.
const PANEL_BLOCK: usize = 8;
/// Tasks for each thread to aim at, so that all end at about the same time.
const TASKS_PER_THREAD: usize = 6;
/// Fewest panels of a `few` task: below, handing out tasks costs more than it evens out.
const FEW_PANELS: usize = 4;
/// Tiles of rows that one task copies.
const TILES_PER_TASK: usize = 4;

/// Memory that matrix products need, kept from one to the next.
pub(crate) struct Workspace {
    /// The rows in tiles.
    tiled: Vec<f32>,
    workers: Vec<Mutex<Scratch>>,
}

impl Workspace {
    pub(crate) fn new(threads: usize) -> Self {
        Self { tiled: Vec::new(), workers: (0..threads).map(|_| Mutex::new(Scratch::new())).collect() }
    }
}

/// A worker's own memory.
struct Scratch {
    expanded: Vec<f32>,
    /// Outputs of a last panel that is not full: `[ROW_BLOCK][16]`.
    edge: Vec<f32>,
}

impl Scratch {
    fn new() -> Self {
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

/// Part of a product that one task computes.
struct Share<'a> {
    product: &'a Product<'a>,
    piece: Piece<'a>,
    first_row: usize,
    rows: usize,
    /// Where rows are many: their tiles.
    tiles: Option<Tiled>,
}

/// A product's rows in the workspace.
#[derive(Clone, Copy)]
struct Tiled {
    /// Where the first tile begins.
    start: usize,
    /// Rows of each tile but the last.
    height: usize,
}

impl Product<'_> {
    fn rows(&self) -> usize {
        self.x.len() / self.weight.inputs
    }
}

/// Computes all products in one job of the threads (after another that makes tiles), however many they are: a mixture's
/// experts, an attention's heads.
///
/// # Safety
/// Each `out` is valid for its product's rows, nobody else uses it meanwhile, and no two products share any of it.
pub(crate) unsafe fn multiply(
    products: &[Product<'_>],
    kernels: &Kernels,
    pool: &mut Pool,
    workspace: &mut Workspace,
) {
    let Workspace { tiled, workers } = workspace;
    let tiles = tile(products, kernels, pool, tiled);
    let tasks = pool.threads() * TASKS_PER_THREAD;
    let panels: usize = products.iter().map(|product| product.weight.panels()).sum();
    let mut shares = Vec::new();
    for (product, tiles) in products.iter().zip(tiles) {
        let rows = product.rows();
        let (row_block, most) = match tiles {
            None => (rows.max(1), panels.div_ceil(tasks).next_multiple_of(2).max(FEW_PANELS)),
            Some(Tiled { height, .. }) => {
                let row_blocks = rows.div_ceil(ROW_BLOCK);
                let row_block = rows.div_ceil(row_blocks).next_multiple_of(height);
                (row_block, (panels * row_blocks).div_ceil(tasks).clamp(1, PANEL_BLOCK))
            }
        };
        for first_row in (0..rows).step_by(row_block) {
            let rows = row_block.min(rows - first_row);
            let pieces = product.weight.pieces(most).into_iter();
            shares.extend(pieces.map(|piece| Share { product, piece, first_row, rows, tiles }));
        }
    }
    pool.run(shares.len(), &|worker, task| {
        let Share { product: Product { weight, x, out }, piece, first_row: first, rows, tiles } =
            &shares[task];
        let block = |x, height| Block { x, height, first: *first, rows: *rows };
        if let Some(Tiled { start, height }) = *tiles {
            let block = block(&tiled[start + first * weight.inputs..], height);
            let mut scratch = workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            gemm(kernels, piece, &block, weight.outputs, *out, &mut scratch);
        } else {
            few(kernels, piece, &block(x, 1), weight.outputs, *out);
        }
    });
}

/// Copies the rows of every product that has many of them into tiles.
fn tile(
    products: &[Product<'_>],
    kernels: &Kernels,
    pool: &mut Pool,
    tiled: &mut Vec<f32>,
) -> Vec<Option<Tiled>> {
    let (mut length, mut tiles, mut runs) = (0, Vec::with_capacity(products.len()), Vec::new());
    for product in products {
        let rows = product.rows();
        assert_eq!(product.x.len(), rows * product.weight.inputs, "activations of another shape");
        if rows <= MOST_FEW {
            tiles.push(None);
            continue;
        }
        let tile = Tiled { start: length, height: tile_height(rows, kernels.tile_rows) };
        tiles.push(Some(tile));
        length += product.x.len();
        let run = tile.height * TILES_PER_TASK;
        runs.extend((0..rows).step_by(run).map(|first| (product, tile, first, run.min(rows - first))));
    }
    if tiled.len() < length {
        tiled.resize(length, 0.0);
    }
    let room = Disjoint::new(tiled);
    pool.run(runs.len(), &|_, task| {
        let (product, tile, first, rows) = runs[task];
        let k = product.weight.inputs;
        let from = &product.x[first * k..][..rows * k];
        // SAFETY: room for `rows` rows, which is this task's only.
        unsafe {
            let to = room.slice(tile.start + first * k, rows * k);
            tile_rows(from.as_ptr(), rows, k, tile.height, to.as_mut_ptr());
        }
    });
    tiles
}

/// Rows of activations that one task multiplies.
struct Block<'a> {
    /// From the first row on; in tiles for `gemm`, whose first then begins one.
    x: &'a [f32],
    /// Of the tiles.
    height: usize,
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
    let out_at = |row: usize, output: usize| (block.first + row) * outputs + output;
    let step = part.k.div_ceil(part.k.div_ceil(K_BLOCK)).next_multiple_of(K_UNIT.max(part.format.block()));
    for start in (0..part.k).step_by(step) {
        let columns = step.min(part.k - start);
        for index in 0..piece.panels {
            let panel = piece.first_panel + index;
            let whole = (panel + 1) * LANES <= part.rows;
            let (to, out_stride) = if whole {
                (out.pointer().wrapping_add(out_at(0, piece.output + index * LANES)), outputs)
            } else {
                (scratch.edge.as_mut_ptr(), LANES)
            };
            let task = Tiles {
                x: block.x.as_ptr(),
                layout: Rows::Tiled { height: block.height, k: part.k, start },
                rows: block.rows,
                k: columns,
                panel: expanded(kernels, part, panel, start..start + columns, &mut scratch.expanded),
                panel_stride: LANES,
                init: if start == 0 { part.init[panel * LANES..].as_ptr() } else { std::ptr::null() },
                out: to,
                out_stride,
            };
            // SAFETY: `x` has `rows` rows of `k`; a whole panel's outputs are sixteen columns of `out` that no other
            // task has for these rows, an edge has ROW_BLOCK rows.
            unsafe { (kernels.tiles)(&task) };
        }
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

/// Columns of a panel as f32, `[column][16]`: in the panel itself, or expanded into `room`.
fn expanded(
    kernels: &Kernels,
    part: &Packed,
    panel: usize,
    columns: std::ops::Range<usize>,
    room: &mut [f32],
) -> *const f32 {
    let bytes = &part.bytes.as_slice()[panel * part.panel_bytes..][..part.panel_bytes];
    let from = bytes[part.format.panel_bytes(columns.start)..].as_ptr();
    if part.format == PanelFormat::F32 {
        return from.cast();
    }
    assert!(columns.len() * LANES <= room.len());
    // SAFETY: these columns of the panel, whole groups, and room for them.
    unsafe { kernels.expand[part.format as usize](from, columns.len(), room.as_mut_ptr()) };
    room.as_ptr()
}
