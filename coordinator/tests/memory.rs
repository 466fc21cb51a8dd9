//! The program's heap is the one that it was measured with.

use std::process::Command;

/// As jemalloc itself tells what it was set to.
#[test]
fn memory_comes_from_jemalloc_in_huge_pages() {
    let mut coordinator = Command::new(env!("CARGO_BIN_EXE_baton-coordinator"));
    coordinator.arg("--version").env("_RJEM_MALLOC_CONF", "stats_print:true");
    let said = String::from_utf8(coordinator.output().expect("runs").stderr).expect("is text");
    let options = r#"malloc_conf: "thp:always,metadata_thp:always,dirty_decay_ms:60000""#;
    for set in [options, "opt.dirty_decay_ms: 60000", "Hugepage size: 2097152"] {
        assert!(said.contains(set), "{set} is not among what it says:\n{said}");
    }
}
