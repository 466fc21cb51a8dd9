//! One cluster under test: a `baton up` of its own, on free ports, in a directory of its own.
//!
//! Clusters of one test binary run one at a time: the machine has few cores, and timings of faults are real.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

use crate::{APART, binary, eventually, metrics, model, process};

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// What `baton up` writes about itself; the part the tests read.
#[derive(Debug, Clone, Deserialize)]
struct RunFile {
    ready: bool,
    models: Vec<ModelEntry>,
    url: String,
    controller: String,
    coordinator: String,
    processes: Vec<ProcessEntry>,
}

#[derive(Debug, Clone, Deserialize)]
struct ModelEntry {
    name: String,
}

#[derive(Debug, Clone, Deserialize)]
struct ProcessEntry {
    name: String,
    pid: Option<u32>,
}

/// A running cluster; killed, and its processes with it, when dropped.
pub struct Cluster {
    up: Child,
    run: RunFile,
    dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts `baton up` with `arguments` and waits until it serves the model that tests use. Decode computes no prompts unless
    /// the arguments say so.
    pub async fn start(arguments: &[&str]) -> Self {
        Self::start_with(&model(), arguments).await
    }

    /// As [`Self::start`], with a model of one's own.
    pub async fn start_with(model: &Path, arguments: &[&str]) -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let screen = File::create(dir.path().join("up.log")).expect("a file in it");
        let up = Command::new(binary("baton"))
            .args(["up", "--listen", "127.0.0.1:0", "--set", &format!("coordinator.{APART}"), "--run-dir"])
            .arg(dir.path())
            .arg("--model")
            .arg(model)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(screen.try_clone().expect("a file can be shared"))
            .stderr(screen)
            .spawn()
            .expect("baton starts");
        let mut up = Killed(Some(up));
        let run = eventually("a cluster that is ready", || {
            let child = up.0.as_mut().expect("still held");
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                panic!("`baton up` ended with {status}: {}", logs(dir.path()));
            }
            std::future::ready(read_run_file(dir.path()).filter(|run| run.ready))
        })
        .await;
        Self { up: up.0.take().expect("still held"), run, dir, _turn: turn }
    }

    /// Base of the OpenAI API.
    pub fn url(&self) -> &str {
        &self.run.url
    }

    /// host:port of the controller.
    pub fn controller(&self) -> &str {
        &self.run.controller
    }

    /// host:port where operators ask the coordinator.
    pub fn coordinator(&self) -> &str {
        &self.run.coordinator
    }

    /// What clients say in `model`; of several models, the first.
    pub fn model(&self) -> &str {
        &self.run.models[0].name
    }

    /// What `baton up` has printed so far.
    pub fn screen(&self) -> String {
        fs::read_to_string(self.dir.path().join("up.log")).expect("the screen's file is there")
    }

    /// What a service has logged so far.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("{name}.log"))).expect("a service has a log")
    }

    fn run_file(&self) -> RunFile {
        read_run_file(self.dir.path()).expect("the run file is there while the cluster runs")
    }

    /// Pids of the services, by name.
    pub fn pids(&self) -> BTreeMap<String, u32> {
        self.run_file().processes.into_iter().filter_map(|entry| Some((entry.name, entry.pid?))).collect()
    }

    /// Sends a signal to one service; its pid.
    pub fn kill(&self, name: &str, signal: Signal) -> u32 {
        let pid = self.pids()[name];
        process::signal(pid, signal);
        pid
    }

    /// Sends a signal to `baton up` itself.
    pub fn signal_up(&self, signal: Signal) {
        process::signal(self.up.id(), signal);
    }

    /// Waits until the supervisor has a new process in the place of `old`.
    pub async fn assert_restarted(&self, name: &str, old: u32) {
        let what = format!("{name} started again");
        eventually(&what, || async { self.pids().get(name).is_some_and(|pid| *pid != old).then_some(()) })
            .await;
    }

    /// Ends the cluster as Ctrl-C does, and checks that it ends in order.
    pub fn stop(mut self) -> impl Future<Output = ()> + Send + 'static {
        self.signal_up(Signal::INT);
        async move {
            let this = tokio::task::spawn_blocking(move || {
                let status = process::wait_exit(&mut self.up, Duration::from_secs(60));
                assert!(status.success(), "`baton up` ended with {status}: {}", logs(self.dir.path()));
                self
            });
            drop(this.await.expect("the cluster stops in order"));
        }
    }

    /// `baton ctl get WHAT -o json`; `None` while the asked service does not answer.
    pub async fn try_ctl(&self, what: &str) -> Option<Vec<Value>> {
        let mut ctl = Command::new(binary("baton"));
        ctl.args(["ctl", "get", what, "-o", "json", "--controller", &self.run.controller]);
        ctl.args(["--coordinator", &self.run.coordinator]).stdin(Stdio::null());
        let output =
            tokio::task::spawn_blocking(move || ctl.output()).await.expect("no panic").expect("baton starts");
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("ctl prints JSON"))
    }

    /// `baton ctl ARGUMENTS`, which has to succeed; what it says.
    pub async fn run_ctl(&self, arguments: &[&str]) -> String {
        let mut ctl = Command::new(binary("baton"));
        ctl.arg("ctl").args(arguments).args(["--controller", &self.run.controller]).stdin(Stdio::null());
        let output =
            tokio::task::spawn_blocking(move || ctl.output()).await.expect("no panic").expect("baton starts");
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`ctl {}`: {said}", arguments.join(" "));
        said
    }

    pub async fn ctl(&self, what: &str) -> Vec<Value> {
        eventually(&format!("an answer to `ctl get {what}`"), || self.try_ctl(what)).await
    }

    /// Observed roles, sorted.
    pub async fn roles(&self) -> Vec<String> {
        let mut roles: Vec<String> =
            self.ctl("roles").await.iter().map(|view| text(view, "observed_role")).collect();
        roles.sort();
        roles
    }

    /// Observed role and epoch of every instance that is registered and ready.
    pub async fn role_epochs(&self) -> BTreeMap<String, (String, u64)> {
        let views = self.ctl("roles").await;
        let ready = views.iter().filter(|view| view["phase"] == "ready" && view["registered"] == true);
        let entry = |view: &Value| {
            let epoch = view["observed_epoch"].as_u64().expect("an epoch is a number");
            (text(view, "instance_id"), (text(view, "observed_role"), epoch))
        };
        ready.map(entry).collect()
    }

    /// The instance that has a role.
    pub async fn instance_of(&self, role: &str) -> String {
        let views = self.ctl("roles").await;
        let view = views.iter().find(|view| view["observed_role"] == role);
        text(view.unwrap_or_else(|| panic!("nobody is {role}: {views:?}")), "instance_id")
    }

    /// Where the metrics of every registered server are.
    async fn try_metrics_urls(&self) -> Option<Vec<String>> {
        let url =
            |instance: Value| Some(format!("http://{}/metrics", instance["metrics_endpoint"].as_str()?));
        self.try_ctl("instances").await?.into_iter().map(url).collect()
    }

    /// The same, for whoever looks at them often.
    pub async fn metrics_urls(&self) -> Vec<String> {
        eventually("the servers' addresses", || self.try_metrics_urls()).await
    }

    /// Metrics text of every registered server.
    async fn server_metrics(&self) -> Option<Vec<String>> {
        let mut all = Vec::new();
        for url in self.try_metrics_urls().await? {
            all.push(reqwest::get(url).await.ok()?.text().await.ok()?);
        }
        Some(all)
    }

    /// Sum of a metric over all servers and their label sets that contain `label`.
    pub async fn server_metric(&self, name: &str, label: &str) -> f64 {
        let texts = eventually("metrics of every server", || self.server_metrics()).await;
        texts.iter().map(|text| metrics::sum(text, name, label).unwrap_or(0.0)).sum()
    }

    /// KV blocks that any request holds, on all servers together.
    pub async fn blocks_held(&self) -> f64 {
        self.server_metric("baton_server_kv_blocks_used", "").await
    }

    /// Waits until no server holds a block, a sequence or a transfer, and the coordinator carries no request.
    pub async fn assert_nothing_held(&self) {
        let what = "no block, sequence, transfer or request left";
        eventually(what, || async {
            let texts = self.server_metrics().await?;
            for text in &texts {
                for name in metrics::HELD_BY_SERVERS {
                    let value = metrics::sum(text, name, "");
                    if value.unwrap_or_else(|| panic!("no metric {name}")) != 0.0 {
                        return None;
                    }
                }
                let free = metrics::sum(text, "baton_server_kv_blocks_free", "")?;
                if free != metrics::sum(text, "baton_server_kv_blocks_capacity", "")? {
                    return None;
                }
            }
            self.try_ctl("requests").await?.is_empty().then_some(())
        })
        .await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", logs(self.dir.path()));
        }
        // Without its supervisor every service stops by itself; those that still run after a while are killed.
        let pids = read_run_file(self.dir.path()).map(|run| run.processes).unwrap_or_default();
        let _ = self.up.kill();
        let _ = self.up.wait();
        for pid in pids.into_iter().filter_map(|entry| entry.pid) {
            let begin = std::time::Instant::now();
            while process::alive(pid) {
                if begin.elapsed() > Duration::from_secs(10) {
                    process::signal(pid, Signal::KILL);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Kills what it holds unless that is taken out again.
struct Killed(Option<Child>);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn text(view: &Value, key: &str) -> String {
    view[key].as_str().unwrap_or_else(|| panic!("no {key} in {view}")).to_owned()
}

fn read_run_file(dir: &Path) -> Option<RunFile> {
    serde_json::from_slice(&fs::read(dir.join("run.json")).ok()?).ok()
}

/// The last lines of everything that was logged.
fn logs(dir: &Path) -> String {
    let mut all = String::new();
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in files.filter(|path| path.extension().is_some_and(|extension| extension == "log")) {
        let log = fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        all += &format!("\n== {}\n{}", path.display(), lines[lines.len().saturating_sub(40)..].join("\n"));
    }
    all
}
