//! House rules that no compiler checks, each with its reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use baton_integration_tests::folder;

/// Which of our crates a crate may use. Dependencies point one way, and the services never depend on each other, so
/// that each can be built, deployed and understood alone.
const MAY_USE: [(&str, &[&str]); 14] = [
    ("proto", &[]),
    ("controller/registry", &["baton-process", "baton-proto"]),
    ("controller", &["baton-process", "baton-proto", "baton-registry"]),
    (
        "coordinator",
        &["baton-checkpoint", "baton-process", "baton-proto", "baton-registry", "baton-schedule"],
    ),
    ("coordinator/schedule", &["baton-proto"]),
    ("server/runtime/checkpoint", &[]),
    ("server/runtime", &["baton-checkpoint"]),
    ("kvtransfer", &["baton-proto"]),
    ("kvtransfer/emulator", &[]),
    ("server", &["baton-checkpoint", "baton-kvtransfer", "baton-process", "baton-proto", "baton-runtime"]),
    ("deploy/process", &[]),
    ("deploy/standalone", &["baton-checkpoint", "baton-process", "baton-proto"]),
    ("integration-tests", &["baton-process"]),
    (
        "integration-tests/fuzz",
        &[
            "baton-controller",
            "baton-coordinator",
            "baton-kvtransfer",
            "baton-process",
            "baton-proto",
            "baton-registry",
            "baton-server",
        ],
    ),
];

/// All that is tracked at the top level, but for dotfiles. A newcomer reads this list first: each service, what they share, how
/// they are deployed and how they are tested together. What belongs to one of these lies in its folder; another entry is another
/// part of the design.
const TOP_LEVEL: [&str; 12] = [
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "controller",
    "coordinator",
    "deploy",
    "integration-tests",
    "kvtransfer",
    "proto",
    "server",
];

/// Longer files want to be split by meaning; tests and their support may be somewhat longer.
const LINES: usize = 450;
const TEST_LINES: usize = 560;

fn root() -> PathBuf {
    folder().join("..")
}

/// Every Rust file of the crates.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = MAY_USE.iter().map(|(folder, _)| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())).flatten()
        {
            let path = entry.path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found.dedup();
    found
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests") || path.to_string_lossy().contains("tests.rs")
}

#[test]
fn the_top_level_holds_the_parts_of_the_design_alone() {
    // What git tracks: whoever works here may have a model or a token's file beside it.
    let listed = Command::new("git").arg("-C").arg(root()).args(["ls-files", "-z"]).output();
    let listed = listed.expect("git starts");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).expect("text");
    let paths = listed.split_terminator('\0').map(|path| path.split('/').next().unwrap_or_default());
    let found: BTreeSet<&str> = paths.filter(|name| !name.starts_with('.')).collect();
    assert_eq!(found, BTreeSet::from(TOP_LEVEL), "what is new goes into the folder of its part");
}

#[test]
fn every_file_opens_with_what_it_is() {
    let sources = sources();
    assert!(sources.len() > 100, "only {} files were found", sources.len());
    for path in sources {
        let text = fs::read_to_string(&path).expect("a source file can be read");
        assert!(text.starts_with("//!"), "{} does not open with //!", path.display());
    }
}

#[test]
fn no_file_is_too_long_to_be_read_at_a_sitting() {
    for path in sources() {
        let lines = fs::read_to_string(&path).expect("a source file can be read").lines().count();
        let most = if is_test(&path) { TEST_LINES } else { LINES };
        assert!(lines <= most, "{} has {lines} lines, more than {most}", path.display());
    }
}

#[test]
fn dependencies_point_one_way() {
    let may_use: BTreeMap<&str, &[&str]> = MAY_USE.into_iter().collect();
    for (crate_folder, allowed) in may_use {
        let manifest = fs::read_to_string(root().join(crate_folder).join("Cargo.toml")).expect("a manifest");
        // What tests use beside it is their own affair.
        let own = manifest.split("[dev-dependencies]").next().unwrap_or_default();
        let used = own
            .lines()
            .filter(|line| line.starts_with("baton-"))
            .filter_map(|line| line.split(['.', ' ', '=']).next());
        for name in used {
            assert!(allowed.contains(&name), "{crate_folder} uses {name}");
        }
    }
}

/// What every event of the JSON log has: a field of such a name would stand there twice, and one of the two be lost.
const OF_EVERY_EVENT: [&str; 4] = ["level", "message", "target", "timestamp"];

#[test]
fn no_field_of_an_event_has_the_name_of_what_every_event_has() {
    const MACROS: [&str; 5] = ["trace!(", "debug!(", "info!(", "warn!(", "error!("];
    let mut events = 0;
    for path in sources() {
        let text = fs::read_to_string(&path).expect("a source");
        for event in text.split("tracing::").skip(1) {
            let Some(rest) = MACROS.iter().find_map(|name| event.strip_prefix(name)) else { continue };
            events += 1;
            for field in rest.split(");").next().unwrap_or_default().split(',') {
                let name = field.split('=').next().unwrap_or_default().trim().trim_start_matches(['%', '?']);
                assert!(!OF_EVERY_EVENT.contains(&name), "{}: {name}, in {rest:.80}", path.display());
            }
        }
    }
    assert!(events > 100, "only {events} events were found");
}
