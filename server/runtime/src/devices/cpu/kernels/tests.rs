//! Every instruction set against the portable kernels, bit for bit, and those against plain arithmetic in f64.

use super::{Few, Kernels, MOST_FEW, PanelFormat, Rows, Tiles, available, tile_height, tile_rows};

const FORMATS: [PanelFormat; PanelFormat::COUNT] = [
    PanelFormat::F32,
    PanelFormat::F16,
    PanelFormat::Bf16,
    PanelFormat::Q8,
    PanelFormat::Q4,
    PanelFormat::Q5,
    PanelFormat::K4,
    PanelFormat::K5,
    PanelFormat::K6,
];

/// A small generator of reproducible numbers (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn around_zero(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.around_zero()).collect()
    }
}

/// A panel of arbitrary weights, all finite.
fn panel(format: PanelFormat, k: usize, numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..format.panel_bytes(k)).map(|_| numbers.bits() as u8).collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let (halves, floats) = match format {
            PanelFormat::F32 => (0, block.len()),
            PanelFormat::F16 => (block.len(), 0),
            PanelFormat::Bf16 => {
                for value in block.chunks_exact_mut(2) {
                    value.copy_from_slice(&half::bf16::from_f32(numbers.around_zero()).to_le_bytes());
                }
                (0, 0)
            }
            PanelFormat::Q8 | PanelFormat::K6 => (32, 0),
            PanelFormat::Q4 | PanelFormat::Q5 | PanelFormat::K4 | PanelFormat::K5 => (64, 0),
        };
        for value in block[..halves].chunks_exact_mut(2) {
            value.copy_from_slice(&half::f16::from_f32(numbers.around_zero()).to_le_bytes());
        }
        for value in block[..floats].chunks_exact_mut(4) {
            value.copy_from_slice(&numbers.around_zero().to_le_bytes());
        }
    }
    bytes
}

fn expand(kernels: &Kernels, format: PanelFormat, panel: &[u8], k: usize) -> Vec<f32> {
    let mut out = vec![0.0; k * 16];
    // SAFETY: the panel has `k` columns and `out` room for 16 values of each.
    unsafe { kernels.expand[format as usize](panel.as_ptr(), k, out.as_mut_ptr()) };
    out
}

fn few(
    kernels: &Kernels,
    format: PanelFormat,
    panels: &[u8],
    (x, rows): (&[f32], usize),
    init: &[f32],
) -> Vec<f32> {
    let k = x.len() / rows;
    let mut out = vec![0.0; init.len() * rows];
    let task = Few {
        x: x.as_ptr(),
        x_stride: k,
        rows,
        k,
        panel: panels.as_ptr(),
        panel_bytes: format.panel_bytes(k),
        panels: init.len() / 16,
        init: init.as_ptr(),
        out: out.as_mut_ptr(),
        out_stride: init.len(),
    };
    // SAFETY: lengths agree as above.
    unsafe { kernels.few[format as usize](&task) };
    out
}

fn tiles(kernels: &Kernels, x: &[f32], rows: usize, panel: &[f32], init: &[f32], tiled: bool) -> Vec<f32> {
    let (k, mut out) = (x.len() / rows, vec![0.0; rows * 16]);
    let half = k / 2;
    let height = tile_height(rows, kernels.tile_rows);
    let mut copy = vec![0.0; x.len()];
    // SAFETY: `rows` rows of `k`, and as much room.
    unsafe { tile_rows(x.as_ptr(), rows, k, height, copy.as_mut_ptr()) };
    let x = if tiled { &copy } else { x };
    let layout = |start| if tiled { Rows::Tiled { height, k, start } } else { Rows::Apart(k) };
    let mut task = Tiles {
        x: x.as_ptr(),
        layout: layout(0),
        rows,
        k: half,
        panel: panel.as_ptr(),
        panel_stride: 16,
        init: init.as_ptr(),
        out: out.as_mut_ptr(),
        out_stride: 16,
    };
    // SAFETY: `x` is `rows` rows of `k`, `panel` has `k` rows and `out` has `rows` rows of 16.
    unsafe { (kernels.tiles)(&task) };
    // In two steps, as `linear` does for long rows.
    (task.layout, task.panel) = (layout(half), panel[half * 16..].as_ptr());
    task.x = if tiled { x.as_ptr() } else { x[half..].as_ptr() };
    (task.k, task.init) = (k - half, std::ptr::null());
    // SAFETY: the second half of the same.
    unsafe { (kernels.tiles)(&task) };
    out
}

#[test]
fn instruction_sets_agree_bit_for_bit() {
    let sets = available();
    let portable = sets[sets.len() - 1];
    let numbers = &mut Numbers(1);
    for kernels in &sets[..sets.len() - 1] {
        for format in FORMATS {
            let k = format.block().max(96);
            let panels: Vec<u8> = (0..3).flat_map(|_| panel(format, k, numbers)).collect();
            let init = numbers.floats(48);
            let expanded = expand(portable, format, &panels[..format.panel_bytes(k)], k);
            assert_eq!(expand(kernels, format, &panels[..format.panel_bytes(k)], k), expanded, "{format:?}");
            for rows in 1..=MOST_FEW {
                let x = numbers.floats(rows * k);
                let product = few(portable, format, &panels, (&x, rows), &init);
                assert_eq!(
                    few(kernels, format, &panels, (&x, rows), &init),
                    product,
                    "{} {format:?}",
                    kernels.name
                );
            }
        }
        for rows in 1..14 {
            let (x, panel, init) = (numbers.floats(rows * 33), numbers.floats(33 * 16), numbers.floats(16));
            let product = tiles(portable, &x, rows, &panel, &init, false);
            for tiled in [false, true] {
                let same = tiles(kernels, &x, rows, &panel, &init, tiled);
                assert_eq!(same, product, "{} {rows} rows, tiled: {tiled}", kernels.name);
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_number() {
    let numbers = &mut Numbers(2);
    for kernels in available() {
        for format in FORMATS {
            let k = format.block().max(64);
            let packed = panel(format, k, numbers);
            let (x, init) = (numbers.floats(11 * k), numbers.floats(16));
            let together = tiles(kernels, &x, 11, &expand(kernels, format, &packed, k), &init, true);
            for rows in 1..=MOST_FEW {
                for (x, expected) in x.chunks_exact(rows * k).zip(together.chunks_exact(rows * 16)) {
                    let product = few(kernels, format, &packed, (x, rows), &init);
                    assert_eq!(product, expected, "{} {format:?}, {rows} rows", kernels.name);
                }
            }
        }
    }
}

#[test]
fn products_are_right() {
    let numbers = &mut Numbers(3);
    for kernels in available() {
        let (k, format) = (64, PanelFormat::Q4);
        let packed = panel(format, k, numbers);
        let weights = expand(kernels, format, &packed, k);
        let (x, init) = (numbers.floats(k), numbers.floats(16));
        let product = few(kernels, format, &packed, (&x, 1), &init);
        for lane in 0..16 {
            let terms = (0..k).map(|i| f64::from(x[i]) * f64::from(weights[i * 16 + lane]));
            let exact = f64::from(init[lane]) + terms.sum::<f64>();
            assert!((f64::from(product[lane]) - exact).abs() < 1e-4, "{} against {exact}", product[lane]);
        }
        // The first weights of the panel, by the definition of the format: scale * quant + minimum.
        let value = |at: usize| half::f16::from_le_bytes([packed[at], packed[at + 1]]).to_f32();
        assert_eq!(weights[0], f32::from(packed[64] & 15).mul_add(value(0), value(32)));
        assert_eq!(weights[16], f32::from(packed[64] >> 4).mul_add(value(0), value(32)));
    }
}

#[test]
fn row_operations_agree_and_are_right() {
    let sets = available();
    let portable = sets[sets.len() - 1];
    let numbers = &mut Numbers(4);
    for kernels in &sets {
        for n in [1, 15, 16, 40, 576] {
            let (x, y) = (numbers.floats(n), numbers.floats(n));
            let scaled: Vec<f32> = x.iter().map(|v| v * 30.0).collect();
            let run = |kernels: &Kernels| {
                let (mut norm, mut gated) = (vec![0.0; n], vec![0.0; n]);
                let mut sum = x.clone();
                let mut scores = scaled.clone();
                scores.resize(n.next_multiple_of(16), f32::NAN);
                // SAFETY: all are `n` long, `scores` to the next multiple of 16.
                let total = unsafe {
                    (kernels.rms_norm)(x.as_ptr(), y.as_ptr(), 1e-5, norm.as_mut_ptr(), n);
                    (kernels.silu_mul)(scaled.as_ptr(), y.as_ptr(), gated.as_mut_ptr(), n);
                    (kernels.add)(sum.as_mut_ptr(), y.as_ptr(), n);
                    (kernels.softmax)(scores.as_mut_ptr(), n)
                };
                (norm, gated, sum, scores, total)
            };
            let result = run(kernels);
            assert_eq!(result, run(portable), "{}", kernels.name);
            let (norm, gated, sum, scores, total) = result;
            let square = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
            let largest = scaled.iter().copied().fold(f32::MIN, f32::max);
            let close = |a: f32, b: f64| (f64::from(a) - b).abs() <= 3e-6 * (1.0 + b.abs());
            for i in 0..n {
                let (v, w, g) = (f64::from(x[i]), f64::from(y[i]), f64::from(scaled[i]));
                assert!(close(norm[i], v / (square + 1e-5).sqrt() * w));
                assert!(close(gated[i], g / (1.0 + (-g).exp()) * w), "{} silu({g}) * {w}", gated[i]);
                assert!(close(sum[i], v + w));
                assert!(close(scores[i], (g - f64::from(largest)).exp()));
            }
            assert!(scores[n..].iter().all(|&s| s == 0.0));
            assert!(close(total, scores.iter().map(|&s| f64::from(s)).sum()));
        }
    }
}

#[test]
fn not_a_number_is_not_hidden() {
    for kernels in available() {
        let mut out = [0.0; 16];
        let mut gate = [1.0; 16];
        gate[3] = f32::NAN;
        let mut scores = gate;
        // SAFETY: all are 16 long.
        let total = unsafe {
            (kernels.silu_mul)(gate.as_ptr(), [1.0; 16].as_ptr(), out.as_mut_ptr(), 16);
            (kernels.softmax)(scores.as_mut_ptr(), 16)
        };
        assert!(out[3].is_nan() && out[4].is_finite());
        assert!(total.is_nan(), "{}", kernels.name);
    }
}
