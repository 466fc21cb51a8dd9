//! How a panel of sixteen weight rows is stored, and how the kernels see its weights.
//!
//! A panel is a run of blocks along k; a block holds `BLOCK` consecutive k of all sixteen rows. Written by `pack`, read
//! by `dense` and `quantised`. [`Dense`] weights become f32 lanes. [`Quantised`] ones stay integers, in pairs of
//! consecutive k, and go in groups of `GROUP` k that share a scale and, in some formats, a minimum:
//! `weight = scale * quant + minimum`. Quants of five and six bits are kept as bytes: putting them together costs more
//! time than the memory they save.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use super::super::lanes::{LANES, Lanes};

/// Formats of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PanelFormat {
    Dense(DenseFormat),
    Quantised(QuantisedFormat),
}

/// Formats that hold each weight by itself; the index into the kernel tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DenseFormat {
    F32,
    F16,
    Bf16,
}

/// Formats that hold small integers and what they are multiples of; the index into the kernel tables.
///
/// Bytes of a group are `[k / 2][16 lanes][2]`. Bits in fours are `[k / 8][16 lanes][2]` words of 16 bits, of
/// which word `b` of a lane holds k = b, b + 2, b + 4 and b + 6, lowest bits first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QuantisedFormat {
    /// 32 k: f16 scales, i8 quants.
    Q8,
    /// 32 k: f16 scales, 4-bit quants stored 8 too large.
    Q4,
    /// 32 k: f16 scales, f16 minima, 4-bit quants.
    Q4Minimum,
    /// 32 k: f16 scales, f16 minima, i8 quants.
    Q5Minimum,
    /// 256 k: f16 factors of scales and of minima; 8 groups of 32 k: u8 scales, u8 minima, 4-bit quants.
    K4,
    /// As K4 with i8 quants.
    K5,
    /// 256 k: f16 factors of scales; 16 groups of 16 k: i8 scales, i8 quants.
    K6,
    /// 32 k: bf16 scales, 12-bit quants: their lower eight bits as bytes, then the upper four.
    B12,
}

impl PanelFormat {
    /// Consecutive k in one block; rows must be a multiple of it long.
    pub(crate) const fn block(self) -> usize {
        self.of_format().0
    }

    /// Bytes of one block of sixteen rows.
    pub(crate) const fn block_bytes(self) -> usize {
        self.of_format().1
    }

    const fn of_format(self) -> (usize, usize) {
        match self {
            Self::Dense(DenseFormat::F32) => (<F32 as Dense>::BLOCK, F32::BYTES),
            Self::Dense(DenseFormat::F16) => (<F16 as Dense>::BLOCK, F16::BYTES),
            Self::Dense(DenseFormat::Bf16) => (<Bf16 as Dense>::BLOCK, Bf16::BYTES),
            Self::Quantised(QuantisedFormat::Q8) => (Q8::BLOCK, Q8::BYTES),
            Self::Quantised(QuantisedFormat::Q4) => (Q4::BLOCK, Q4::BYTES),
            Self::Quantised(QuantisedFormat::Q4Minimum) => (Q4Minimum::BLOCK, Q4Minimum::BYTES),
            Self::Quantised(QuantisedFormat::Q5Minimum) => (Q5Minimum::BLOCK, Q5Minimum::BYTES),
            Self::Quantised(QuantisedFormat::K4) => (K4::BLOCK, K4::BYTES),
            Self::Quantised(QuantisedFormat::K5) => (K5::BLOCK, K5::BYTES),
            Self::Quantised(QuantisedFormat::K6) => (K6::BLOCK, K6::BYTES),
            Self::Quantised(QuantisedFormat::B12) => (B12::BLOCK, B12::BYTES),
        }
    }

    /// Bytes of a panel whose rows have `k` elements.
    pub(crate) const fn panel_bytes(self, k: usize) -> usize {
        k / self.block() * self.block_bytes()
    }
}

impl DenseFormat {
    pub(crate) const COUNT: usize = 3;
}

impl QuantisedFormat {
    pub(crate) const COUNT: usize = 8;

    /// Consecutive k that share a scale.
    pub(crate) const fn group(self) -> usize {
        match self {
            Self::K6 => K6::GROUP,
            _ => 32,
        }
    }

    pub(crate) const fn has_minima(self) -> bool {
        match self {
            Self::Q8 | Self::Q4 | Self::K6 | Self::B12 => false,
            Self::Q4Minimum | Self::Q5Minimum | Self::K4 | Self::K5 => true,
        }
    }
}

/// Weights by themselves.
///
/// # Safety
/// `block` points to a whole block, and the CPU has `V`'s features.
pub(crate) trait Dense {
    /// Columns of a block.
    const BLOCK: usize = 2;
    const BYTES: usize;

    /// The weights of a block's two k.
    unsafe fn pair<V: Lanes>(block: *const u8) -> (V, V);
}

macro_rules! dense {
    ($name:ident, $value:ty, $load:ident) => {
        pub(crate) struct $name;

        impl Dense for $name {
            const BYTES: usize = 2 * LANES * size_of::<$value>();

            #[inline(always)]
            unsafe fn pair<V: Lanes>(block: *const u8) -> (V, V) {
                let values = block.cast::<$value>();
                (V::$load(values), V::$load(values.add(LANES)))
            }
        }
    };
}

dense!(F32, f32, load);
dense!(F16, u16, load_f16);
dense!(Bf16, u16, load_bf16);

/// Weights as integers.
///
/// # Safety
/// `block` points to a whole block of the format, `group` to that group of it, and the CPU has `V`'s features;
/// `eight < GROUP / 8`.
pub(crate) trait Quantised {
    /// Columns of a block.
    const BLOCK: usize;
    /// Columns of a group.
    const GROUP: usize = 32;
    /// Bytes of a block before its first group.
    const HEADER_BYTES: usize = 0;
    const GROUP_BYTES: usize;
    const BYTES: usize = Self::HEADER_BYTES + Self::BLOCK / Self::GROUP * Self::GROUP_BYTES;
    /// Whether [`Self::minimum`] is anything but zero.
    const MINIMA: bool;

    unsafe fn scale<V: Lanes>(block: *const u8, group: *const u8) -> V;
    unsafe fn minimum<V: Lanes>(_block: *const u8, _group: *const u8) -> V {
        V::splat(0.0)
    }
    /// The quants of eight consecutive k of the group, a pair of k in each.
    unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4];
}

/// Bytes of 4-bit quants of `k` columns.
const fn nibble_bytes(k: usize) -> usize {
    k / 2 * LANES
}

/// Eight columns of bytes.
#[inline(always)]
unsafe fn bytes<V: Lanes>(quants: *const u8, eight: usize) -> [V::Pairs; 4] {
    let first = quants.add(8 * eight * LANES).cast::<i8>();
    let pair = |index: usize| first.wrapping_add(2 * index * LANES);
    [
        V::load_pairs_i8(pair(0)),
        V::load_pairs_i8(pair(1)),
        V::load_pairs_i8(pair(2)),
        V::load_pairs_i8(pair(3)),
    ]
}

/// Eight columns of four bits.
#[inline(always)]
unsafe fn nibbles<V: Lanes>(quants: *const u8, eight: usize) -> [V::Pairs; 4] {
    V::load_pairs_u4(quants.add(nibble_bytes(8 * eight)).cast())
}

pub(crate) struct Q8;

impl Quantised for Q8 {
    const BLOCK: usize = 32;
    const GROUP_BYTES: usize = 2 * LANES + Self::GROUP * LANES;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scale<V: Lanes>(_: *const u8, group: *const u8) -> V {
        V::load_f16(group.cast())
    }

    #[inline(always)]
    unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4] {
        bytes::<V>(group.add(2 * LANES), eight)
    }
}

pub(crate) struct Q4;

impl Quantised for Q4 {
    const BLOCK: usize = 32;
    const GROUP_BYTES: usize = 2 * LANES + nibble_bytes(Self::GROUP);
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scale<V: Lanes>(_: *const u8, group: *const u8) -> V {
        V::load_f16(group.cast())
    }

    #[inline(always)]
    unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4] {
        let [a, b, c, d] = nibbles::<V>(group.add(2 * LANES), eight);
        [V::lessen(a, 8), V::lessen(b, 8), V::lessen(c, 8), V::lessen(d, 8)]
    }
}

/// Groups of 32 k with a scale and a minimum as f16 before their quants.
macro_rules! with_minimum {
    ($name:ident, $quant_bytes:expr, $quants:ident) => {
        pub(crate) struct $name;

        impl Quantised for $name {
            const BLOCK: usize = 32;
            const GROUP_BYTES: usize = 4 * LANES + $quant_bytes;
            const MINIMA: bool = true;

            #[inline(always)]
            unsafe fn scale<V: Lanes>(_: *const u8, group: *const u8) -> V {
                V::load_f16(group.cast())
            }

            #[inline(always)]
            unsafe fn minimum<V: Lanes>(_: *const u8, group: *const u8) -> V {
                V::load_f16(group.add(2 * LANES).cast())
            }

            #[inline(always)]
            unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4] {
                $quants::<V>(group.add(4 * LANES), eight)
            }
        }
    };
}

with_minimum!(Q4Minimum, nibble_bytes(Self::GROUP), nibbles);
with_minimum!(Q5Minimum, Self::GROUP * LANES, bytes);

/// Blocks of 256 k whose groups have scales and minima in six bits, multiples of the block's f16 factors. The products
/// are exact.
macro_rules! of_factors {
    ($name:ident, $quant_bytes:expr, $quants:ident) => {
        pub(crate) struct $name;

        impl Quantised for $name {
            const BLOCK: usize = 256;
            const HEADER_BYTES: usize = 4 * LANES;
            const GROUP_BYTES: usize = 2 * LANES + $quant_bytes;
            const MINIMA: bool = true;

            #[inline(always)]
            unsafe fn scale<V: Lanes>(block: *const u8, group: *const u8) -> V {
                V::load_f16(block.cast()).mul(V::load_u8(group))
            }

            #[inline(always)]
            unsafe fn minimum<V: Lanes>(block: *const u8, group: *const u8) -> V {
                V::load_f16(block.add(2 * LANES).cast()).mul(V::load_u8(group.add(LANES)))
            }

            #[inline(always)]
            unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4] {
                $quants::<V>(group.add(2 * LANES), eight)
            }
        }
    };
}

of_factors!(K4, nibble_bytes(Self::GROUP), nibbles);
of_factors!(K5, Self::GROUP * LANES, bytes);

pub(crate) struct K6;

impl Quantised for K6 {
    const BLOCK: usize = 256;
    const GROUP: usize = 16;
    const HEADER_BYTES: usize = 2 * LANES;
    const GROUP_BYTES: usize = LANES + Self::GROUP * LANES;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scale<V: Lanes>(block: *const u8, group: *const u8) -> V {
        V::load_f16(block.cast()).mul(V::load_i8(group.cast()))
    }

    #[inline(always)]
    unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4] {
        bytes::<V>(group.add(LANES), eight)
    }
}

pub(crate) struct B12;

impl B12 {
    const LOW_BYTES: usize = Self::GROUP * LANES;
    /// Largest quant: 32 products with activations of 16 bits add up to less than 2^31.
    pub(crate) const LARGEST: i16 = 2047;
}

impl Quantised for B12 {
    const BLOCK: usize = 32;
    const GROUP_BYTES: usize = 2 * LANES + Self::LOW_BYTES + nibble_bytes(Self::GROUP);
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn scale<V: Lanes>(_: *const u8, group: *const u8) -> V {
        V::load_bf16(group.cast())
    }

    #[inline(always)]
    unsafe fn quants<V: Lanes>(group: *const u8, eight: usize) -> [V::Pairs; 4] {
        let low = group.add(2 * LANES);
        let high = low.add(Self::LOW_BYTES + nibble_bytes(8 * eight));
        V::load_pairs_i12(high.cast(), low.add(8 * eight * LANES))
    }
}
