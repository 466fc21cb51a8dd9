//! What becomes of a fleet when its etcd loses members or runs out of space: changes stop, traffic goes on, and all is
//! well again when etcd is.

use std::{
    fs,
    process::{Command, Stdio},
};

use baton_integration_tests::{
    binary, chat, eventually, model,
    process::{self, Service, free_address},
};
use baton_registry::{KeyRange, Revision, Store, StoreError, Txn, keys, testing::EtcdServer};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two controllers, a coordinator and servers, each a process of its own, on an etcd.
struct Fleet {
    dir: TempDir,
    etcd: String,
    controllers: [String; 2],
    url: String,
    services: Vec<Service>,
}

impl Fleet {
    /// Starts it and waits until it serves.
    async fn start(members: &[EtcdServer]) -> Self {
        let endpoints: Vec<_> = members.iter().map(EtcdServer::endpoint).collect();
        let etcd = format!("store.etcd.endpoints={}", json!(endpoints));
        let [first, second, http] = [(); 3].map(|()| free_address());
        let controllers = [first, second];
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut fleet = Self { dir, etcd, controllers, url: format!("http://{http}"), services: Vec::new() };
        fleet.controllers_named("c");
        let mut command = Command::new(binary("baton-coordinator"));
        command.args([
            "--set",
            &fleet.etcd,
            "--set",
            &format!("listen={http}"),
            "--set",
            "admin_listen=127.0.0.1:0",
        ]);
        fleet.spawn(command.arg("--model").arg(model()), "coordinator");
        fleet.server("alpha");
        fleet.server("beta");
        fleet.has_roles(&["decode", "prefill"]).await;
        fleet
    }

    fn spawn(&mut self, command: &mut Command, name: &str) {
        self.services.push(Service::start(command, &self.dir.path().join(format!("{name}.log"))));
    }

    fn controllers_named(&mut self, name: &str) {
        for index in [0, 1] {
            let mut command = Command::new(binary("baton-controller"));
            let listen = format!("listen={}", self.controllers[index]);
            command.args(["--set", "store.kind=etcd", "--set", &self.etcd, "--set", &listen]);
            command.args([
                "--set",
                &format!("controller_id={name}{index}"),
                "--set",
                "metrics_listen=127.0.0.1:0",
            ]);
            self.spawn(&mut command, &format!("controller{index}"));
        }
    }

    fn server(&mut self, name: &str) {
        let controllers = format!("controllers={}", json!(self.controllers));
        let mut command = Command::new(binary("baton-server"));
        command.args(["--instance-id", name, "--set", &controllers, "--set", "runtime.threads=1", "--model"]);
        self.spawn(command.arg(model()), name);
    }

    /// What is said of roles by the controller that leads, if one does.
    async fn roles(&self) -> Option<Vec<Value>> {
        for controller in &self.controllers {
            let mut ctl = Command::new(binary("baton"));
            ctl.args(["ctl", "get", "roles", "-o", "json", "--controller", controller]).stdin(Stdio::null());
            let output = tokio::task::spawn_blocking(move || ctl.output()).await.expect("no panic");
            let output = output.expect("baton starts");
            if output.status.success() {
                return Some(serde_json::from_slice(&output.stdout).expect("ctl prints JSON"));
            }
        }
        None
    }

    /// Waits until these roles are held and served, and asks for an answer.
    async fn has_roles(&self, expected: &[&str]) {
        eventually(&format!("instances that are {expected:?}"), || async {
            let roles = self.roles().await?;
            let ready = roles.iter().filter(|view| view["phase"] == "ready" && view["registered"] == true);
            let mut held: Vec<_> = ready.filter_map(|view| view["observed_role"].as_str()).collect();
            held.sort_unstable();
            (held == expected).then_some(())
        })
        .await;
        eventually("a coordinator that is ready", || async {
            reqwest::get(format!("{}/readiness", self.url)).await.ok()?.error_for_status().ok().map(drop)
        })
        .await;
        self.answers().await;
    }

    /// Waits until an instance serves.
    async fn serves(&self, instance: &str) {
        eventually(&format!("{instance} to serve"), || async {
            let roles = self.roles().await?;
            let it = roles.iter().find(|view| view["instance_id"] == instance)?;
            (it["phase"] == "ready" && it["observed_role"] != "none").then_some(())
        })
        .await;
    }

    async fn answers(&self) {
        let body = chat::request("SmolLM2-135M-Instruct", "What is the capital of France?", 12, false);
        let answer = chat::ask(&self.url, &body).await;
        assert!(answer.contains("Paris"), "{answer}");
    }

    /// Whether some controller has logged this.
    async fn says(&self, words: &[&str]) {
        eventually(&format!("a controller that says {words:?}"), || async {
            let log = |index| fs::read_to_string(self.dir.path().join(format!("controller{index}.log"))).ok();
            let said = |log: String| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
            [0, 1].into_iter().filter_map(log).any(said).then_some(())
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

/// The index of the member that leads etcd.
async fn leading(members: &[EtcdServer]) -> usize {
    eventually("a member of etcd that leads", || async {
        for (index, member) in members.iter().enumerate().filter(|(_, member)| member.pid().is_some()) {
            let metrics = reqwest::get(format!("http://{}/metrics", member.endpoint()))
                .await
                .ok()?
                .text()
                .await
                .ok()?;
            if baton_integration_tests::metrics::sum(&metrics, "etcd_server_is_leader", "") == Some(1.0) {
                return Some(index);
            }
        }
        None
    })
    .await
}

fn sorted_epochs(roles: &[Value]) -> Vec<(String, u64)> {
    let entry =
        |view: &Value| (view["instance_id"].to_string(), view["observed_epoch"].as_u64().expect("a number"));
    let mut epochs: Vec<_> = roles.iter().map(entry).collect();
    epochs.sort();
    epochs
}

fn sorted_without(epochs: &[(String, u64)], name: &str) -> Vec<(String, u64)> {
    epochs.iter().filter(|(id, _)| !id.contains(name)).cloned().collect()
}

#[tokio::test]
async fn one_member_may_freeze_or_die_and_two_stop_changes_only() {
    let mut members = EtcdServer::start_cluster(3).await;
    let mut fleet = Fleet::start(&members).await;
    let before = sorted_epochs(&fleet.roles().await.expect("a leader"));

    // etcd's leader freezes, with all connections to it as they are: the others go on, roles can be given.
    let frozen = leading(&members).await;
    let frozen = members[frozen].pid().expect("it runs");
    process::signal(frozen, Signal::STOP);
    fleet.answers().await;
    fleet.server("gamma");
    fleet.serves("gamma").await;
    process::signal(frozen, Signal::CONT);
    let after = sorted_epochs(&fleet.roles().await.expect("a leader"));
    assert_eq!(sorted_without(&after, "gamma"), before, "nobody else was moved");

    // It dies, and the same holds.
    let first = leading(&members).await;
    members[first].kill();
    // Nobody can resume a watch from before this: whoever watched there lists again.
    compact(members.iter().find(|member| member.pid().is_some()).expect("two live")).await;
    fleet.answers().await;
    fleet.server("delta");
    fleet.serves("delta").await;
    let before = after;
    let after = sorted_epochs(&fleet.roles().await.expect("a leader"));
    assert_eq!(sorted_without(&after, "delta"), before, "nobody else was moved");

    // Without a majority nothing is changed, after a while nobody leads, and requests are answered all the same.
    let second = leading(&members).await;
    members[second].kill();
    eventually("controllers that lead no more", || async { fleet.roles().await.is_none().then_some(()) })
        .await;
    fleet.answers().await;
    fleet.server("epsilon");
    fleet.says(&["the state store cannot be reached"]).await;
    fleet.answers().await;

    for member in [first, second] {
        members[member].restart().await;
    }
    fleet.has_roles(&["decode", "decode", "decode", "prefill", "prefill"]).await;
    let epochs = sorted_epochs(&fleet.roles().await.expect("a leader"));
    let kept = epochs.iter().filter(|entry| after.contains(entry)).count();
    assert_eq!(kept, 4, "those that had a role keep it: {after:?}, {epochs:?}");
}

/// Forgets all history.
async fn compact(member: &EtcdServer) {
    let store = member.store();
    let listing = eventually("an etcd that can be read", || async {
        store.range(KeyRange::prefix(keys::ROOT)).await.ok()
    })
    .await;
    store.compact(listing.revision).await.expect("etcd compacts");
}

/// Fills etcd until it refuses, and says what the store made of that.
async fn fill(store: &dyn Store) -> StoreError {
    for index in 0..1000 {
        let txn = Txn::new().put(format!("/fill/{index}"), vec![7; 1 << 20], None);
        match store.txn(txn).await {
            Ok(_) => {}
            Err(error @ StoreError::Refused(_)) => return error,
            Err(error) => panic!("filling: {error}"),
        }
    }
    panic!("etcd has no quota");
}

/// What an operator does with etcdctl: compact, defragment, disarm.
async fn make_room(members: &[EtcdServer]) {
    let etcd = &members[0];
    let store = etcd.store();
    let Revision(revision) = store.txn(Txn::new().delete_prefix("/fill/")).await.expect("deleting").revision;
    let post_to = async |etcd: &EtcdServer, what: &str, body: Value| {
        let url = format!("http://{}/v3/{what}", etcd.endpoint());
        let answer = reqwest::Client::new().post(url).json(&body).send().await.expect("etcd answers");
        assert!(answer.status().is_success(), "{what}: {:?}", answer.text().await);
        answer.json::<Value>().await.expect("JSON")
    };
    post_to(etcd, "kv/compaction", json!({"revision": revision.to_string(), "physical": true})).await;
    for member in members {
        post_to(member, "maintenance/defragment", json!({})).await;
    }
    let alarms = post_to(etcd, "maintenance/alarm", json!({"action": "GET"})).await;
    for alarm in alarms["alarms"].as_array().expect("an alarm stands") {
        let member = &alarm["memberID"];
        let disarm = json!({"action": "DEACTIVATE", "memberID": member, "alarm": "NOSPACE"});
        post_to(etcd, "maintenance/alarm", disarm).await;
    }
}

#[tokio::test]
async fn a_full_etcd_is_called_by_its_name_and_stops_changes_only() {
    let quota = (24 << 20).to_string();
    let members = EtcdServer::start_cluster_with(3, &["--quota-backend-bytes", &quota]).await;
    let mut fleet = Fleet::start(&members).await;
    let store = members[0].store();

    let refused = fill(&store).await.to_string();
    for word in ["NOSPACE", "compact", "defragment", "disarm"] {
        assert!(refused.contains(word), "no {word} in: {refused}");
    }
    fleet.answers().await;
    // A third would be given a role, which cannot be written.
    fleet.server("gamma");
    fleet.says(&["NOSPACE", "disarm"]).await;
    fleet.answers().await;
    let roles = store.range(KeyRange::prefix(keys::ROLES)).await.expect("it can be read").items;
    assert_eq!(roles.len(), 2);

    // Nobody can take over while it is full, and traffic does not need that.
    process::signal(fleet.services[0].0.id(), Signal::KILL);
    process::signal(fleet.services[1].0.id(), Signal::KILL);
    fleet.answers().await;
    fleet.services.drain(..2);
    fleet.controllers_named("d");
    fleet.says(&["cannot stand for leadership", "NOSPACE", "disarm"]).await;
    fleet.answers().await;

    make_room(&members).await;
    fleet.has_roles(&["decode", "decode", "prefill"]).await;
}
