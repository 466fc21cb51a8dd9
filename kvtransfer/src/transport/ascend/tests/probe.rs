//! What is said of libraries that are there, missing, damaged or too old.

use std::{fs, os::unix::fs::symlink, path::Path};

use super::{ALL_NAMES, installed, peer::Peer, write_junk};
use crate::transport::ascend::{Search, probe};

fn found(folder: &Path) -> String {
    probe(&Search::only(folder)).to_string()
}

#[test]
fn a_missing_library_says_which_file_was_looked_for_where() {
    let empty = installed(&[]);
    let (text, folder) = (found(empty.path()), empty.path().display());
    let missing = format!(
        "unavailable: no libacl_rt.so or libascendcl.so; looked for it {folder}/libacl_rt.so (no such file), \
         {folder}/libascendcl.so (no such file)"
    );
    assert_eq!(text, format!("hixl {missing}; hccl {missing}"));

    let runtime = installed(&["libacl_rt.so"]);
    let (text, folder) = (found(runtime.path()), runtime.path().display());
    assert_eq!(
        text,
        format!(
            "hixl unavailable: no libcann_hixl.so; looked for it {folder}/libcann_hixl.so (no such file); \
             hccl unavailable: no libhcomm.so or libhccl.so; looked for it {folder}/libhcomm.so (no such file), \
             {folder}/libhccl.so (no such file)"
        )
    );
}

#[test]
fn older_names_are_found_and_newer_ones_come_first() {
    let older = installed(&["libascendcl.so", "libhccl.so"]);
    let (text, folder) = (found(older.path()), older.path().display());
    assert!(text.ends_with(&format!("hccl available ({folder}/libhccl.so)")), "{text}");
    assert!(text.starts_with("hixl unavailable: no libcann_hixl.so"), "{text}");

    let both = installed(&["libascendcl.so", "libhccl.so", "libacl_rt.so", "libcann_hixl.so", "libhcomm.so"]);
    let folder = both.path().display();
    let all = format!("hixl available ({folder}/libcann_hixl.so); hccl available ({folder}/libhcomm.so)");
    assert_eq!(found(both.path()), all);
}

#[test]
fn a_file_that_is_no_such_library_is_named_with_the_reason() {
    let damaged = installed(&["libacl_rt.so"]);
    write_junk(damaged.path(), "libcann_hixl.so");
    // A library, but not that one: the C library of this very process.
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    let libc = maps.split_whitespace().find(|word| word.ends_with("/libc.so.6")).expect("a C library");
    symlink(libc, damaged.path().join("libhcomm.so")).expect("a link");
    let text = found(damaged.path());
    assert!(
        text.contains("libcann_hixl.so: file too short") || text.contains("invalid ELF header"),
        "{text}"
    );
    assert!(text.contains("libhcomm.so has no function HcclGetRootInfo, so is too old or too new"), "{text}");
}

#[test]
fn the_loaders_path_and_the_toolkits_home_are_searched() {
    let report = |variables: &[(&str, &str)]| {
        let cleared = [("LD_LIBRARY_PATH", ""), ("ASCEND_HOME_PATH", "")];
        let variables: Vec<_> = cleared.iter().chain(variables).copied().collect();
        Peer::start_with("probe", &variables).hear("found")
    };
    let nothing = report(&[]);
    assert!(nothing.contains("on the loader's path (libacl_rt.so: cannot open shared object"), "{nothing}");
    assert!(nothing.contains("/usr/local/Ascend/cann/lib64/libascendcl.so"), "{nothing}");

    let home = installed(&[]);
    let lib64 = home.path().join("lib64");
    fs::create_dir(&lib64).expect("a folder");
    for name in ALL_NAMES {
        symlink(super::emulator_file(), lib64.join(name)).expect("a link");
    }
    let all = |folder: &str| {
        format!("hixl available ({folder}libcann_hixl.so); hccl available ({folder}libhcomm.so)")
    };
    let home_path = home.path().to_str().expect("text");
    assert_eq!(report(&[("ASCEND_HOME_PATH", home_path)]), all(&format!("{home_path}/lib64/")));
    assert_eq!(report(&[("LD_LIBRARY_PATH", lib64.to_str().expect("text"))]), all(""));
}
