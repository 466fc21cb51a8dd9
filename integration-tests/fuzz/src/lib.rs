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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What `run` runs by the folders, the program finds by its list, and the page tells of.
    #[test]
    fn each_target_has_seeds_and_each_folder_a_target() {
        let program = include_str!("main.rs");
        let (_, list) = program.split_once("const TARGETS").expect("a list");
        let (list, _) = list.split_once("];").expect("an end");
        let targets: BTreeSet<&str> = list.split('"').skip(1).step_by(2).collect();
        assert!(targets.len() > 10, "{targets:?}");

        let seeds = fs::read_dir(folder("")).expect("the folder of seeds");
        let names = seeds.map(|seeds| seeds.expect("can be read").file_name().into_string().expect("a name"));
        let folders: BTreeSet<String> = names.collect();
        assert_eq!(targets, folders.iter().map(String::as_str).collect());

        let page = include_str!("../README.md").lines().filter_map(|line| line.strip_prefix("| "));
        let cells = page.filter_map(|row| row.split(" | ").nth(1)?.strip_prefix('`')?.strip_suffix('`'));
        assert_eq!(targets, cells.collect());
    }
}
