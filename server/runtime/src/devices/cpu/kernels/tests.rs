//! Every instruction set against the portable kernels, bit for bit, and those against plain arithmetic in f64.

use super::{
    DenseFormat, Few, Kernels, MOST_FEW, PanelFormat, QuantisedFew, QuantisedFormat, QuantisedTiles, Rows,
    SUM_COLUMNS, Tiles, X_BLOCK, available, tile_height, tile_rows,
};

const DENSE: [DenseFormat; DenseFormat::COUNT] = [DenseFormat::F32, DenseFormat::F16, DenseFormat::Bf16];
const QUANTISED: [QuantisedFormat; QuantisedFormat::COUNT] = [
    QuantisedFormat::Q8,
    QuantisedFormat::Q4,
    QuantisedFormat::Q4Minimum,
    QuantisedFormat::Q5Minimum,
    QuantisedFormat::K4,
    QuantisedFormat::K5,
    QuantisedFormat::K6,
    QuantisedFormat::B12,
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
            PanelFormat::Dense(DenseFormat::F32) => (0, block.len()),
            PanelFormat::Dense(DenseFormat::F16) => (block.len(), 0),
            PanelFormat::Dense(DenseFormat::Bf16) | PanelFormat::Quantised(QuantisedFormat::B12) => {
                let numbers_of = if matches!(format, PanelFormat::Dense(_)) { block.len() } else { 32 };
                for value in block[..numbers_of].chunks_exact_mut(2) {
                    value.copy_from_slice(&half::bf16::from_f32(numbers.around_zero()).to_le_bytes());
                }
                (0, 0)
            }
            PanelFormat::Quantised(QuantisedFormat::Q8 | QuantisedFormat::Q4 | QuantisedFormat::K6) => {
                (32, 0)
            }
            PanelFormat::Quantised(_) => (64, 0),
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
    unsafe { kernels.expand(format)(panel.as_ptr(), k, out.as_mut_ptr()) };
    out
}

fn few(
    kernels: &Kernels,
    format: DenseFormat,
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
        panel_bytes: PanelFormat::Dense(format).panel_bytes(k),
        panels: init.len() / 16,
        init: init.as_ptr(),
        out: out.as_mut_ptr(),
        out_stride: init.len(),
    };
    // SAFETY: lengths agree as above.
    unsafe { kernels.few[format as usize](&task) };
    out
}

/// Rows as integers.
#[derive(Debug, PartialEq)]
struct Quants {
    rows: usize,
    values: Vec<i16>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

impl Quants {
    fn new(kernels: &Kernels, x: &[f32], rows: usize) -> Self {
        let k = x.len() / rows;
        let (blocks, runs) = (k.div_ceil(X_BLOCK), k / SUM_COLUMNS);
        let mut this = Self {
            rows,
            values: vec![0; x.len()],
            scales: vec![0.0; rows * blocks],
            sums: vec![0.0; rows * runs],
        };
        for row in 0..rows {
            let (values, scales) = (&mut this.values[row * k..], &mut this.scales[row * blocks..]);
            let sums = &mut this.sums[row * runs..];
            // SAFETY: a row of `k`, and room for what is made of it.
            unsafe {
                let (values, scales) = (values.as_mut_ptr(), scales.as_mut_ptr());
                (kernels.quantise)(x[row * k..].as_ptr(), k, values, scales, sums.as_mut_ptr());
            }
        }
        this
    }

    fn k(&self) -> usize {
        self.values.len() / self.rows
    }
}

fn quantised_few(
    kernels: &Kernels,
    format: QuantisedFormat,
    panels: &[u8],
    x: &Quants,
    init: &[f32],
) -> Vec<f32> {
    let mut out = vec![0.0; init.len() * x.rows];
    let task = QuantisedFew {
        x: x.values.as_ptr(),
        scales: x.scales.as_ptr(),
        sums: x.sums.as_ptr(),
        rows: x.rows,
        k: x.k(),
        panel: panels.as_ptr(),
        panel_bytes: PanelFormat::Quantised(format).panel_bytes(x.k()),
        panels: init.len() / 16,
        init: init.as_ptr(),
        out: out.as_mut_ptr(),
        out_stride: init.len(),
    };
    // SAFETY: lengths agree as above.
    unsafe { kernels.quantised_few[format as usize](&task) };
    out
}

/// One panel with all rows, in tiles.
fn quantised_tiles(
    kernels: &Kernels,
    format: QuantisedFormat,
    panel: &[u8],
    x: &Quants,
    init: &[f32],
) -> Vec<f32> {
    let (k, rows, mut out) = (x.k(), x.rows, vec![0.0; x.rows * 16]);
    let height = tile_height(rows, kernels.quantised_tile_rows);
    let mut tiled = vec![0_i16; x.values.len()];
    // SAFETY: `rows` rows of `k / 2` pairs, and as much room.
    unsafe { tile_rows(x.values.as_ptr().cast(), rows, k / 2, height, tiled.as_mut_ptr().cast()) };
    let (mut quants, mut scales, mut minima) = (vec![0_i16; X_BLOCK * 16], vec![0.0; 256], vec![0.0; 256]);
    for start in (0..k).step_by(X_BLOCK) {
        let columns = X_BLOCK.min(k - start);
        let piece = panel[PanelFormat::Quantised(format).panel_bytes(start)..].as_ptr();
        let (scales, minima) = (scales.as_mut_ptr(), minima.as_mut_ptr());
        // SAFETY: those columns of the panel, and room for 256 columns.
        unsafe { kernels.unpack[format as usize](piece, columns, quants.as_mut_ptr(), scales, minima) };
        let task = QuantisedTiles {
            x: tiled.as_ptr(),
            height,
            row_columns: k,
            start,
            scales: x.scales[start / X_BLOCK..].as_ptr(),
            scales_stride: k.div_ceil(X_BLOCK),
            sums: x.sums[start / SUM_COLUMNS..].as_ptr(),
            sums_stride: k / SUM_COLUMNS,
            rows,
            k: columns,
            panel: quants.as_ptr(),
            group: format.group(),
            panel_scales: scales,
            panel_minima: if format.has_minima() { minima } else { std::ptr::null() },
            init: if start == 0 { init.as_ptr() } else { std::ptr::null() },
            out: out.as_mut_ptr(),
            out_stride: 16,
        };
        // SAFETY: as made above.
        unsafe { (kernels.quantised_tiles)(&task) };
    }
    out
}

fn tiles(kernels: &Kernels, x: &[f32], rows: usize, panel: &[f32], init: &[f32], tiled: bool) -> Vec<f32> {
    let (k, mut out) = (x.len() / rows, vec![0.0; rows * 16]);
    let half = k / 2;
    let height = tile_height(rows, kernels.tile_rows);
    let mut copy = vec![0.0; x.len()];
    // SAFETY: `rows` rows of `k`, and as much room.
    unsafe { tile_rows(x.as_ptr().cast(), rows, k, height, copy.as_mut_ptr().cast()) };
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

/// Nothing here fails for want of an instruction set; who runs these tests for the sake of one says so.
#[test]
fn the_kernels_are_those_expected() {
    let names: Vec<&str> = available().iter().map(|kernels| kernels.name).collect();
    if let Ok(expected) = std::env::var("BATON_TEST_KERNELS") {
        assert_eq!(names.join(", "), expected);
    }
}

#[test]
fn instruction_sets_agree_bit_for_bit() {
    let sets = available();
    let portable = sets[sets.len() - 1];
    let numbers = &mut Numbers(1);
    for kernels in &sets[..sets.len() - 1] {
        for format in DENSE {
            let (k, of) = (96, PanelFormat::Dense(format));
            let panels: Vec<u8> = (0..3).flat_map(|_| panel(of, k, numbers)).collect();
            let init = numbers.floats(48);
            let expanded = expand(portable, of, &panels[..of.panel_bytes(k)], k);
            assert_eq!(expand(kernels, of, &panels[..of.panel_bytes(k)], k), expanded, "{format:?}");
            for rows in 1..=MOST_FEW {
                let x = numbers.floats(rows * k);
                let product = few(portable, format, &panels, (&x, rows), &init);
                let same = few(kernels, format, &panels, (&x, rows), &init);
                assert_eq!(same, product, "{} {format:?}", kernels.name);
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
fn instruction_sets_agree_bit_for_bit_in_integers() {
    let sets = available();
    let portable = sets[sets.len() - 1];
    let numbers = &mut Numbers(5);
    for kernels in &sets[..sets.len() - 1] {
        for format in QUANTISED {
            let of = PanelFormat::Quantised(format);
            // Two and a half blocks of activations where the format's own blocks allow it.
            let k = if of.block() == 256 { 512 } else { 640 };
            let panels: Vec<u8> = (0..3).flat_map(|_| panel(of, k, numbers)).collect();
            let (one, init) = (&panels[..of.panel_bytes(k)], numbers.floats(48));
            assert_eq!(expand(kernels, of, one, k), expand(portable, of, one, k), "{format:?}");
            for rows in 1..14 {
                let x: Vec<f32> = numbers.floats(rows * k).iter().map(|x| x * x * x * 1e3).collect();
                let x = Quants::new(portable, &x, rows);
                if rows <= MOST_FEW {
                    let product = quantised_few(portable, format, &panels, &x, &init);
                    let same = quantised_few(kernels, format, &panels, &x, &init);
                    assert_eq!(same, product, "{} {format:?}, {rows} rows", kernels.name);
                }
                let product = quantised_tiles(portable, format, one, &x, &init[..16]);
                let same = quantised_tiles(kernels, format, one, &x, &init[..16]);
                assert_eq!(same, product, "{} {format:?}, {rows} rows in tiles", kernels.name);
            }
        }
    }
}

#[test]
fn rows_become_the_same_integers_everywhere() {
    let sets = available();
    let portable = sets[sets.len() - 1];
    let numbers = &mut Numbers(6);
    let mut x = numbers.floats(3 * 288);
    // A block of zeros, one of next to nothing, and halves between two integers.
    x[..256].fill(0.0);
    x[288..544].iter_mut().for_each(|x| *x *= 1e-33);
    (0..256).for_each(|i| x[576 + i] = (i as f32 - 127.0) / 2.0);
    x[576] = 32_767.0;
    let expected = Quants::new(portable, &x, 3);
    assert!(expected.values[..256].iter().all(|&quant| quant == 0) && expected.scales[0] == 0.0);
    assert_eq!((expected.values[576], expected.values[577], expected.scales[4]), (32_767, -63, 1.0));
    assert_eq!((x[578], x[580]), (-62.5, -61.5));
    assert_eq!((expected.values[578], expected.values[580]), (-62, -62), "halves go to even");
    let sum: i32 = expected.values[576..608].iter().map(|&quant| i32::from(quant)).sum();
    assert_eq!(expected.sums[18], sum as f32);
    for kernels in &sets {
        assert_eq!(Quants::new(kernels, &x, 3), expected, "{}", kernels.name);
        for (index, bad) in [(300, f32::NAN), (31, f32::INFINITY), (280, f32::NEG_INFINITY)] {
            let mut broken = x.clone();
            broken[index] = bad;
            let found = Quants::new(kernels, &broken, 3);
            for (block, scale) in found.scales.iter().enumerate() {
                let (row, from) = (block / 2, block % 2 * 256);
                let concerned =
                    (row * 288 + from..(row * 288 + from + 256).min((row + 1) * 288)).contains(&index);
                assert_eq!(scale.is_nan(), concerned, "{} {bad} at {index}, block {block}", kernels.name);
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_number() {
    let numbers = &mut Numbers(2);
    for kernels in available() {
        for format in DENSE {
            let (k, of) = (64, PanelFormat::Dense(format));
            let packed = panel(of, k, numbers);
            let (x, init) = (numbers.floats(11 * k), numbers.floats(16));
            let together = tiles(kernels, &x, 11, &expand(kernels, of, &packed, k), &init, true);
            for rows in 1..=MOST_FEW {
                for (x, expected) in x.chunks_exact(rows * k).zip(together.chunks_exact(rows * 16)) {
                    let product = few(kernels, format, &packed, (x, rows), &init);
                    assert_eq!(product, expected, "{} {format:?}, {rows} rows", kernels.name);
                }
            }
        }
        for format in QUANTISED {
            let of = PanelFormat::Quantised(format);
            let k = if of.block() == 256 { 512 } else { 288 };
            let packed = panel(of, k, numbers);
            let (x, init) = (numbers.floats(11 * k), numbers.floats(16));
            let together = quantised_tiles(kernels, format, &packed, &Quants::new(kernels, &x, 11), &init);
            for rows in 1..=MOST_FEW {
                for (x, expected) in x.chunks_exact(rows * k).zip(together.chunks_exact(rows * 16)) {
                    let x = Quants::new(kernels, x, rows);
                    let product = quantised_few(kernels, format, &packed, &x, &init);
                    assert_eq!(product, expected, "{} {format:?}, {rows} rows", kernels.name);
                }
            }
        }
    }
}

/// Fifteen bits of an activation are lost to nobody: sums of some hundred products are as near to exact as f32's.
#[test]
fn products_are_right() {
    let numbers = &mut Numbers(3);
    for kernels in available() {
        for format in QUANTISED {
            let (k, of) = (512, PanelFormat::Quantised(format));
            let packed = panel(of, k, numbers);
            let weights = expand(kernels, of, &packed, k);
            let (x, init) = (numbers.floats(k), numbers.floats(16));
            let product = quantised_few(kernels, format, &packed, &Quants::new(kernels, &x, 1), &init);
            for lane in 0..16 {
                let terms = (0..k).map(|i| f64::from(x[i]) * f64::from(weights[i * 16 + lane]));
                let sizes = (0..k).map(|i| f64::from(weights[i * 16 + lane]).powi(2));
                let (exact, size) = (f64::from(init[lane]) + terms.sum::<f64>(), sizes.sum::<f64>().sqrt());
                let error = (f64::from(product[lane]) - exact).abs();
                // Half a unit of 1/32767 for each activation, as a random walk; four standard deviations.
                let bound = 4.0 * size * 0.29 / 32_767.0 + 1e-5 * exact.abs() + 1e-6 * size;
                assert!(error <= bound, "{format:?}: {} against {exact}, {error} > {bound}", product[lane]);
            }
        }
        // The first weights of a panel, by the definition of the format: scale * quant + minimum.
        let of = PanelFormat::Quantised(QuantisedFormat::Q4Minimum);
        let packed = panel(of, 32, numbers);
        let weights = expand(kernels, of, &packed, 32);
        let value = |at: usize| half::f16::from_le_bytes([packed[at], packed[at + 1]]).to_f32();
        for (k, byte, shift) in [(0, 64, 0), (1, 66, 0), (2, 64, 4), (5, 67, 0), (7, 67, 4)] {
            let quant = f32::from(packed[byte] >> shift & 15);
            assert_eq!(weights[k * 16], quant.mul_add(value(0), value(32)), "weight {k}");
        }
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
        let mut scores = [gate, [1.0; 16]].concat();
        scores[19] = 5.0;
        // SAFETY: all are 16 long, `scores` twice that.
        let total = unsafe {
            (kernels.silu_mul)(gate.as_ptr(), [1.0; 16].as_ptr(), out.as_mut_ptr(), 16);
            (kernels.softmax)(scores.as_mut_ptr(), 32)
        };
        assert!(out[3].is_nan() && out[4].is_finite());
        assert!(total.is_nan(), "{}", kernels.name);
        // Nor does it hide a larger number after it in its lane.
        assert_eq!(scores[19], 1.0, "{}", kernels.name);
    }
}
