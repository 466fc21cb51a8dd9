//! Attention's inner loops on every instruction set, type of cache and shape: the portable ones' bits, and what plain
//! arithmetic in f64 gives.

use half::bf16;

use crate::{
    KvDtype,
    devices::cpu::kernels::{Kernels, Scores, Weigh, available, tile_height},
};

/// Blocks of one KV head: keys `[dim][16]`, values `[columns][16][16]`, and the scales of both.
struct Cache {
    dtype: KvDtype,
    dim: usize,
    slices: Vec<Vec<u8>>,
}

impl Cache {
    fn columns(&self) -> usize {
        self.dim.div_ceil(16)
    }

    /// Where values, scales of keys and scales of values begin.
    fn places(&self) -> [usize; 3] {
        let bytes = self.dtype.bytes() * 16;
        let values = self.dim * bytes;
        let scales = values + self.columns() * 16 * bytes;
        [values, scales, scales + 64]
    }

    fn new(dtype: KvDtype, dim: usize, blocks: usize) -> Self {
        let mut cache = Self { dtype, dim, slices: Vec::new() };
        let numbers = dim * 16 + cache.columns() * 256;
        for block in 0..blocks {
            let number = |i: usize| ((block * 131 + i * 37) % 101) as f32 / 50.0 - 1.0;
            let mut slice = Vec::new();
            for i in 0..numbers {
                match dtype {
                    KvDtype::F32 => slice.extend(number(i).to_le_bytes()),
                    KvDtype::Bf16 => slice.extend(bf16::from_f32(number(i)).to_le_bytes()),
                    KvDtype::Int8 => slice.push((number(i) * 127.0) as i8 as u8),
                }
            }
            (0..32).for_each(|i| slice.extend((0.01 + i as f32 / 999.0).to_le_bytes()));
            cache.slices.push(slice);
        }
        cache
    }

    fn pointers(&self) -> Vec<*const u8> {
        self.slices.iter().map(|slice| slice.as_ptr()).collect()
    }

    /// Number `index` of a block, without its scale.
    fn number(&self, block: usize, index: usize) -> f64 {
        let at = &self.slices[block][index * self.dtype.bytes()..];
        match self.dtype {
            KvDtype::F32 => f32::from_le_bytes([at[0], at[1], at[2], at[3]]).into(),
            KvDtype::Bf16 => bf16::from_le_bytes([at[0], at[1]]).to_f64(),
            KvDtype::Int8 => (at[0] as i8).into(),
        }
    }

    fn key(&self, token: usize, element: usize) -> f64 {
        let scale = match self.dtype {
            KvDtype::Int8 => 0.01 + (token % 16) as f64 / 999.0,
            _ => 1.0,
        };
        scale * self.number(token / 16, element * 16 + token % 16)
    }

    fn value(&self, token: usize, element: usize) -> f64 {
        let index = (element / 16 * 16 + token % 16) * 16 + element % 16;
        self.number(token / 16, self.dim * 16 + index)
    }
}

/// Scores of all queries with all tokens, `[rows][tokens]`.
fn scores(kernels: &Kernels, cache: &Cache, queries: &[f32]) -> Vec<f32> {
    let (dim, blocks, rows) = (cache.dim, cache.slices.len(), queries.len() / cache.dim);
    let height = tile_height(rows, kernels.tile_rows);
    let (pointers, mut out) = (cache.pointers(), vec![f32::NAN; rows * blocks * 16]);
    let task = Scores {
        queries: queries.as_ptr(),
        rows,
        height,
        dim,
        slices: pointers.as_ptr(),
        blocks,
        keys: 0,
        scales: cache.places()[1],
        out: out.as_mut_ptr(),
        out_stride: blocks * 16,
    };
    // SAFETY: `rows` queries, slices as `Cache` lays them out, and scores of all tokens for each query.
    unsafe { (kernels.scores[cache.dtype as usize])(&task) };
    out
}

/// Sums of the first `tokens` values, in two calls of which the second goes on from the first.
fn weigh(kernels: &Kernels, cache: &Cache, scores: &[f32], rows: usize, tokens: usize) -> Vec<f32> {
    let (pointers, width) = (cache.pointers(), cache.columns() * 16);
    let mut sums = vec![f32::NAN; rows * width];
    let stride = scores.len() / rows;
    for (from, tokens) in [(0, tokens.min(16)), (16, tokens.saturating_sub(16))] {
        if tokens == 0 {
            continue;
        }
        let task = Weigh {
            scores: scores[from..].as_ptr(),
            scores_stride: stride,
            rows,
            height: tile_height(rows, kernels.tile_rows),
            slices: pointers[from / 16..].as_ptr(),
            tokens,
            values: cache.places()[0],
            columns: cache.columns(),
            sums: sums.as_mut_ptr(),
            sums_stride: width,
            resume: from > 0,
        };
        // SAFETY: `rows` rows of `tokens` scores, slices with as many tokens, and `width` sums of each row.
        unsafe { (kernels.weigh[cache.dtype as usize])(&task) };
    }
    sums
}

#[test]
fn attention_is_the_same_everywhere_and_right() {
    let sets = available();
    let portable = sets[sets.len() - 1];
    for dtype in KvDtype::ALL {
        for (dim, blocks) in [(12, 1), (16, 2), (20, 3), (64, 5)] {
            let cache = Cache::new(dtype, dim, blocks);
            for rows in 1..=13 {
                let queries: Vec<f32> = (0..rows * dim).map(|i| (i * 53 % 97) as f32 / 48.0 - 1.0).collect();
                let expected = scores(portable, &cache, &queries);
                let tokens = blocks * 16 - 5;
                let sums = weigh(portable, &cache, &expected, rows, tokens);
                for kernels in &sets {
                    assert_eq!(scores(kernels, &cache, &queries), expected, "{} {dtype:?}", kernels.name);
                    let same = weigh(kernels, &cache, &expected, rows, tokens);
                    assert_eq!(same, sums, "{} {dtype:?}, {rows} rows", kernels.name);
                }
                check(&cache, &queries, &expected, (&sums, tokens));
            }
        }
    }
}

fn check(cache: &Cache, queries: &[f32], scores: &[f32], (sums, tokens): (&[f32], usize)) {
    let (all, width) = (cache.slices.len() * 16, cache.columns() * 16);
    for (row, query) in queries.chunks(cache.dim).enumerate() {
        for token in 0..all {
            let terms = query.iter().enumerate().map(|(i, &q)| f64::from(q) * cache.key(token, i));
            let (found, exact) = (f64::from(scores[row * all + token]), terms.sum::<f64>());
            assert!((found - exact).abs() <= 1e-5 * (1.0 + exact.abs()), "score {found}, not {exact}");
        }
        for element in 0..cache.dim {
            let score = |token: usize| f64::from(scores[row * all + token]);
            let terms = (0..tokens).map(|token| score(token) * cache.value(token, element));
            let (exact, size) = terms.fold((0.0, 1.0), |(sum, size), term| (sum + term, size + term.abs()));
            let found = f64::from(sums[row * width + element]);
            assert!((found - exact).abs() <= 1e-5 * size, "sum {found}, not {exact}");
        }
    }
}
