//! The alert rules: promtool sees each raised and cleared, and the runbook has a section of each, whose commands and keys
//! there are. That there are their metrics is seen by `prometheus.rs`.

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
};

use baton_integration_tests::{binary, folder, process::free_address, required};
use baton_process::reference::keys;
use baton_proto::{ErrorCode, v1};

const ALERTS: &str = "../deploy/alerts";

/// What every section of the runbook says, in this order.
const PARTS: [&str; 5] = ["Means", "Users see", "Look", "Do", "Over"];

fn text(file: &str) -> String {
    fs::read_to_string(folder().join(ALERTS).join(file)).expect("a file")
}

/// Names of the alerts in the order of the rules.
fn alerts(rules: &str) -> Vec<&str> {
    rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect()
}

#[test]
fn every_alert_is_raised_and_clears() {
    let promtool = required("BATON_TEST_PROMTOOL");
    let mut tests = Command::new(&promtool);
    tests.args(["test", "rules", "baton.tests.yaml"]).current_dir(folder().join(ALERTS));
    let output = tests.output().unwrap_or_else(|error| panic!("{promtool}: {error}"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let (rules, tests) = (text("baton.rules.yaml"), text("baton.tests.yaml"));
    for alert in alerts(&rules) {
        let tested = tests.matches(&format!("alertname: {alert}\n")).count();
        let cleared = tests.matches(&format!("alertname: {alert}}}\n")).count();
        assert!(tested > 0 && cleared > 0, "{alert} is not seen both raised and cleared");
    }
}

#[test]
fn every_alert_says_who_has_to_look_and_has_its_section_in_the_runbook() {
    let (rules, runbook) = (text("baton.rules.yaml"), text("RUNBOOK.md"));
    let mut sections = runbook.split("\n## ").skip(1).map(|section| section.split_once('\n').expect("lines"));
    for rule in rules.split("- alert: ").skip(1) {
        let alert = rule.lines().next().expect("a name");
        let severity = ["page", "ticket", "info"].map(|severity| format!("labels: {{severity: {severity}}}"));
        assert!(severity.iter().any(|severity| rule.contains(severity)), "nobody is told of {alert}");
        let link = format!("runbook: RUNBOOK.md#{}\n", alert.to_lowercase());
        assert!(rule.contains(&link), "{alert} leads to no section");
        let (title, section) = sections.next().unwrap_or_else(|| panic!("{alert} has no section"));
        assert_eq!(title, alert, "sections are in the order of the rules");
        let parts: Vec<_> =
            section.lines().filter_map(|line| line.strip_prefix("**")?.split(".**").next()).collect();
        assert_eq!(parts, PARTS, "{alert}");
    }
    assert_eq!(sections.next(), None, "a section without an alert");
    let known: BTreeSet<_> = alerts(&rules).iter().map(|alert| alert.to_lowercase()).collect();
    for link in runbook.split("](#").skip(1) {
        let link = link.split(')').next().unwrap_or_default();
        assert!(known.contains(link), "#{link} leads nowhere");
    }
}

#[test]
fn requests_that_fail_are_those_whose_error_is_not_the_clients() {
    let codes = (0..256).filter_map(|wire| v1::ErrorCode::try_from(wire).ok()).map(ErrorCode::from_wire);
    let ours: BTreeSet<_> = codes.filter(|code| code.http() >= 500).map(ErrorCode::name).collect();
    for asking in [text("baton.rules.yaml"), text("../dashboards/requests.json")] {
        let mut failing = asking.split("code=~").skip(1).peekable();
        assert!(failing.peek().is_some(), "nobody looks at failing requests");
        for asked in failing {
            let asked: BTreeSet<_> = asked
                .split('"')
                .nth(1)
                .expect("a regular expression")
                .trim_end_matches('\\')
                .split('|')
                .collect();
            assert_eq!(asked, ours);
        }
    }
}

/// Everything in backticks and in blocks of shell commands.
fn code(runbook: &str) -> Vec<String> {
    let (mut code, mut prose) = (Vec::new(), String::new());
    for (number, part) in runbook.split("```").enumerate() {
        match part.strip_prefix("sh\n") {
            Some(commands) => code.extend(commands.lines().map(str::to_owned)),
            None if number % 2 == 0 => prose += part,
            None => {}
        }
    }
    code.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
    code
}

#[test]
fn every_command_of_the_runbook_can_be_given() {
    let nobody = free_address();
    let code = code(&text("RUNBOOK.md"));
    let commands: BTreeSet<_> = code.iter().filter_map(|code| code.strip_prefix("baton ctl ")).collect();
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        let mut ctl = Command::new(binary("baton"));
        ctl.arg("ctl").args(command.split(' ')).args(["--controller", &nobody]).stdin(Stdio::null());
        let output = ctl.output().expect("baton starts");
        let said = String::from_utf8_lossy(&output.stderr);
        // 2 would be for a command line that is wrong.
        assert_eq!(output.status.code(), Some(1), "`baton ctl {command}`: {said}");
        assert!(said.contains("does not answer"), "`baton ctl {command}`: {said}");
    }
}

#[test]
fn every_file_that_the_runbook_names_is_there() {
    let code = code(&text("RUNBOOK.md"));
    let files: BTreeSet<_> = code.iter().filter(|code| code.starts_with("deploy/")).collect();
    assert!(!files.is_empty());
    for file in files {
        let path = file.split(' ').next().unwrap_or_default();
        assert!(folder().join("..").join(path).exists(), "{file}");
    }
}

#[test]
fn every_key_that_the_runbook_names_is_one() {
    let known = [
        keys::<baton_controller::ControllerConfig>(),
        keys::<baton_coordinator::CoordinatorConfig>(),
        keys::<baton_server::config::ServerConfig>(),
    ];
    let keys: BTreeSet<_> =
        known.into_iter().flat_map(|keys| keys.expect("keys")).map(|(key, _)| key).collect();
    let runbook = text("RUNBOOK.md");
    let is_key = |code: &&String| {
        let mut parts = code.split('.');
        let word = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        code.contains('.') && !code.ends_with(".yaml") && parts.all(word)
    };
    let named = code(&runbook);
    let named: Vec<_> = named.iter().filter(is_key).collect();
    assert!(named.len() > 10, "{named:?}");
    let unknown: Vec<_> = named.iter().filter(|key| !keys.contains(**key)).collect();
    assert!(unknown.is_empty(), "no keys of a service: {unknown:?}");
}
