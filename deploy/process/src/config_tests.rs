//! Precedence and errors of configuration loading.

use std::io::Write;

use serde::Deserialize;

use super::*;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Root {
    listen: ListenSection,
    peers: Vec<String>,
    threads: Option<u16>,
    name: Option<String>,
    models: Vec<Model>,
    engine: Engine,
    process: crate::ProcessConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListenSection {
    http: String,
    backlog: u32,
}

impl Default for ListenSection {
    fn default() -> Self {
        Self { http: "127.0.0.1:8000".to_owned(), backlog: 128 }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Model {
    path: String,
    names: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Engine {
    ratio: f64,
    fast: bool,
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn vars(pairs: &[(&str, &str)]) -> Vec<Layer> {
    environment("test", pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
}

fn flags(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn message(file: Option<&Path>, env: &[(&str, &str)], flag: &[(&str, &str)]) -> String {
    load_from::<Root>(file, &vars(env), &flags(flag)).unwrap_err().to_string()
}

#[test]
fn each_layer_wins_over_the_one_before() {
    let file = file("peers = ['f']\n[listen]\nhttp = 'file:1'\nbacklog = 1\n[engine]\nratio = 0.5\n");
    let env = vars(&[
        ("BATON_TEST__LISTEN__BACKLOG", "2"),
        ("BATON_TEST__ENGINE__FAST", "true"),
        ("BATON_OTHER__X", "1"),
    ]);
    let root: Root =
        load_from(Some(file.path()), &env, &flags(&[("engine.ratio", "0.75"), ("listen.backlog", "3")]))
            .unwrap();
    let expected = Root {
        listen: ListenSection { http: "file:1".to_owned(), backlog: 3 },
        peers: vec!["f".to_owned()],
        engine: Engine { ratio: 0.75, fast: true },
        ..Root::default()
    };
    assert_eq!(root, expected);
    let root: Root = load_from(Some(file.path()), &env, &[]).unwrap();
    assert_eq!((root.listen.backlog, root.engine.ratio), (2, 0.5));
    assert_eq!(load_from::<Root>(None, &[], &[]).unwrap(), Root::default());
}

#[test]
fn lists_and_options_can_be_set_from_text() {
    let root: Root =
        load_from(None, &vars(&[("BATON_TEST__PEERS", "a:1, b:2")]), &flags(&[("threads", "4")])).unwrap();
    assert_eq!((root.peers, root.threads), (vec!["a:1".to_owned(), "b:2".to_owned()], Some(4)));
    let root: Root =
        load_from(None, &[], &flags(&[("peers", "['x,y']"), ("process.shutdown.drain", "250ms")])).unwrap();
    assert_eq!(root.peers, ["x,y"]);
    assert_eq!(root.process.shutdown.drain, Some(std::time::Duration::from_millis(250)));
    let root: Root = load_from(None, &[], &flags(&[("name", "123"), ("threads", "5")])).unwrap();
    assert_eq!((root.name.as_deref(), root.threads), (Some("123"), Some(5)));
}

#[test]
fn an_address_of_ipv6_is_no_list() {
    let env =
        vars(&[("BATON_TEST__LISTEN__HTTP", "[::]:80"), ("BATON_TEST__PEERS", "[fd00::1]:1, [fd00::2]:2")]);
    let root: Root = load_from(None, &env, &flags(&[("name", "[::1]:3")])).unwrap();
    assert_eq!((root.listen.http.as_str(), root.name.as_deref()), ("[::]:80", Some("[::1]:3")));
    assert_eq!(root.peers, ["[fd00::1]:1", "[fd00::2]:2"]);
    let root: Root = load_from(None, &[], &flags(&[("peers", "['[fd00::1]:1']")])).unwrap();
    assert_eq!(root.peers, ["[fd00::1]:1"]);
    let text = message(None, &[], &[("peers", "[fd00::1]")]);
    assert_eq!(text, "command line (peers): `peers`: `[fd00::1]` is not a TOML list or table");
}

#[test]
fn lists_of_tables_can_be_set_from_files_and_text() {
    let file = file("[[models]]\npath = 'a'\n[[models]]\npath = 'b'\nnames = ['x', 'y']\n");
    let model = |path: &str, names: &[&str]| Model {
        path: path.to_owned(),
        names: names.iter().map(|&name| name.to_owned()).collect(),
    };
    let root: Root = load_from(Some(file.path()), &[], &[]).unwrap();
    assert_eq!(root.models, [model("a", &[]), model("b", &["x", "y"])]);
    let root: Root =
        load_from(Some(file.path()), &[], &flags(&[("models", r#"[{path = "c \"d\""}]"#)])).unwrap();
    assert_eq!(root.models, [model("c \"d\"", &[])], "a list is replaced whole");
    let root: Root =
        load_from(None, &vars(&[("BATON_TEST__MODELS", "[{path = 'e', names = ['z']}]")]), &[]).unwrap();
    assert_eq!(root.models, [model("e", &["z"])]);
    assert_eq!(
        message(None, &[], &[("models", "[{path = 'a'}, {pth = 'b'}]")]),
        "command line (models): unknown key `models[1].pth`; did you mean `models[1].path`?"
    );
}

#[test]
fn an_unknown_key_names_its_place_and_the_nearest_known_key() {
    let file = file("[listen]\nhtpp = 'x'\n");
    let place = format!("config file {}", file.path().display());
    assert_eq!(
        message(Some(file.path()), &[], &[]),
        format!("{place}: unknown key `listen.htpp`; did you mean `listen.http`?")
    );
    assert_eq!(
        message(None, &[("BATON_TEST__ENGINE__RATO", "1")], &[]),
        "environment variable BATON_TEST__ENGINE__RATO: unknown key `engine.rato`; did you mean `engine.ratio`?"
    );
    assert_eq!(
        message(None, &[], &[("process.log.fromat", "json")]),
        "command line (process.log.fromat): unknown key `process.log.fromat`; did you mean `process.log.format`?"
    );
}

#[test]
fn a_wrong_type_names_the_key_and_what_was_expected() {
    let file = file("[listen]\nbacklog = 'many'\n");
    let text = message(Some(file.path()), &[], &[]);
    assert!(
        text.contains("`listen.backlog`: invalid type")
            && text.contains("many")
            && text.contains("expected u32"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1);
    let text = message(None, &[("BATON_TEST__THREADS", "70000")], &[]);
    assert!(text.starts_with("environment variable BATON_TEST__THREADS: `threads`: "), "{text}");
    let text = message(None, &[], &[("process.shutdown.drain", "soon")]);
    assert!(text.contains("`process.shutdown.drain`: `soon` is not a duration"), "{text}");
    let text = message(None, &[], &[("process.log.format", "xml")]);
    assert!(text.contains("`process.log.format`") && text.contains("json"), "{text}");
}

#[test]
fn a_file_that_is_missing_or_not_toml_is_told_with_its_line() {
    let text = message(Some(Path::new("/nonexistent/baton.toml")), &[], &[]);
    assert!(text.starts_with("config file /nonexistent/baton.toml: cannot be read"), "{text}");
    let file = file("peers = ['a']\n[listen\n");
    let text = message(Some(file.path()), &[], &[]);
    assert!(text.contains(", line 2: "), "{text}");
    assert_eq!(text.lines().count(), 1);
}

#[test]
fn what_is_printed_loads_again() {
    let root: Root =
        load_from(None, &[], &flags(&[("peers", "a,b"), ("threads", "3"), ("engine.ratio", "0.5")])).unwrap();
    let printed = file(&render(&root).unwrap());
    assert_eq!(load_from::<Root>(Some(printed.path()), &[], &[]).unwrap(), root);
}

#[test]
fn set_arguments_need_a_key_and_an_equals_sign() {
    assert_eq!(parse_set(&["a.b=c=d".to_owned()]).unwrap(), flags(&[("a.b", "c=d")]));
    assert!(parse_set(&["a.b".to_owned()]).unwrap_err().to_string().contains("expected KEY=VALUE"));
    assert!(parse_set(&["=x".to_owned()]).is_err());
}

#[test]
fn a_key_for_what_is_not_served_is_told_why_there_is_none() {
    let all = [crate::Unserved { keys: &["worldsize"], tables: &["", "engine"], why: "it is one" }];
    let said = |key: &str| {
        let error = load_from::<Root>(None, &[], &flags(&[(key, "8")])).expect_err("unknown");
        error.of_unserved(&all).to_string()
    };
    for key in ["world_size", "engine.worldSize", "engine.world-size"] {
        assert_eq!(said(key), format!("command line ({key}): there is no key `{key}`: it is one"));
    }
    assert!(said("engine.world").contains("unknown key"));
    assert!(said("listen.world_size").contains("unknown key"), "of something else");
}
