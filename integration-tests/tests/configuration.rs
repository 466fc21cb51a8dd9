//! The pages of `deploy/configuration` are what the services print, tell every key, and what they say is so: examples are
//! taken, and ranges are those that are refused beyond.

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use baton_controller::ControllerConfig;
use baton_coordinator::CoordinatorConfig;
use baton_integration_tests::{binary, folder};
use baton_process::{ServiceConfig, config, duration, reference};
use baton_server::config::ServerConfig;
use serde_json::Value as Json;

/// What each needs to be told in any case.
const CONTROLLER: &[(&str, &str)] = &[];
const COORDINATOR: &[(&str, &str)] = &[("store.controller", "127.0.0.1:1"), ("models", "[{path = 'm'}]")];
const SERVER: &[(&str, &str)] = &[("model.path", "m"), ("controllers", "127.0.0.1:1")];

/// Rows of the tables of a page: default and meaning, by key.
fn rows(page: &str) -> BTreeMap<String, (String, String)> {
    let rows = page.lines().filter(|line| line.starts_with("| `")).map(|row| {
        let cells: Vec<_> = row.trim_matches('|').splitn(3, " | ").map(str::trim).collect();
        let [key, default, meaning] = cells[..] else { panic!("a row without its cells: {row}") };
        (key.trim_matches('`').to_owned(), (default.trim_matches('`').to_owned(), meaning.to_owned()))
    });
    rows.collect()
}

fn said(service: &str, arguments: &[&str]) -> String {
    let mut program = Command::new(binary(&format!("baton-{service}")));
    let output = program.args(arguments).output().expect("it starts");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "baton-{service} {arguments:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn pages_are_what_the_services_print() {
    for service in ["controller", "coordinator", "server"] {
        let path = format!("deploy/configuration/{service}.md");
        let page = fs::read_to_string(folder().join("..").join(&path)).unwrap_or_default();
        let again = format!("target/debug/baton-{service} --config-reference > {path}");
        assert!(
            page == said(service, &["--config-reference"]),
            "{path} is not what baton-{service} prints; write it anew: {again} (all of them: deploy/run docs)"
        );
    }
}

fn check_page<T: ServiceConfig>(service: &str) {
    let page = reference::page::<T>(service).expect("a page");
    let mut rows = rows(&page);
    for (key, (_, meaning)) in &rows {
        assert!(!meaning.is_empty(), "{service}: {key} has no doc comment");
    }
    for (key, default) in reference::keys::<T>().expect("keys") {
        let told = rows.remove(&key).map(|(default, _)| default);
        assert_eq!(told, Some(default), "{service}: {key}");
    }
    // Left are entries of lists and maps, of which no default holds any.
    let unknown: Vec<_> = rows.keys().filter(|key| !key.contains("[].") && !key.contains(".NAME.")).collect();
    assert!(unknown.is_empty(), "{service} has no {unknown:?}");
    for section in page.split("\n## `").skip(1) {
        let (name, section) = section.split_once('\n').expect("a heading has something below it");
        let about = section.trim_start().lines().next().unwrap_or_default();
        let is_told = !about.is_empty() && !about.starts_with(['|', '#']);
        assert!(is_told, "{service}: the type of {name} has no doc comment");
    }
    // What only rustdoc can follow.
    assert!(!page.contains("[`") && !page.contains("crate::"), "{service}: a link into the code");
}

#[test]
fn every_key_has_its_default_and_meaning() {
    check_page::<ControllerConfig>("controller");
    check_page::<CoordinatorConfig>("coordinator");
    check_page::<ServerConfig>("server");
}

fn check_schema<T: ServiceConfig>(service: &str) {
    let schema: Json = serde_json::from_str(&said(service, &["--config-schema"])).expect("JSON");
    for (key, default) in reference::keys::<T>().expect("keys") {
        let field = key.split('.').fold(&schema, |table, part| {
            assert_eq!(table["additionalProperties"], false, "{service}: unknown keys beside {key}");
            &table["properties"][part]
        });
        assert_eq!(field["default"].to_string(), default, "{service}: {key}");
        assert!(field["description"].is_string(), "{service}: {key} has no description");
    }
}

#[test]
fn schemas_have_every_key_with_its_default() {
    check_schema::<ControllerConfig>("controller");
    check_schema::<CoordinatorConfig>("coordinator");
    check_schema::<ServerConfig>("server");
}

#[test]
fn examples_are_taken_as_they_stand() {
    let folder = tempfile::tempdir().expect("a folder");
    for service in ["controller", "coordinator", "server"] {
        let page = said(service, &["--config-reference"]);
        let (_, example) = page.split_once("```toml\n").expect("an example");
        let (example, _) = example.split_once("```").expect("the end of the example");
        let path = folder.path().join("example.toml");
        fs::write(&path, example).expect("a file");
        let effect = said(service, &["--config", path.to_str().expect("text"), "--check-config"]);
        for line in example.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase())) {
            let value = line.split_once(" = ").expect("a key and its value").1;
            let value = value.trim_matches(['[', ']']).split(", ").next().expect("one at least");
            assert!(effect.contains(value), "baton-{service}: {line} is not in effect");
        }
    }
}

/// A number, or milliseconds.
#[derive(Debug, Clone, Copy)]
enum Amount {
    Number(f64),
    Time(u64),
}

impl Amount {
    fn of(text: &str) -> Option<Self> {
        let text = text.trim_matches(['`', '"', '.', ',', ';', '(', ')']);
        let millis = |time: Duration| Self::Time(time.as_millis() as u64);
        text.parse().map(Self::Number).ok().or_else(|| duration::parse(text).map(millis).ok())
    }

    fn text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Time(millis) => format!("{millis}ms"),
        }
    }

    /// By as little as counts of a key that has this default.
    fn moved(self, up: bool, default: &str) -> Self {
        let least = if default.contains('.') { 0.001 } else { 1.0 };
        match self {
            Self::Number(number) => Self::Number(if up { number + least } else { number - least }),
            Self::Time(millis) => Self::Time(if up { millis + 1 } else { millis - 1 }),
        }
    }
}

/// What a meaning says may be set and what may not. Which is which at the bounds is in the words.
fn bounds(meaning: &str, default: &str) -> (Vec<Amount>, Vec<Amount>) {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    let words: Vec<_> = meaning.split_whitespace().map(str::to_lowercase).collect();
    for three in words.windows(3) {
        let (first, last) = (Amount::of(&three[0]), Amount::of(&three[2]));
        match (three[0].as_str(), three[1].as_str(), first, last) {
            ("at", "least", _, Some(least)) => {
                good.push(least);
                bad.push(least.moved(false, default));
            }
            ("at", "most", _, Some(most)) => {
                good.push(most);
                bad.push(most.moved(true, default));
            }
            ("more" | "less", "than", _, Some(bound)) => {
                good.push(bound.moved(three[0] == "more", default));
                bad.push(bound);
            }
            (_, "to", Some(least), Some(most)) => {
                good.extend([least, most]);
                bad.push(most.moved(true, default));
                if !matches!(least, Amount::Number(0.0) | Amount::Time(0)) {
                    bad.push(least.moved(false, default));
                }
            }
            _ => {}
        }
    }
    (good, bad)
}

/// Whether a value is refused, and as one of this key. What its type cannot be is refused, too.
fn is_refused<T: ServiceConfig>(service: &str, needed: &[(&str, &str)], key: &str, value: &str) -> bool {
    let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let settings: Vec<_> = needed.iter().chain(&[(key, value)]).map(own).collect();
    match config::load::<T>(service, None, &settings) {
        Ok(config) => {
            let checked = config.process().validate().and_then(|()| config.validate());
            checked.is_err_and(|refused| refused.key == key)
        }
        Err(_) => true,
    }
}

/// How many bounds were tried.
fn check_ranges<T: ServiceConfig>(service: &str, needed: &[(&str, &str)]) -> usize {
    let page = reference::page::<T>(service).expect("a page");
    let is_refused = |key: &str, value: &str| is_refused::<T>(service, needed, key, value);
    let mut tried = 0;
    for (key, (default, meaning)) in rows(&page) {
        let amount = Amount::of(&default);
        let (Some(amount), false) = (amount, key.contains("[].") || key.contains(".NAME.")) else { continue };
        let (good, bad) = bounds(&meaning, &default);
        for value in good.iter().map(|amount| amount.text()) {
            assert!(!is_refused(&key, &value), "{service}: {key} = {value} is refused: {meaning}");
        }
        for value in bad.iter().map(|amount| amount.text()) {
            assert!(is_refused(&key, &value), "{service}: {key} = {value} is taken: {meaning}");
        }
        tried += good.len() + bad.len();
        // And where something is refused that the type can be, something is said of it.
        let says = |words: &[&str]| words.iter().any(|word| meaning.to_lowercase().contains(word));
        let (zero, huge) = match amount {
            Amount::Number(_) => ("0", "4000000000"),
            Amount::Time(_) => ("0s", "1000000h"),
        };
        let is_silent = !says(&["at least ", "more than ", " to "]);
        assert!(!(is_silent && is_refused(&key, zero)), "{service}: {key} = {zero} is refused: {meaning}");
        let is_silent = !says(&["at most ", "less than ", " to "]);
        assert!(!(is_silent && is_refused(&key, huge)), "{service}: {key} = {huge} is refused: {meaning}");
    }
    tried
}

#[test]
fn ranges_are_those_that_are_refused_beyond() {
    let tried = check_ranges::<ControllerConfig>("controller", CONTROLLER)
        + check_ranges::<CoordinatorConfig>("coordinator", COORDINATOR)
        + check_ranges::<ServerConfig>("server", SERVER);
    assert!(tried > 80, "{tried}");
}
