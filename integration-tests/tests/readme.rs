//! The README says what is: every configuration key with its default, every folder of the map, every test it names.

use std::{collections::BTreeMap, fs};

use baton_integration_tests::folder;
use baton_process::config::reference;

fn readme() -> String {
    fs::read_to_string(folder().join("../README.md")).expect("the README is there")
}

/// Keys and defaults of the table that follows a heading.
fn table(readme: &str, heading: &str) -> BTreeMap<String, String> {
    let (_, after) = readme.split_once(heading).unwrap_or_else(|| panic!("no {heading:?} in the README"));
    let rows =
        after.lines().skip_while(|line| !line.starts_with("| `")).take_while(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        assert!(cells.len() == 5 && !cells[3].is_empty(), "a row without a meaning: {row}");
        (cells[1].to_owned(), cells[2].to_owned())
    })
    .collect()
}

/// What the types say, less what every process has.
fn own(keys: Vec<(String, String)>) -> BTreeMap<String, String> {
    keys.into_iter().filter(|(key, _)| !key.starts_with("process.")).collect()
}

#[test]
fn the_configuration_reference_matches_the_types() {
    let readme = readme();
    let controller = reference::<baton_controller::ControllerConfig>().expect("a reference");
    let coordinator = reference::<baton_coordinator::CoordinatorConfig>().expect("a reference");
    let server = reference::<baton_server::config::ServerConfig>().expect("a reference");
    let process: BTreeMap<_, _> =
        controller.iter().filter(|(key, _)| key.starts_with("process.")).cloned().collect();
    assert_eq!(table(&readme, "### `process`, in every service"), process);
    assert_eq!(table(&readme, "### `baton-controller`"), own(controller));
    assert_eq!(table(&readme, "### `baton-coordinator`"), own(coordinator));
    assert_eq!(table(&readme, "### `baton-server`"), own(server));
}

#[test]
fn the_code_map_names_folders_that_exist() {
    let readme = readme();
    let folders: Vec<&str> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | baton"))
        .map(|(folder, _)| folder)
        .collect();
    assert!(folders.len() >= 10, "{folders:?}");
    for path in folders {
        assert!(folder().join("..").join(path).join("Cargo.toml").exists(), "{path} is no crate");
    }
}

/// Tests are named in the tables of failures: `file.rs`: `a_test`, `another`; of `kvtransfer/tests` unless it says which.
#[test]
fn the_tests_that_it_names_exist() {
    let readme = readme();
    let mut named = 0;
    for row in readme.lines().filter(|line| line.starts_with("| ")) {
        let mut file = None;
        for word in row.split('`').skip(1).step_by(2) {
            if word.ends_with(".rs") {
                let root = folder().join("..");
                let places = [
                    root.join(word),
                    root.join("kvtransfer").join(word),
                    root.join("kvtransfer/tests").join(word),
                    root.join("kvtransfer/tests/node").join(word),
                ];
                let found = places.iter().find_map(|path| fs::read_to_string(path).ok());
                file = Some((word, found.unwrap_or_else(|| panic!("{word} is no file, in {row}"))));
            } else if let Some((path, text)) = &file
                && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            {
                assert!(text.contains(&format!("fn {word}(")), "{path} has no test {word}");
                named += 1;
            }
        }
    }
    assert!(named > 30, "{named}");
}
