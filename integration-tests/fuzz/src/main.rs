//! The program of all fuzz targets: libFuzzer's main, and the target that `BATON_FUZZ_TARGET` names. One program, as what
//! takes long is to build it; libFuzzer looks only at what the target reaches.
#![no_main]

use std::{env, process, sync::OnceLock};

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("answers", baton_coordinator::fuzz::answers),
    ("bodies", baton_coordinator::fuzz::bodies),
    ("ctl", baton_standalone::fuzz::ctl),
    ("files", files),
    ("frames", baton_kvtransfer::fuzz::frames),
    ("http", baton_coordinator::fuzz::http),
    ("inference", baton_server::fuzz::inference),
    ("layouts", baton_kvtransfer::fuzz::layouts),
    ("models", baton_coordinator::fuzz::models),
    ("node", baton_kvtransfer::fuzz::node),
    ("records", baton_registry::fuzz::records),
    ("sessions", baton_controller::fuzz::sessions),
    ("text", baton_coordinator::fuzz::text),
    ("wire", baton_proto::fuzz::wire),
];

/// Each takes what the first byte says is its own.
fn files(bytes: &[u8]) {
    baton_process::fuzz::files(bytes);
    baton_coordinator::fuzz::key_files(bytes);
    baton_controller::fuzz::ranktables(bytes);
}

static TARGET: OnceLock<Target> = OnceLock::new();

fn chosen() -> Target {
    let name = env::var("BATON_FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(target, _)| *target == name);
    found.map_or_else(
        || {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            eprintln!("error: BATON_FUZZ_TARGET is {name:?}, none of {}", names.join(", "));
            process::exit(2);
        },
        |(_, target)| *target,
    )
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET.get_or_init(chosen)(bytes));
