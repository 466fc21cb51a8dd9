//! The seeds of the targets, for the unit tests of the crates that have them: what was found once is tried with every build,
//! without libFuzzer.

use std::{fs, path::PathBuf};

/// Gives the target each of its seeds, and beginnings of them, which is where parsers end too early.
///
/// # Panics
/// If there are none, or where the target does.
pub fn replay(target: &str, takes: fn(&[u8])) {
    let folder = folder(target);
    let seeds = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut count = 0;
    for seed in seeds {
        let path = seed.expect("the folder can be read").path();
        let seed = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        takes(&seed);
        [0, 1, 2, 4, 8, 16, 32].into_iter().filter_map(|length| seed.get(..length)).for_each(takes);
        count += 1;
    }
    assert!(count > 0, "no seeds in {}", folder.display());
}

/// Where the seeds of a target are.
pub fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target)
}
