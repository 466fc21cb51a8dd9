//! The README says what is: every key it names, every folder of the map, every test it names; and every link of all documents
//! leads somewhere.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use baton_integration_tests::folder;
use baton_process::reference::keys;

fn root() -> PathBuf {
    folder().join("..")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("the README is there")
}

/// Every page that git tracks, by its path from the root.
fn documents() -> Vec<String> {
    let listed = Command::new("git").arg("-C").arg(root()).args(["ls-files", "-z", "*.md"]).output();
    let listed = listed.expect("git starts");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let listed = String::from_utf8(listed.stdout).expect("text");
    let documents: Vec<_> = listed.split_terminator('\0').map(str::to_owned).collect();
    assert!(documents.len() > 10, "{documents:?}");
    documents
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
    // Pages of figures, too; elsewhere files are called like keys.
    let pages = documents().into_iter().filter(|it| it == "README.md" || it.contains("bench"));
    let pages = pages.map(|it| fs::read_to_string(root().join(it)).expect("a page"));
    let prose: String =
        pages.flat_map(|page| page.split("```").step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect();
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
    let mut followed = 0;
    for document in documents() {
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
    assert!(followed > 60, "{followed}");
}

#[test]
fn the_code_map_names_what_exists() {
    let readme = readme();
    let (_, map) = readme.split_once("\n## Code map\n").expect("a map");
    let map = map.split("\n## ").next().unwrap_or_default();
    let rows = map.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let (crates, others): (Vec<_>, Vec<_>) = rows.partition(|(_, rest)| rest.starts_with("baton"));
    assert!(crates.len() >= 10 && others.len() >= 5, "{crates:?}, {others:?}");
    for (path, _) in crates {
        assert!(root().join(path).join("Cargo.toml").exists(), "{path} is no crate");
    }
    for (path, _) in others {
        assert!(root().join(path).exists(), "there is no {path}");
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
