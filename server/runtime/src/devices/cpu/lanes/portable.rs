//! Lanes in plain Rust: the reference that the others are tested against, and the path of CPUs without one of their own.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use std::array;

use half::{bf16, f16};

use super::{LANES, Lanes};

#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const TILE_ROWS: usize = 6;
    const INT_TILE_ROWS: usize = 5;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(from.cast::<[f32; LANES]>().read_unaligned())
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        to.cast::<[f32; LANES]>().write_unaligned(self.0);
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(array::from_fn(|i| self.0[i].mul_add(factor.0[i], addend.0[i])))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        let bits = from.cast::<[u16; LANES]>().read_unaligned();
        Self(bits.map(|b| f16::from_bits(b).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let bits = from.cast::<[u16; LANES]>().read_unaligned();
        Self(bits.map(|b| bf16::from_bits(b).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        Self(from.cast::<[i8; LANES]>().read_unaligned().map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        Self(from.cast::<[u8; LANES]>().read_unaligned().map(f32::from))
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, biased: Self) -> Self {
        self.zip(biased, |a, n| f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23)))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    type Ints = [i32; LANES];
    type Pairs = [[i16; 2]; LANES];

    #[inline(always)]
    unsafe fn ints(value: i32) -> Self::Ints {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints {
        let product = |i: usize, half: usize| i32::from(a[i][half]) * i32::from(b[i][half]);
        array::from_fn(|i| sums[i] + product(i, 0) + product(i, 1))
    }

    #[inline(always)]
    unsafe fn total(ints: Self::Ints) -> i32 {
        ints.iter().sum()
    }

    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        Self(ints.map(|value| value as f32))
    }

    #[inline(always)]
    unsafe fn split(pairs: Self::Pairs) -> (Self, Self) {
        (Self(pairs.map(|[first, _]| first.into())), Self(pairs.map(|[_, second]| second.into())))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const i16) -> Self::Pairs {
        [from.cast::<[i16; 2]>().read_unaligned(); LANES]
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> Self::Pairs {
        from.cast::<Self::Pairs>().read_unaligned()
    }

    #[inline(always)]
    unsafe fn store_pairs(pairs: Self::Pairs, to: *mut i16) {
        to.cast::<Self::Pairs>().write_unaligned(pairs);
    }

    #[inline(always)]
    unsafe fn load_pairs_i8(from: *const i8) -> Self::Pairs {
        from.cast::<[[i8; 2]; LANES]>().read_unaligned().map(|pair| pair.map(i16::from))
    }

    #[inline(always)]
    unsafe fn load_pairs_u4(from: *const u16) -> [Self::Pairs; 4] {
        let words = from.cast::<[[u16; 2]; LANES]>().read_unaligned();
        array::from_fn(|four| words.map(|pair| pair.map(|word| (word >> (4 * four) & 15) as i16)))
    }

    #[inline(always)]
    unsafe fn load_pairs_i12(high: *const u16, low: *const u8) -> [Self::Pairs; 4] {
        let high = high.cast::<[[u16; 2]; LANES]>().read_unaligned();
        let low = low.cast::<[[[u8; 2]; LANES]; 4]>().read_unaligned();
        let number = |four: usize, lane: usize, half: usize| {
            let high = (high[lane][half] << (12 - 4 * four)) as i16 >> 12;
            high << 8 | i16::from(low[four][lane][half])
        };
        array::from_fn(|four| array::from_fn(|lane| array::from_fn(|half| number(four, lane, half))))
    }

    #[inline(always)]
    unsafe fn lessen(pairs: Self::Pairs, value: i16) -> Self::Pairs {
        pairs.map(|pair| pair.map(|quant| quant - value))
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        to.cast::<[i16; LANES]>().write_unaligned(self.0.map(|value| value.round_ties_even() as i16));
    }
}
