//! A cluster of processes that speak mutual TLS, each started by itself with a certificate of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use baton_integration_tests::{
    APART,
    authority::Authority,
    binary, eventually, model,
    process::{Service, free_address},
};
use baton_process::TlsConfig;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

/// The machine has few cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn settings(tls: &TlsConfig) -> [String; 6] {
    let set = |key: &str, path: &Path| ["--set".to_owned(), format!("tls.{key}={}", path.display())];
    let pairs =
        [set("ca_file", &tls.ca_file), set("cert_file", &tls.cert_file), set("key_file", &tls.key_file)];
    let [[a, b], [c, d], [e, f]] = pairs;
    [a, b, c, d, e, f]
}

/// A controller, a coordinator and two servers.
pub(crate) struct Fleet {
    pub(crate) dir: TempDir,
    pub(crate) authority: Authority,
    pub(crate) controller: String,
    pub(crate) coordinator: String,
    pub(crate) url: String,
    services: Vec<Service>,
    _turn: MutexGuard<'static, ()>,
}

impl Fleet {
    /// Starts it and waits until it serves.
    pub(crate) async fn start() -> Self {
        let mut fleet = Self::without_servers(&[]).await;
        fleet.server("alpha", "alpha");
        fleet.server("beta", "beta");
        fleet.is_ready().await;
        fleet
    }

    /// Waits until it serves.
    pub(crate) async fn is_ready(&self) {
        eventually("a coordinator that is ready", || async {
            reqwest::get(format!("{}/readiness", self.url)).await.ok()?.error_for_status().ok().map(drop)
        })
        .await;
    }

    /// The controller and the coordinator, both with these settings.
    pub(crate) async fn without_servers(settings: &[&str]) -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::new(dir.path().join("certificates"));
        let [controller, coordinator, http] = [(); 3].map(|()| free_address());
        let url = format!("http://{http}");
        let mut fleet =
            Self { dir, authority, controller, coordinator, url, services: Vec::new(), _turn: turn };
        let (controller, coordinator) = (fleet.controller.clone(), fleet.coordinator.clone());
        let own = ["--listen", &controller, "--set", "metrics_listen=127.0.0.1:0"];
        fleet.spawn("baton-controller", "controller", "c-0", &[&own[..], settings].concat());
        let set = [
            "id=e-0",
            APART,
            &format!("store.controller={controller}"),
            &format!("listen={http}"),
            &format!("admin_listen={coordinator}"),
        ];
        let set = set.into_iter().flat_map(|setting| ["--set", setting]);
        let model = model().display().to_string();
        let own: Vec<&str> = set.chain(["--model", &model]).collect();
        fleet.spawn("baton-coordinator", "coordinator", "e-0", &[&own[..], settings].concat());
        fleet
    }

    fn spawn(&mut self, program: &str, role: &str, name: &str, arguments: &[&str]) {
        let tls = self.authority.issue(role, name);
        let mut command = Command::new(binary(program));
        command.args(settings(&tls)).args(arguments);
        self.services.push(Service::start(&mut command, &self.log(name)));
    }

    /// An instance with the certificate of this name.
    pub(crate) fn server(&mut self, certificate: &str, id: &str) {
        self.server_with(certificate, id, &[]);
    }

    pub(crate) fn server_with(&mut self, certificate: &str, id: &str, settings: &[&str]) {
        let (model, controller) = (model().display().to_string(), self.controller.clone());
        let arguments = ["--instance-id", id, "--controller", &controller, "--model", &model];
        let threads = ["--set", "runtime.threads=1", "--set", "process.log.level=debug"];
        self.spawn("baton-server", "server", certificate, &[&arguments[..], &threads[..], settings].concat());
    }

    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    pub(crate) fn logged(&self, name: &str, words: &str) -> bool {
        fs::read_to_string(self.log(name)).unwrap_or_default().contains(words)
    }

    pub(crate) async fn ctl(&self, tls: &TlsConfig, arguments: &[&str]) -> Output {
        let mut ctl = Command::new(binary("baton"));
        ctl.arg("ctl").args(arguments).args(["--controller", &self.controller]).stdin(Stdio::null());
        let files =
            [("--ca-file", &tls.ca_file), ("--cert-file", &tls.cert_file), ("--key-file", &tls.key_file)];
        for (flag, path) in files.into_iter().filter(|(_, path)| !path.as_os_str().is_empty()) {
            ctl.arg(flag).arg(path);
        }
        tokio::task::spawn_blocking(move || ctl.output()).await.expect("no panic").expect("baton starts")
    }

    pub(crate) async fn get(&self, tls: &TlsConfig, what: &str) -> Option<Vec<Value>> {
        let output = self.ctl(tls, &["get", what, "-o", "json"]).await;
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("ctl prints JSON"))
    }
}
