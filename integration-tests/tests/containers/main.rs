//! The multi-node deployment in containers: controllers, coordinators, servers and etcd, two or more of each, on a private
//! network, mutual TLS everywhere, under load by the official client. Each kind is killed, cut off, and all are restarted
//! one by one; no request fails.
//!
//! Needs docker's engine, and the right to start it: `deploy/run test-containers`, which `deploy/run test` includes.

mod docker;

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use baton_integration_tests::{APART, authority::alert, binary, folder, model, required};
use docker::{Container, Docker};
use serde_json::Value;

const KEY: &str = "sk-containers";
/// Between two faults.
const REST: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(120);
const ETCD: [u8; 3] = [11, 12, 13];
const CONTROLLERS: [u8; 2] = [21, 22];
const COORDINATORS: [u8; 2] = [31, 32];
const SERVERS: [u8; 4] = [41, 42, 43, 44];

fn addresses(hosts: &[u8], port: u16) -> Vec<String> {
    hosts.iter().map(|host| format!("{}.{host}:{port}", docker::NETWORK)).collect()
}

/// Certificates, secrets and the API key, as files.
struct Secrets(tempfile::TempDir);

impl Secrets {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let certificates = |arguments: &[&str]| certificates_in(dir.path(), arguments);
        certificates(&["authority"]);
        ["controller", "coordinator", "server"].iter().for_each(|role| certificates(&["issue", role]));
        certificates(&["issue", "admin", "alice"]);
        for (name, hosts) in [("etcd", &ETCD[..]), ("web", &COORDINATORS)] {
            let hosts: Vec<String> = hosts.iter().map(|host| format!("{}.{host}", docker::NETWORK)).collect();
            let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
            certificates(&[&["issue", "host", name, "127.0.0.1"], &hosts[..]].concat());
        }
        // Clients are of an authority of their own.
        let clients = dir.path().join("clients");
        let of_clients = |arguments: &[&str]| certificates_in(&clients, arguments);
        of_clients(&["authority"]);
        of_clients(&["issue", "client", "load"]);
        std::fs::copy(clients.join("ca.crt"), dir.path().join("clients-ca.crt")).expect("a file");
        let secret: String = (0..32).map(|_| format!("{:02x}", rand::random::<u8>())).collect();
        std::fs::write(dir.path().join("handoff"), secret).expect("a file");
        let digest = sha256(KEY);
        let keys = format!("[[keys]]\nname = \"load\"\nsha256 = \"{digest}\"\n");
        std::fs::write(dir.path().join("keys.toml"), keys).expect("a file");
        // Those in the containers are nobody here.
        for entry in std::fs::read_dir(dir.path()).expect("a folder").flatten() {
            let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            std::fs::set_permissions(entry.path(), readable).expect("ours");
        }
        let passable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), passable).expect("ours");
        Self(dir)
    }
}

fn certificates_in(path: &Path, arguments: &[&str]) {
    let mut script = Command::new(folder().join("../deploy/certificates"));
    let output = script.args(arguments).arg("--folder").arg(path).output().expect("it runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn sha256(text: &str) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn set(settings: &[String]) -> Vec<String> {
    settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]).collect()
}

/// The files of TLS that a role's processes are told of, under this key.
fn files(key: &str, role: &str) -> Vec<String> {
    [("ca", "ca.crt".to_owned()), ("cert", format!("{role}.crt")), ("key", format!("{role}.key"))]
        .map(|(of, file)| format!("{key}.{of}_file=/secrets/{file}"))
        .into()
}

fn tls(role: &str) -> Vec<String> {
    files("tls", role)
}

/// And what they are told of etcd.
fn store(role: &str) -> Vec<String> {
    let quoted: Vec<String> = addresses(&ETCD, 2379).iter().map(|address| format!("{address:?}")).collect();
    let endpoints = format!("store.etcd.endpoints=[{}]", quoted.join(","));
    [vec![endpoints], files("store.etcd", role)].concat()
}

fn etcd(index: usize) -> Container {
    let name = |index: usize| format!("etcd-{index}");
    let peers: Vec<String> = addresses(&ETCD, 2380)
        .iter()
        .enumerate()
        .map(|(index, address)| format!("{}=https://{address}", name(index)))
        .collect();
    let (client, peer) = (&addresses(&ETCD, 2379)[index], &addresses(&ETCD, 2380)[index]);
    let files = |of: &str| {
        [("trusted-ca-file", "ca.crt"), ("cert-file", "host-etcd.crt"), ("key-file", "host-etcd.key")]
            .map(|(flag, file)| format!("--{of}{flag}=/secrets/{file}"))
    };
    let mut arguments = vec![
        format!("--name={}", name(index)),
        "--data-dir=/var/lib/etcd/data".to_owned(),
        format!("--listen-client-urls=https://{client}"),
        format!("--advertise-client-urls=https://{client}"),
        format!("--listen-peer-urls=https://{peer}"),
        format!("--initial-advertise-peer-urls=https://{peer}"),
        format!("--initial-cluster={}", peers.join(",")),
        "--client-cert-auth".to_owned(),
        "--peer-client-cert-auth".to_owned(),
    ];
    arguments.extend(files(""));
    arguments.extend(files("peer-"));
    Container { name: name(index), host: ETCD[index], image: "baton-etcd", arguments }
}

fn controller(index: usize) -> Container {
    let own = [
        format!("controller_id=controller-{index}"),
        format!("listen={}", addresses(&CONTROLLERS, 7100)[index]),
        "metrics_listen=0.0.0.0:7101".to_owned(),
        "store.kind=etcd".to_owned(),
        "roles.prefill=2".to_owned(),
        "roles.decode=2".to_owned(),
    ];
    let arguments = set(&[&own[..], &store("controller"), &tls("controller")].concat());
    let name = format!("controller-{index}");
    Container { name, host: CONTROLLERS[index], image: "baton-controller", arguments }
}

fn coordinator(index: usize) -> Container {
    let own = [
        format!("id=coordinator-{index}"),
        "listen=0.0.0.0:8000".to_owned(),
        "admin_listen=0.0.0.0:8001".to_owned(),
        "metrics_listen=0.0.0.0:8002".to_owned(),
        format!("advertise_host={}.{}", docker::NETWORK, COORDINATORS[index]),
        "models=[{path = \"/models/model.gguf\", names = [\"model\"]}]".to_owned(),
        "https.cert_file=/secrets/host-web.crt".to_owned(),
        "https.key_file=/secrets/host-web.key".to_owned(),
        "https.client_ca_file=/secrets/clients-ca.crt".to_owned(),
        "api_keys.file=/secrets/keys.toml".to_owned(),
        "limits.linger=2s".to_owned(),
        APART.to_owned(),
    ];
    let arguments = set(&[&own[..], &store("coordinator"), &tls("coordinator")].concat());
    let name = format!("coordinator-{index}");
    Container { name, host: COORDINATORS[index], image: "baton-coordinator", arguments }
}

fn server(index: usize) -> Container {
    let quoted: Vec<String> = addresses(&CONTROLLERS, 7100).iter().map(|at| format!("{at:?}")).collect();
    let own = [
        format!("instance_id=server-{index}"),
        "listen=0.0.0.0:7200".to_owned(),
        "metrics_listen=0.0.0.0:7201".to_owned(),
        "kv_data_listen=0.0.0.0:7202".to_owned(),
        format!("advertise_host={}.{}", docker::NETWORK, SERVERS[index]),
        format!("controllers=[{}]", quoted.join(",")),
        "model.path=/models/model.gguf".to_owned(),
        "runtime.threads=1".to_owned(),
        "runtime.kv_cache_bytes=67108864".to_owned(),
        "handoff.secret_file=/secrets/handoff".to_owned(),
        "handoff.transports=[\"tcp\"]".to_owned(),
    ];
    let arguments = set(&[&own[..], &tls("server")].concat());
    let name = format!("server-{index}");
    Container { name, host: SERVERS[index], image: "baton-server", arguments }
}

/// Where a service of ours is asked how it is.
fn observed(container: &Container) -> Option<String> {
    let port = match container.image {
        "baton-controller" => 7101,
        "baton-coordinator" => 8002,
        "baton-server" => 7201,
        _ => return None,
    };
    Some(format!("{}:{port}", container.address()))
}

/// The deployment, and the load on it.
struct Deployment {
    /// Once all are ready.
    load: Option<Child>,
    containers: Vec<Container>,
    docker: Docker,
    secrets: Secrets,
    client: reqwest::Client,
}

impl Deployment {
    async fn start() -> Self {
        let (docker, secrets) = (Docker::start(), Secrets::new());
        docker.build(binary("baton").parent().expect("lies in a folder"));
        let containers: Vec<Container> = (0..ETCD.len())
            .map(etcd)
            .chain((0..CONTROLLERS.len()).map(controller))
            .chain((0..COORDINATORS.len()).map(coordinator))
            .chain((0..SERVERS.len()).map(server))
            .collect();
        let reads = [(secrets.0.path().to_owned(), "/secrets"), (model(), "/models/model.gguf")];
        containers.iter().for_each(|container| container.start(&docker, &reads));
        let client = reqwest::Client::builder().timeout(Duration::from_secs(2)).build().expect("a client");
        let mut deployment = Self { load: None, containers, docker, secrets, client };
        deployment.all_ready().await;
        let ca = deployment.secrets.0.path().join("ca.crt");
        for address in addresses(&COORDINATORS, 8000) {
            let said = alert(&address, &ca, None).expect("clients without a certificate are turned away");
            assert!(said.contains("certificate required"), "{said}");
        }
        deployment.etcd_certificates_are_watched().await;
        deployment.load = Some(deployment.begin_load());
        deployment
    }

    fn begin_load(&self) -> Child {
        let urls: Vec<String> =
            addresses(&COORDINATORS, 8000).iter().map(|address| format!("https://{address}/v1")).collect();
        let mut load = Command::new(required("BATON_TEST_PYTHON"))
            .arg(folder().join("python/load.py"))
            .args([&urls.join(","), "model"])
            .arg(self.secrets.0.path().join("ca.crt"))
            .arg(KEY)
            .args(["crt", "key"].map(|end| self.secrets.0.path().join(format!("clients/client-load.{end}"))))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the load begins");
        let mut line = String::new();
        let mut said = BufReader::new(load.stdout.as_mut().expect("a pipe"));
        said.read_line(&mut line).expect("is read");
        assert_eq!(line, "loading\n", "{}", self.docker.logs("30"));
        load
    }

    fn named(&self, name: &str) -> &Container {
        self.containers.iter().find(|container| container.name == name).expect(name)
    }

    async fn is_ready(&self, container: &Container) -> bool {
        let Some(observed) = observed(container) else {
            return self.docker.run(&["inspect", "-f", "{{.State.Running}}", &container.name]) == "true";
        };
        let asked = self.client.get(format!("http://{observed}/readiness")).send().await;
        asked.is_ok_and(|answer| answer.status() == 200)
    }

    async fn etcd_certificates_are_watched(&self) {
        let of_etcd =
            |container: &&Container| ["baton-controller", "baton-coordinator"].contains(&container.image);
        for container in self.containers.iter().filter(of_etcd) {
            let url = format!("http://{}/metrics", observed(container).expect("a service of ours"));
            let asked = self.client.get(url).send().await.expect("answers");
            let metrics = asked.text().await.expect("is read");
            let of = "baton_tls_certificate_expiry_timestamp_seconds{file=\"store.etcd.cert_file\"}";
            assert!(metrics.contains(of), "{}: {metrics}", container.name);
        }
    }

    /// Who prefills and who decodes, by `baton ctl`.
    fn roles(&self) -> Vec<(String, String)> {
        let at = |file: &str| self.secrets.0.path().join(file);
        let mut ctl = Command::new(binary("baton"));
        ctl.args(["ctl", "get", "roles", "-o", "json", "--controller"])
            .arg(addresses(&CONTROLLERS, 7100).join(","));
        ctl.arg("--ca-file").arg(at("ca.crt")).arg("--cert-file").arg(at("admin-alice.crt"));
        let output =
            ctl.arg("--key-file").arg(at("admin-alice.key")).stdin(Stdio::null()).output().expect("starts");
        let roles: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let text = |view: &Value, key: &str| view[key].as_str().unwrap_or_default().to_owned();
        let ready = roles.iter().filter(|view| view["phase"] == "ready" && view["registered"] == true);
        ready.map(|view| (text(view, "instance_id"), text(view, "observed_role"))).collect()
    }

    async fn all_ready(&self) {
        let begun = Instant::now();
        loop {
            let mut waits = Vec::new();
            for container in &self.containers {
                if !self.is_ready(container).await {
                    waits.push(&container.name);
                }
            }
            let roles = self.roles();
            let of = |role: &str| roles.iter().filter(|(_, has)| has == role).count();
            if waits.is_empty() && (of("prefill"), of("decode")) == (2, 2) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{waits:?}, {roles:?}: {}", self.docker.logs("30"));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn server_of(&self, role: &str) -> String {
        let found = self.roles().into_iter().find(|(_, has)| has == role);
        found.unwrap_or_else(|| panic!("nobody is {role}")).0
    }

    async fn kill(&self, name: &str) {
        eprintln!("killing {name}");
        self.docker.run(&["kill", name]);
        tokio::time::sleep(REST).await;
        self.docker.run(&["start", name]);
        self.all_ready().await;
    }

    async fn cut_off(&self, name: &str) {
        eprintln!("cutting {name} off");
        self.docker.run(&["network", "disconnect", "baton", name]);
        tokio::time::sleep(REST * 2).await;
        let address = self.named(name).address();
        self.docker.run(&["network", "connect", "--ip", &address, "baton", name]);
        self.all_ready().await;
    }

    async fn restart(&self, name: &str) {
        eprintln!("restarting {name}");
        self.docker.run(&["restart", "-t", "120", name]);
        self.all_ready().await;
    }

    /// Ends the load; what became of it.
    fn end_load(&mut self) -> Value {
        let load = self.load.as_mut().expect("it has begun");
        drop(load.stdin.take());
        let mut told = String::new();
        load.stdout.take().expect("a pipe").read_to_string(&mut told).expect("is read");
        assert!(load.wait().expect("ends").success(), "{told}");
        serde_json::from_str(&told).expect("JSON")
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if let Some(load) = &mut self.load {
            let _ = load.kill();
            let _ = load.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.docker.logs("30"));
        }
    }
}

fn is_root() -> bool {
    Path::new("/proc/self").metadata().is_ok_and(|of| std::os::unix::fs::MetadataExt::uid(&of) == 0)
}

#[tokio::test]
#[ignore = "starts docker's engine: ./deploy/run test-containers"]
async fn no_request_fails_whatever_becomes_of_a_container() {
    assert!(is_root(), "only root may start docker's engine");
    let mut deployment = Deployment::start().await;
    for name in ["etcd-0", "controller-0", "controller-1", "coordinator-0"] {
        deployment.kill(name).await;
    }
    for role in ["prefill", "decode"] {
        deployment.kill(&deployment.server_of(role)).await;
    }
    for role in ["prefill", "decode"] {
        deployment.cut_off(&deployment.server_of(role)).await;
    }
    let all: Vec<String> = deployment.containers.iter().map(|container| container.name.clone()).collect();
    for name in &all {
        deployment.restart(name).await;
    }
    let told = deployment.end_load();
    println!("{told}");
    let none = Value::Array(Vec::new());
    assert_eq!((&told["failed"], &told["wrong"]), (&none, &none));
    // None of the six clients has met a bug of its own, and few requests were sent twice.
    assert_eq!(told["ended"], 6, "{told}");
    let count = |key: &str| told[key].as_u64().expect("a number");
    assert!(count("requests") > 20 && count("again") < count("requests") / 3, "{told}");
    let logs = deployment.docker.logs("all");
    assert_eq!(baton_integration_tests::process::panics(&logs).collect::<Vec<_>>(), Vec::<&str>::new());
}
