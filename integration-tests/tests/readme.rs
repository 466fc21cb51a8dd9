//! The README says what is: every key it names, every folder of the map, every test it names, every link of the documents.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use baton_integration_tests::folder;
use baton_process::reference::keys;

fn root() -> PathBuf {
    folder().join("..")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("the README is there")
}

/// Keys of all services, and tables that hold them.
fn known_keys() -> BTreeSet<String> {
    let keys = [
        keys::<baton_controller::ControllerConfig>(),
        keys::<baton_coordinator::CoordinatorConfig>(),
        keys::<baton_server::config::ServerConfig>(),
    ];
    let mut known = BTreeSet::new();
    for (key, _) in keys.into_iter().flat_map(|keys| keys.expect("keys")) {
        let dots = key.match_indices('.').map(|(dot, _)| key[..dot].to_owned());
        known.extend(dots.chain([key.clone()]));
    }
    known
}

#[test]
fn the_configuration_keys_that_it_names_exist() {
    let (readme, known) = (readme(), known_keys());
    let prose: String = readme.split("```").step_by(2).collect();
    let is_key = |word: &&str| {
        let table = word.split_once('.').map(|(table, _)| table);
        table.is_some_and(|table| known.contains(table))
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '.')
            && !word.ends_with(".rs")
    };
    let named: BTreeSet<_> = prose.split('`').skip(1).step_by(2).filter(is_key).collect();
    assert!(named.len() > 40, "{named:?}");
    let (_, first) =
        readme.split_once("\n| keys | of | what for |\n").expect("the table of keys to set first");
    let first = first.lines().skip(1).take_while(|line| line.starts_with("| `"));
    let first: Vec<_> = first
        .flat_map(|row| row.split(" | ").next().unwrap_or_default().split('`').skip(1).step_by(2))
        .collect();
    assert!(first.len() > 20, "{first:?}");
    let unknown: Vec<_> = named.into_iter().chain(first).filter(|key| !known.contains(*key)).collect();
    assert!(unknown.is_empty(), "no keys of a service: {unknown:?}");
}

/// What forges make of a heading, to lead to it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn anchors(document: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
    let prose: String = text.split("```").step_by(2).collect();
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim_start())).collect()
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let pages = ["controller", "coordinator", "server"].map(|it| format!("deploy/configuration/{it}.md"));
    let others = ["README.md", "deploy/kubernetes/README.md", "deploy/alerts/RUNBOOK.md"].map(str::to_owned);
    let mut followed = 0;
    for document in others.into_iter().chain(pages) {
        let path = root().join(&document);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{document}: {error}"));
        assert!(text.starts_with("# "), "{document} does not open with its title");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            assert!(target.exists(), "{document}: there is no {link}");
            let leads = heading.is_empty() || anchors(&target).contains(heading);
            assert!(leads, "{document}: {link} leads to no heading");
            followed += 1;
        }
    }
    assert!(followed > 30, "{followed}");
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
