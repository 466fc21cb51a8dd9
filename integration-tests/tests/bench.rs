//! `baton bench` measures what is there: an endpoint under load, and one instance's engine.

use std::process::{Command, Output};

use baton_integration_tests::{binary, model};
use serde_json::Value;

fn bench(arguments: &[&str]) -> (Output, Value) {
    let directory = tempfile::tempdir().expect("a directory");
    let json = directory.path().join("figures.json");
    let output = Command::new(binary("baton"))
        .arg("bench")
        .args(arguments)
        .arg("--json")
        .arg(&json)
        .output()
        .expect("baton starts");
    let figures =
        std::fs::read(&json).map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).expect("JSON"));
    (output, figures)
}

#[test]
fn the_engine_is_measured_through_a_server() {
    let model = model().display().to_string();
    let short = ["--rounds", "1", "--prompt-tokens", "64", "--decode-tokens", "8", "--batch", "3"];
    let (output, figures) = bench(&[&["engine", "--model", &model], &short[..]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("prefill 64") && table.contains("decode, batch 3"), "{table}");
    let rows = figures["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    for row in rows {
        for figure in ["prefill", "decode"] {
            let rate = row["baton"][0][figure].as_f64().expect("a figure");
            assert!(rate > 0.0 && rate.is_finite(), "{figure} {rate}");
        }
    }
}

#[test]
fn a_handoff_is_measured_between_two_servers() {
    let model = model().display().to_string();
    let short = ["--rounds", "1", "--prompt-tokens", "64", "--transports", "tcp,shm"];
    let (output, figures) = bench(&[&["handoff", "--model", &model], &short[..]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("tcp, 64 tokens") && table.contains("shm, 64 tokens"), "{table}");
    let rows = figures["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    for row in rows {
        for figure in ["first_token", "last_slice", "first_step"] {
            let millis = row["samples"][0][figure].as_f64().expect("a figure");
            assert!(millis > 0.0 && millis < 10_000.0, "{figure} {millis}");
        }
        let at = |figure| row["samples"][0][figure].as_f64().expect("a figure");
        assert!(at("first_token") < at("first_step") && at("last_slice") < at("first_step"), "{row}");
    }
}

#[test]
fn an_engine_that_cannot_start_is_told_in_one_line() {
    let model = model().display().to_string();
    let arguments = ["engine", "--model", &model, "--set", "runtime.kv_dtype=f7"];
    let (output, _) = bench(&arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("runtime.kv_dtype") && said.contains("f7"), "{said}");
    let (output, _) = bench(&["engine", "--model", "no-such-file.gguf"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("no-such-file.gguf"), "{said}");
}
