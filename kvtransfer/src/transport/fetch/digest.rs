//! A digest of samples of a slice: cheap next to copying it, and enough to see that it is the slice that was announced.
//!
//! Memory and fabrics that carry announced slices check every bit themselves, as a network does not. What is left to be
//! seen is a copy of the wrong place or of another time; a sample of any part of it shows that.

use crate::{
    session::crc32c,
    transport::{DataKey, splitmix},
};

/// Slices up to this size are looked at whole.
const WHOLE: usize = 4 << 10;
/// Longer ones are sampled once in so many bytes, at least and at most so often. Each sample is a miss of all caches, and
/// of the table of pages: sixteen of them cost as much as copying 64 KiB.
const SAMPLE_EVERY: usize = 16 << 10;
const SAMPLES: std::ops::RangeInclusive<usize> = 4..=16;
const SAMPLE_BYTES: usize = 64;

/// CRC32C of a short slice; of a long one, that of 64 bytes at its start, at its end and at 2 to 14 places between that
/// depend on the transfer's key, layer and block. `copy_out` gives the slice's bytes from a place on.
pub(crate) fn digest<E>(
    key: &DataKey,
    (layer, block): (u32, u32),
    slice_bytes: usize,
    mut copy_out: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
) -> Result<u32, E> {
    if slice_bytes <= WHOLE {
        let mut whole = [0; WHOLE];
        let whole = &mut whole[..slice_bytes];
        copy_out(0, whole)?;
        return Ok(crc32c(whole));
    }
    let (_, seed) = key.as_bytes().split_at(8);
    let mut seed = seed.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
    seed ^= u64::from(layer) << 32 | u64::from(block);
    let last = slice_bytes - SAMPLE_BYTES;
    let count = (slice_bytes / SAMPLE_EVERY).clamp(*SAMPLES.start(), *SAMPLES.end());
    let mut samples = [0; *SAMPLES.end() * SAMPLE_BYTES];
    let samples = &mut samples[..count * SAMPLE_BYTES];
    for (at, sample) in samples.chunks_exact_mut(SAMPLE_BYTES).enumerate() {
        let from = match at {
            0 => 0,
            1 => last,
            _ => splitmix::output(seed, at as u64 - 1) as usize % last,
        };
        copy_out(from, sample)?;
    }
    Ok(crc32c(samples))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(key: &DataKey, layer: u32, block: u32, slice: &[u8]) -> u32 {
        let copy_out = |from: usize, into: &mut [u8]| {
            into.copy_from_slice(&slice[from..from + into.len()]);
            Ok::<_, std::convert::Infallible>(())
        };
        super::digest(key, (layer, block), slice.len(), copy_out).unwrap_or_else(|never| match never {})
    }

    #[test]
    fn sees_another_slice_and_another_time_and_the_ends() {
        let key = DataKey::generate();
        let slice: Vec<u8> = (0..24 << 10).map(|at| (at * 7 + at / 251) as u8).collect();
        let whole = digest(&key, 3, 4, &slice);
        assert_eq!(whole, digest(&key, 3, 4, &slice));
        let mut other = slice.clone();
        other.rotate_left(1);
        assert_ne!(whole, digest(&key, 3, 4, &other), "another place");
        assert_ne!(whole, digest(&key, 3, 4, &vec![0; slice.len()]), "not written yet");
        for at in [0, slice.len() - 1] {
            let mut torn = slice.clone();
            torn[at] ^= 1;
            assert_ne!(whole, digest(&key, 3, 4, &torn), "byte {at}");
        }
        // Half a slice of another time: each sample between is in it with even odds.
        let torn: Vec<u8> = slice[..12 << 10].iter().chain(&vec![0; 12 << 10]).copied().collect();
        assert_ne!(whole, digest(&key, 3, 4, &torn));
        let short = [1u8; 100];
        assert_eq!(digest(&key, 0, 0, &short), crc32c(&short));
    }
}
