//! SplitMix64 (Steele, Lea and Flood, 2014): numbers that look random, and are the same for whoever has the seed.

/// Output number `n` of the generator that starts at `seed`; the first is number 1.
pub(super) fn output(seed: u64, n: u64) -> u64 {
    let mut word = seed.wrapping_add(n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    #[test]
    fn gives_the_numbers_of_the_reference() {
        let numbers = [1, 2, 3].map(|n| super::output(1_234_567, n));
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }
}
