//! One fleet under test, of services that are each a process of its own, on an etcd that is there: two controllers,
//! coordinators and servers, of whichever build.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    APART, binary, chat, eventually, model,
    process::{self, Service, free_address},
};

/// Longest that a service takes to leave in order.
const LEAVES_WITHIN: Duration = Duration::from_secs(60);

/// Where the services' programs of one build are.
#[derive(Debug, Clone)]
pub struct Build(PathBuf);

impl Build {
    /// The one that this test is of.
    pub fn this() -> Self {
        Self(binary("baton").parent().expect("it lies in a folder").to_owned())
    }

    /// In a folder with the services' programs.
    pub fn at(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// Whether a service of it has such a setting.
    fn knows(&self, service: &str, key: &str) -> bool {
        let reference = self.program(service).arg("--config-reference").output().expect("it starts");
        String::from_utf8_lossy(&reference.stdout).contains(&format!("`{key}`"))
    }

    fn program(&self, service: &str) -> Command {
        let program = self.0.join(format!("baton-{service}"));
        assert!(program.exists(), "{} is missing", program.display());
        Command::new(program)
    }
}

fn set<'a>(command: &'a mut Command, settings: &[String]) -> &'a mut Command {
    settings.iter().fold(command, |command, setting| command.args(["--set", setting]))
}

/// A running fleet; its processes do not outlive it.
pub struct Fleet {
    dir: TempDir,
    build: Build,
    etcd: String,
    controllers: [String; 2],
    url: String,
    services: BTreeMap<String, Service>,
}

impl Fleet {
    /// The controllers c0 and c1, a coordinator, and two servers, alpha and beta; waits until they serve.
    pub async fn start(etcd: &[String], build: Build) -> Self {
        let etcd = format!("store.etcd.endpoints={}", json!(etcd));
        let controllers = [free_address(), free_address()];
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut fleet = Self { dir, build, etcd, controllers, url: String::new(), services: BTreeMap::new() };
        fleet.controller(0, "c0");
        fleet.controller(1, "c1");
        fleet.coordinator("coordinator");
        fleet.server("alpha");
        fleet.server("beta");
        fleet.has_roles(&["decode", "prefill"]).await;
        fleet
    }

    /// What is started from here on is of this build.
    pub fn change_build(&mut self, build: Build) {
        self.build = build;
    }

    /// Base of the OpenAI API, at the coordinator that was started last.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn spawn(&mut self, name: &str, command: &mut Command) {
        let service = Service::start(command, &self.log_file(name));
        self.services.insert(name.to_owned(), service);
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    /// What a service has logged so far.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_file(name)).expect("a service has a log")
    }

    /// Starts a controller at the first or second place.
    pub fn controller(&mut self, place: usize, name: &str) {
        let mut command = self.build.program("controller");
        let settings = [
            "store.kind=etcd".to_owned(),
            self.etcd.clone(),
            format!("listen={}", self.controllers[place]),
            format!("controller_id={name}"),
            "metrics_listen=127.0.0.1:0".to_owned(),
        ];
        self.spawn(name, set(&mut command, &settings));
    }

    /// Starts a coordinator, to which clients are from here on to go.
    pub fn coordinator(&mut self, name: &str) {
        let http = free_address();
        let mut command = self.build.program("coordinator");
        let own = [self.etcd.clone(), format!("listen={http}"), "admin_listen=127.0.0.1:0".to_owned()];
        let known = |setting: &&str| {
            setting.split_once('=').is_some_and(|(key, _)| self.build.knows("coordinator", key))
        };
        let settings: Vec<String> =
            own.into_iter().chain([APART].into_iter().filter(known).map(str::to_owned)).collect();
        self.spawn(name, set(&mut command, &settings).arg("--model").arg(model()));
        self.url = format!("http://{http}");
    }

    pub fn server(&mut self, name: &str) {
        let controllers = format!("controllers={}", json!(self.controllers));
        let mut command = self.build.program("server");
        command.args(["--instance-id", name, "--set", &controllers, "--set", "runtime.threads=1", "--model"]);
        self.spawn(name, command.arg(model()));
    }

    /// Ends a service at once.
    pub fn kill(&mut self, name: &str) {
        drop(self.services.remove(name).unwrap_or_else(|| panic!("no {name} runs")));
    }

    /// Ends a service in order, and waits until it has left.
    pub async fn stop(&mut self, name: &str) {
        let mut service = self.services.remove(name).unwrap_or_else(|| panic!("no {name} runs"));
        process::signal(service.0.id(), Signal::TERM);
        let ended =
            tokio::task::spawn_blocking(move || process::wait_exit(&mut service.0, LEAVES_WITHIN)).await;
        let status = ended.expect("it leaves in time");
        assert!(status.success(), "{name} ended with {status}: {}", self.log(name));
    }

    /// `baton ctl get WHAT -o json` by the controller that leads, if one does.
    pub async fn ctl(&self, what: &str) -> Option<Vec<Value>> {
        for controller in &self.controllers {
            let mut ctl = Command::new(binary("baton"));
            ctl.args(["ctl", "get", what, "-o", "json", "--controller", controller]).stdin(Stdio::null());
            let output = tokio::task::spawn_blocking(move || ctl.output()).await.expect("no panic");
            let output = output.expect("baton starts");
            if output.status.success() {
                return Some(serde_json::from_slice(&output.stdout).expect("ctl prints JSON"));
            }
        }
        None
    }

    /// What is said of roles by the controller that leads, if one does.
    pub async fn roles(&self) -> Option<Vec<Value>> {
        self.ctl("roles").await
    }

    /// Waits until these roles are held and served, and asks for an answer.
    pub async fn has_roles(&self, expected: &[&str]) {
        eventually(&format!("instances that are {expected:?}"), || async {
            let roles = self.roles().await?;
            let ready = roles.iter().filter(|view| view["phase"] == "ready" && view["registered"] == true);
            let mut held: Vec<_> = ready.filter_map(|view| view["observed_role"].as_str()).collect();
            held.sort_unstable();
            (held == expected).then_some(())
        })
        .await;
        self.is_ready().await;
        self.answers().await;
    }

    /// Waits until the coordinator that was started last takes requests.
    pub async fn is_ready(&self) {
        eventually("a coordinator that is ready", || async {
            reqwest::get(format!("{}/readiness", self.url)).await.ok()?.error_for_status().ok().map(drop)
        })
        .await;
    }

    /// Waits until an instance serves.
    pub async fn serves(&self, instance: &str) {
        eventually(&format!("{instance} to serve"), || async {
            let roles = self.roles().await?;
            let it = roles.iter().find(|view| view["instance_id"] == instance)?;
            (it["phase"] == "ready" && it["observed_role"] != "none").then_some(())
        })
        .await;
    }

    pub async fn answers(&self) {
        let body = chat::request("SmolLM2-135M-Instruct", "What is the capital of France?", 12, false);
        let answer = chat::ask(&self.url, &body).await;
        assert!(answer.contains("Paris"), "{answer}");
    }

    /// Waits until some controller has logged a line with these words.
    pub async fn says(&self, words: &[&str]) {
        eventually(&format!("a controller that says {words:?}"), || async {
            let log = |name| fs::read_to_string(self.log_file(name)).ok();
            let said = |log: String| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
            self.services.keys().filter_map(|name| log(name)).any(said).then_some(())
        })
        .await;
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
                let log = fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let last = lines[lines.len().saturating_sub(40)..].join("\n");
                eprintln!("\n== {}\n{last}", entry.path().display());
            }
        }
    }
}
