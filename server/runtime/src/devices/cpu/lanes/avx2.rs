//! Lanes as two 256-bit registers: AVX2, FMA and F16C.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use std::arch::{asm, x86_64::*};

use super::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// `value * 2^n`, n standing in the low bits of the other. Not a closure: those are compiled without the caller's
/// instruction set unless they happen to be inlined.
#[inline(always)]
unsafe fn add_exponent(value: __m256, n: __m256) -> __m256 {
    let shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), shifted))
}

/// `sums + a.0 * b.0 + a.1 * b.1`. Written as instructions because the compiler, which may add integers in any order,
/// makes a tree of a chain of them that does not fit the registers.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_products(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: two instructions of AVX2 on registers.
    unsafe {
        asm!(
            "vpmaddwd {products}, {a}, {b}",
            "vpaddd {sums}, {sums}, {products}",
            products = out(ymm_reg) _,
            sums = inout(ymm_reg) sums,
            a = in(ymm_reg) a,
            b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Sixteen bytes as i16.
#[inline(always)]
unsafe fn widen_u8(from: *const u8) -> __m256i {
    _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()))
}

/// Numbers of 12 bits: their upper four, with the sign, are the upper four of `high`.
#[inline(always)]
unsafe fn join_i12(high: __m256i, low: __m256i) -> __m256i {
    let upper = _mm256_and_si256(_mm256_srai_epi16(high, 4), _mm256_set1_epi16(!0xff));
    _mm256_or_si256(upper, low)
}

/// The low half of each i32, with its sign.
#[inline(always)]
unsafe fn first_of_pairs(pairs: __m256i) -> __m256i {
    _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16)
}

impl Lanes for Avx2 {
    const TILE_ROWS: usize = 6;
    const INT_TILE_ROWS: usize = 5;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        let all = _mm256_set1_ps(value);
        Self(all, all)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        _mm256_storeu_ps(to, self.0);
        _mm256_storeu_ps(to.add(8), self.1);
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
        )
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
        Self(
            _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
        )
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
        let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()));
        Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
        let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
        Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, biased: Self) -> Self {
        Self(add_exponent(self.0, biased.0), add_exponent(self.1, biased.1))
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }

    type Ints = [__m256i; 2];
    type Pairs = [__m256i; 2];

    #[inline(always)]
    unsafe fn ints(value: i32) -> Self::Ints {
        [_mm256_set1_epi32(value); 2]
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints {
        [add_products(sums[0], a[0], b[0]), add_products(sums[1], a[1], b[1])]
    }

    #[inline(always)]
    unsafe fn total(ints: Self::Ints) -> i32 {
        let mut lanes = [0; 8];
        _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_add_epi32(ints[0], ints[1]));
        lanes.iter().sum()
    }

    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        Self(_mm256_cvtepi32_ps(ints[0]), _mm256_cvtepi32_ps(ints[1]))
    }

    #[inline(always)]
    unsafe fn split(pairs: Self::Pairs) -> (Self, Self) {
        let low = [first_of_pairs(pairs[0]), first_of_pairs(pairs[1])];
        let high = [_mm256_srai_epi32(pairs[0], 16), _mm256_srai_epi32(pairs[1], 16)];
        (Self::from_ints(low), Self::from_ints(high))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const i16) -> Self::Pairs {
        [_mm256_set1_epi32(from.cast::<i32>().read_unaligned()); 2]
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> Self::Pairs {
        [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(16).cast())]
    }

    #[inline(always)]
    unsafe fn store_pairs(pairs: Self::Pairs, to: *mut i16) {
        _mm256_storeu_si256(to.cast(), pairs[0]);
        _mm256_storeu_si256(to.add(16).cast(), pairs[1]);
    }

    #[inline(always)]
    unsafe fn load_pairs_i8(from: *const i8) -> Self::Pairs {
        [
            _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(16).cast())),
        ]
    }

    #[inline(always)]
    unsafe fn load_pairs_u4(from: *const u16) -> [Self::Pairs; 4] {
        let words = Self::load_pairs(from.cast());
        let low = _mm256_set1_epi16(15);
        let (a, b) = (words[0], words[1]);
        [
            [_mm256_and_si256(a, low), _mm256_and_si256(b, low)],
            [_mm256_and_si256(_mm256_srli_epi16(a, 4), low), _mm256_and_si256(_mm256_srli_epi16(b, 4), low)],
            [_mm256_and_si256(_mm256_srli_epi16(a, 8), low), _mm256_and_si256(_mm256_srli_epi16(b, 8), low)],
            [_mm256_srli_epi16(a, 12), _mm256_srli_epi16(b, 12)],
        ]
    }

    #[inline(always)]
    unsafe fn load_pairs_i12(high: *const u16, low: *const u8) -> [Self::Pairs; 4] {
        let [a, b] = Self::load_pairs(high.cast());
        [
            [
                join_i12(_mm256_slli_epi16(a, 12), widen_u8(low.add(0))),
                join_i12(_mm256_slli_epi16(b, 12), widen_u8(low.add(16))),
            ],
            [
                join_i12(_mm256_slli_epi16(a, 8), widen_u8(low.add(32))),
                join_i12(_mm256_slli_epi16(b, 8), widen_u8(low.add(48))),
            ],
            [
                join_i12(_mm256_slli_epi16(a, 4), widen_u8(low.add(64))),
                join_i12(_mm256_slli_epi16(b, 4), widen_u8(low.add(80))),
            ],
            [join_i12(a, widen_u8(low.add(96))), join_i12(b, widen_u8(low.add(112)))],
        ]
    }

    #[inline(always)]
    unsafe fn lessen(pairs: Self::Pairs, value: i16) -> Self::Pairs {
        let value = _mm256_set1_epi16(value);
        [_mm256_sub_epi16(pairs[0], value), _mm256_sub_epi16(pairs[1], value)]
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
        // Packing works within halves of the register: their middle quarters change places.
        _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64(packed, 0b11_01_10_00));
    }
}
