//! A real Prometheus scrapes real processes: alerts are raised by what happens to them and clear once it is mended, and
//! whatever rules, dashboards, the runbook and the README ask for is there, under the labels that it is asked by.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    time::Duration,
};

use baton_integration_tests::{
    APART, binary, chat, eventually, folder, metrics, model,
    process::{Service, free_address},
    promql, required,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const MODEL: &str = "SmolLM2-135M-Instruct";
const PROMPT: &str = "Tell me a story.";
const KEY: &str = "sk-baton-alice";
const OLD_KEY: &str = "sk-baton-bob";

/// How names begin that these processes do not show: they scale nothing, are divided by a ratio, and speak no TLS. Rules and
/// dashboards are held to these by the tests beside them, `alerts_and_dashboards_ask_for_metrics_that_there_are`.
const NOT_SHOWN: [&str; 3] = ["baton_controller_scaling_", "baton_controller_instances_wanted", "baton_tls_"];

/// A controller, a coordinator and two servers, each at an address that it keeps when it is started again.
struct Fleet {
    dir: TempDir,
    controller: String,
    /// Where each is scraped.
    observed: BTreeMap<&'static str, String>,
    running: BTreeMap<&'static str, Service>,
}

impl Fleet {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let keys = keys(&[(KEY, ""), (OLD_KEY, "expires = 2020-01-01")]);
        fs::write(dir.path().join("keys.toml"), keys).expect("a file");
        let names = ["controller", "coordinator", "server-0", "server-1"];
        let observed = names.map(|name| (name, free_address())).into();
        let mut fleet = Self { dir, controller: free_address(), observed, running: BTreeMap::new() };
        names.iter().for_each(|name| fleet.run(name));
        eventually("a coordinator that is ready", || async {
            reqwest::get(fleet.url("/readiness")).await.ok()?.error_for_status().ok().map(drop)
        })
        .await;
        fleet
    }

    /// Starts a process, for the first time or again.
    fn run(&mut self, name: &'static str) {
        let (controller, at) = (&self.controller, &self.observed[name]);
        let (program, settings) = match name {
            "controller" => (
                "baton-controller",
                vec![
                    format!("listen={controller}"),
                    format!("metrics_listen={at}"),
                    "roles.settle=100ms".into(),
                ],
            ),
            "coordinator" => (
                "baton-coordinator",
                vec![
                    format!("store.controller={controller}"),
                    format!("listen={at}"),
                    "admin_listen=127.0.0.1:0".into(),
                    APART.into(),
                    format!("api_keys.file={}", self.dir.path().join("keys.toml").display()),
                ],
            ),
            _ => (
                "baton-server",
                vec![
                    format!("instance_id={name}"),
                    format!("controllers=[\"{controller}\"]"),
                    format!("metrics_listen={at}"),
                    "labels.supervisor=the-test".into(),
                    "runtime.threads=1".into(),
                ],
            ),
        };
        let mut command = Command::new(binary(program));
        for setting in &settings {
            command.args(["--set", setting]);
        }
        if name != "controller" {
            command.arg("--model").arg(model());
        }
        self.running.insert(name, Service::start(&mut command, &self.dir.path().join(format!("{name}.log"))));
    }

    /// Kills a process.
    fn kill(&mut self, name: &str) {
        self.running.remove(name).unwrap_or_else(|| panic!("{name} does not run"));
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.observed["coordinator"])
    }

    async fn ask(&self, key: &str, model: &str, prompt: &str, tokens: u32) -> reqwest::Response {
        let message = json!({"role": "user", "content": prompt});
        let body = json!({
            "model": model, "messages": [message], "stream": true,
            "temperature": 0, "max_tokens": tokens, "ignore_eos": true,
        });
        let request = reqwest::Client::new().post(self.url("/v1/chat/completions")).bearer_auth(key);
        request.json(&body).send().await.expect("the coordinator answers")
    }

    /// The server that shows a metric above 0, as soon as one does.
    async fn server_with(&self, metric: &str, label: &str) -> &'static str {
        eventually(&format!("a server with {metric} {label}"), || async {
            for name in ["server-0", "server-1"] {
                let shown = reqwest::get(format!("http://{}/metrics", self.observed[name])).await.ok()?;
                if metrics::sum(&shown.text().await.ok()?, metric, label).is_some_and(|sum| sum > 0.0) {
                    return Some(name);
                }
            }
            None
        })
        .await
    }
}

/// A file of API keys, each a tenant's own.
fn keys(keys: &[(&str, &str)]) -> String {
    let digest = |key: &str| Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let table = |(key, more): &(&str, &str)| {
        let name = key.trim_start_matches("sk-baton-");
        format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{}\"\n{more}\n", digest(key))
    };
    keys.iter().map(table).collect()
}

/// Prometheus with our rules, in a folder of its own.
struct Prometheus {
    url: String,
    _dir: TempDir,
    _process: Service,
}

impl Prometheus {
    /// It scrapes and decides twice a second, and rules wait for a second at most: the tests of the rules see how long they
    /// wait for, and how long nobody wants to wait here.
    async fn start(fleet: &Fleet) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let rules =
            fs::read_to_string(folder().join("../deploy/alerts/baton.rules.yaml")).expect("the rules");
        let waits = |line: &&str| line.trim().starts_with("for: ");
        let rules = rules.lines().map(|line| if waits(&line) { "        for: 1s" } else { line });
        fs::write(dir.path().join("rules.yaml"), rules.collect::<Vec<_>>().join("\n")).expect("a file");
        let job = |(name, at): (&&str, &String)| {
            let program = format!("baton-{}", name.split('-').next().unwrap_or_default());
            json!({"targets": [at], "labels": {"job": program}})
        };
        let targets: Vec<_> = fleet.observed.iter().map(job).collect();
        let config = json!({
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "baton", "static_configs": targets}],
        });
        // JSON is YAML.
        fs::write(dir.path().join("prometheus.yaml"), config.to_string()).expect("a file");
        let program = Path::new(&required("BATON_TEST_PROMTOOL")).with_file_name("prometheus");
        let at = free_address();
        let mut command = Command::new(program);
        command.arg(format!("--config.file={}", dir.path().join("prometheus.yaml").display()));
        command.arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()));
        command.arg(format!("--web.listen-address={at}"));
        let process = Service::start(&mut command, &dir.path().join("prometheus.log"));
        let prometheus = Self { url: format!("http://{at}/api/v1"), _dir: dir, _process: process };
        eventually("a Prometheus that scrapes all", || async {
            let up = prometheus.query("sum(up)").await?.ok()?;
            (up[0]["value"][1].as_str()?.parse() == Ok(fleet.observed.len())).then_some(())
        })
        .await;
        prometheus
    }

    async fn get(&self, path: &str) -> Option<Value> {
        let answer: Value = reqwest::get(format!("{}/{path}", self.url)).await.ok()?.json().await.ok()?;
        (answer["status"] == "success").then(|| answer["data"].clone())
    }

    /// The series of a result, or what is wrong with the expression; `None` while Prometheus does not answer.
    async fn query(&self, expression: &str) -> Option<Result<Value, String>> {
        let escaped = |byte: u8| format!("%{byte:02x}");
        let body = format!("query={}", expression.bytes().map(escaped).collect::<String>());
        let request = reqwest::Client::new().post(format!("{}/query", self.url)).body(body);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let answer: Value = request.send().await.ok()?.json().await.ok()?;
        Some(match answer["error"].as_str() {
            None => Ok(answer["data"]["result"].clone()),
            Some(error) => Err(error.to_owned()),
        })
    }

    /// Labels of those series of a metric that there are or were.
    async fn labels(&self, metric: &str) -> BTreeSet<String> {
        let series = self.get(&format!("series?match[]={metric}")).await.expect("series");
        let labels = |one: &Value| one.as_object().expect("labels").keys().cloned().collect::<Vec<_>>();
        series.as_array().expect("a list").iter().flat_map(labels).collect()
    }

    /// Whether an alert is raised that has all of these labels.
    async fn is_raised(&self, labels: &[(&str, &str)]) -> Option<bool> {
        let alerts = self.get("alerts").await?;
        let has = |alert: &Value| labels.iter().all(|(name, value)| alert["labels"][name] == *value);
        Some(alerts["alerts"].as_array()?.iter().any(|alert| alert["state"] == "firing" && has(alert)))
    }

    async fn raises(&self, labels: &[(&str, &str)]) {
        eventually(&format!("{labels:?} to be raised"), || async {
            self.is_raised(labels).await?.then_some(())
        })
        .await;
    }

    async fn clears(&self, labels: &[(&str, &str)]) {
        eventually(&format!("{labels:?} to clear"), || async {
            (!self.is_raised(labels).await?).then_some(())
        })
        .await;
    }
}

/// An expression, where it stands, and the labels that its results are shown with.
struct Asked {
    at: String,
    expression: String,
    shown: BTreeSet<String>,
}

impl Asked {
    fn new(at: impl Into<String>, expression: &str, legend: &str) -> Self {
        let shown = legend.split("{{").skip(1).filter_map(|part| Some(part.split_once("}}")?.0.to_owned()));
        Self { at: at.into(), expression: expression.to_owned(), shown: shown.collect() }
    }
}

/// Those of the dashboards, with their variables standing for all.
fn dashboards() -> Vec<Asked> {
    let mut asked = Vec::new();
    let files = fs::read_dir(folder().join("../deploy/dashboards")).expect("dashboards");
    for file in files.map(|file| file.expect("a file").path()) {
        let board: Value = serde_json::from_slice(&fs::read(&file).expect("a file")).expect("is JSON");
        let name = file.file_stem().expect("a name").to_string_lossy();
        let list = |value: &Value| value.as_array().expect("a list").clone();
        for panel in list(&board["panels"]).iter().filter(|panel| panel["type"] != "row") {
            for target in list(&panel["targets"]) {
                let at = format!("{name}, {}", panel["title"]);
                let legend = target["legendFormat"].as_str().unwrap_or_default();
                asked.push(Asked::new(at, target["expr"].as_str().expect("an expression"), legend));
            }
        }
        for note in list(&board["annotations"]["list"]) {
            asked.push(Asked::new(name.clone(), note["expr"].as_str().expect("an expression"), ""));
        }
        for variable in list(&board["templating"]["list"]) {
            let Some(query) = variable["query"]["query"].as_str() else { continue };
            let values = query.strip_prefix("label_values(").and_then(|query| query.strip_suffix(')'));
            let (of, label) = values.and_then(|values| values.rsplit_once(", ")).expect("values of a label");
            asked.push(Asked::new(name.clone(), of, &format!("{{{{{label}}}}}")));
        }
    }
    for one in &mut asked {
        one.expression = one.expression.replace("$__rate_interval", "10s");
        for variable in ["$model", "$group", "$role", "$instance"] {
            one.expression = one.expression.replace(variable, ".*");
        }
    }
    asked
}

/// Those of the runbook.
fn runbook() -> Vec<Asked> {
    let runbook = fs::read_to_string(folder().join("../deploy/alerts/RUNBOOK.md")).expect("the runbook");
    let blocks =
        runbook.split("```promql\n").skip(1).map(|block| block.split("```").next().unwrap_or_default());
    blocks.flat_map(str::lines).map(|line| Asked::new("the runbook", line, "")).collect()
}

fn is_not_shown(metric: &str) -> bool {
    NOT_SHOWN.iter().any(|prefix| metric.starts_with(prefix))
}

/// Whatever is asked for is there, and no rule fails.
async fn finds_all_that_is_asked_for(prometheus: &Prometheus) {
    let mut asked = dashboards();
    assert!(asked.len() > 80, "{}", asked.len());
    asked.extend(runbook());
    let groups = prometheus.get("rules").await.expect("the rules");
    let groups = groups["groups"].as_array().expect("a list").iter();
    for rule in groups.flat_map(|group| group["rules"].as_array().expect("a list")) {
        assert_eq!(rule["health"], "ok", "{rule}");
        let text = |key: &str| rule[key].as_str().expect("text");
        asked.push(Asked::new(text("name"), text("query"), ""));
    }
    let (mut labels, mut wrong) = (BTreeMap::<String, BTreeSet<String>>::new(), Vec::new());
    for Asked { at, expression, shown } in asked {
        let result = match prometheus.query(&expression).await.expect("an answer") {
            Ok(result) => result,
            Err(error) => {
                wrong.push(format!("{at}: {expression}: {error}"));
                continue;
            }
        };
        let names = promql::names(&expression);
        for metric in &names.metrics {
            if !labels.contains_key(metric) {
                labels.insert(metric.clone(), prometheus.labels(metric).await);
            }
            if labels[metric].is_empty() && !is_not_shown(metric) {
                wrong.push(format!("{at}: nobody shows {metric}"));
            }
        }
        if names.metrics.iter().any(|metric| is_not_shown(metric)) {
            continue;
        }
        let there: BTreeSet<_> = names.metrics.iter().flat_map(|metric| &labels[metric]).collect();
        for label in names.labels.iter().chain(&shown).filter(|label| !there.contains(label)) {
            wrong.push(format!("{at}: {expression} has no {label}, but {there:?}"));
        }
        // A label that is empty, as that of no model, is none.
        let series = result.as_array().expect("a list");
        let has = |label: &&String| series.iter().any(|one| one["metric"][label.as_str()].is_string());
        if !series.is_empty() && !shown.iter().all(|label| has(&label)) {
            wrong.push(format!("{at}: {result} of {expression} is not shown by {shown:?}"));
        }
    }
    let documents = ["README.md", "deploy/alerts/RUNBOOK.md"];
    for document in
        documents.map(|path| fs::read_to_string(folder().join("..").join(path)).expect("a document"))
    {
        let words = document.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for metric in words.filter(|word| word.starts_with("baton_") && promql::is_metric(word)) {
            let is_shown = async |name: &str| !prometheus.labels(name).await.is_empty();
            let histogram = format!("{metric}_count");
            if !is_not_shown(metric) && !is_shown(metric).await && !is_shown(&histogram).await {
                wrong.push(format!("nobody shows {metric}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Clients leave while caches are on their way, until one has: what is almost there arrives all the same.
async fn leave_in_a_transfer(fleet: &Fleet) {
    const CLIENTS: u32 = 20;
    for client in 0..CLIENTS {
        // Another prompt each time: what decode has is not sent.
        let long = format!("{client} {}", chat::long_prompt(1200));
        let whole = async { fleet.ask(KEY, MODEL, &long, 100).await.bytes().await };
        tokio::select! {
            _ = whole => continue,
            _ = fleet.server_with("baton_server_transfers_in_active", "") => {}
        }
        let aborted = fleet.server_with("baton_server_transfers_aborted_total", "");
        if tokio::time::timeout(Duration::from_secs(2), aborted).await.is_ok() {
            return;
        }
    }
    panic!("of {CLIENTS} clients none left in time");
}

#[tokio::test]
async fn alerts_are_raised_by_what_happens_and_clear_and_all_that_is_asked_for_is_there() {
    let mut fleet = Fleet::start().await;
    let prometheus = Prometheus::start(&fleet).await;
    assert_eq!(fleet.ask("sk-of-nobody", MODEL, PROMPT, 1).await.status(), 401);
    assert_eq!(fleet.ask(OLD_KEY, MODEL, PROMPT, 1).await.status(), 401);
    assert_eq!(fleet.ask(KEY, "no-such-model", PROMPT, 1).await.status(), 404);
    let mut left = fleet.ask(KEY, MODEL, PROMPT, 500).await;
    assert!(left.chunk().await.expect("a stream").is_some());
    drop(left);
    leave_in_a_transfer(&fleet).await;

    // A server dies in the midst of an answer.
    let mut answer = fleet.ask(KEY, MODEL, PROMPT, 200).await;
    let mut text = String::new();
    while text.matches("data: ").count() < 5 {
        text += &String::from_utf8_lossy(&answer.chunk().await.expect("a stream").expect("goes on"));
    }
    let decode = fleet.server_with("baton_server_role", "role=\"decode\"").await;
    fleet.kill(decode);
    let at = fleet.observed[decode].clone();
    prometheus.raises(&[("alertname", "BatonDown"), ("instance", &at), ("severity", "ticket")]).await;
    fleet.run(decode);
    prometheus.clears(&[("alertname", "BatonDown")]).await;
    while let Some(chunk) = answer.chunk().await.expect("a stream") {
        text += &String::from_utf8_lossy(&chunk);
    }
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");

    // The controller dies.
    fleet.kill("controller");
    prometheus.raises(&[("alertname", "BatonNoLeader"), ("severity", "page")]).await;
    fleet.run("controller");
    prometheus.clears(&[("alertname", "BatonNoLeader")]).await;
    for alert in ["BatonModelNotServed", "BatonGroupDegraded"] {
        prometheus.clears(&[("alertname", alert)]).await;
    }

    finds_all_that_is_asked_for(&prometheus).await;
}
