//! The alert rules: promtool sees each raised and cleared. That their metrics exist is tested beside these (`metrics.rs`).

use std::{fs, process::Command};

use baton_integration_tests::{folder, required};

const ALERTS: &str = "../deploy/alerts";

#[test]
fn every_alert_is_raised_and_clears() {
    let promtool = required("BATON_TEST_PROMTOOL");
    let mut tests = Command::new(&promtool);
    tests.args(["test", "rules", "baton.tests.yaml"]).current_dir(folder().join(ALERTS));
    let output = tests.output().unwrap_or_else(|error| panic!("{promtool}: {error}"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = |file| fs::read_to_string(folder().join(ALERTS).join(file)).expect("a file");
    let (rules, tests) = (text("baton.rules.yaml"), text("baton.tests.yaml"));
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let tested = tests.matches(&format!("alertname: {alert}\n")).count();
        let cleared = tests.matches(&format!("alertname: {alert}}}\n")).count();
        assert!(tested > 0 && cleared > 0, "{alert} is not seen both raised and cleared");
    }
}
