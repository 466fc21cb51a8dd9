//! The binary itself, as two processes on a real etcd: one is frozen past its lease and wakes up deposed.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use baton_proto::v1::{self, fleet_admin_client::FleetAdminClient};
use baton_registry::{DesiredRole, KeyRange, LeaderRecord, Store, keys, testing::EtcdServer};
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::{PATIENCE, Server, spec, waiting};

/// Lines of its log that a controller is remembered by.
const LINES_KEPT: usize = 200;

/// A `baton-controller`, killed when dropped; a test that fails tells what it has logged.
pub(crate) struct Controller {
    id: String,
    child: Child,
    log: Arc<Mutex<VecDeque<String>>>,
    pub(crate) endpoint: String,
}

impl Controller {
    pub(crate) fn start(id: &str, etcd: &EtcdServer) -> Self {
        Self::start_with(id, etcd, "2s")
    }

    /// One that leads under a lease of `ttl`.
    pub(crate) fn start_with(id: &str, etcd: &EtcdServer, ttl: &str) -> Self {
        let settings = [
            format!("controller_id={id}"),
            "listen=127.0.0.1:0".into(),
            "metrics_listen=127.0.0.1:0".into(),
            "store.kind=etcd".into(),
            format!("store.etcd.endpoints=[\"{}\"]", etcd.endpoint()),
            format!("leader.ttl={ttl}"),
            "sessions.beat=100ms".into(),
            "sessions.lease=1s".into(),
            "roles.settle=200ms".into(),
            "process.log.format=json".into(),
        ];
        let mut child = Command::new(env!("CARGO_BIN_EXE_baton-controller"))
            .args(settings.iter().flat_map(|setting| ["--set", setting]))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cannot start baton-controller");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("\"address\":\"")?;
            rest.split_once('"').map(|(address, _)| address.to_owned())
        });
        // Read on, so that the process never waits for room in the pipe.
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut kept = kept.lock().expect("nobody panics with it");
                kept.push_back(line);
                if kept.len() > LINES_KEPT {
                    kept.pop_front();
                }
            }
        });
        let endpoint = address.expect("baton-controller did not say where it listens");
        Self { id: id.into(), child, log, endpoint }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")).expect("a pid");
        kill_process(pid, signal).expect("it lives");
    }

    pub(crate) async fn roles(&self) -> Result<Vec<v1::RoleView>, tonic::Status> {
        let client = FleetAdminClient::connect(format!("http://{}", self.endpoint)).await;
        let mut client = client.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        Ok(client.list_roles(v1::ListRolesRequest {}).await?.into_inner().roles)
    }

    pub(crate) async fn leads(&self) {
        let until = Instant::now() + PATIENCE;
        while self.roles().await.is_err() {
            assert!(Instant::now() < until, "it never leads");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = self.log.lock().expect("nobody panics with it");
            println!("{} logged last:", self.id);
            log.iter().for_each(|line| println!("  {line}"));
        }
    }
}

async fn role_in(store: &dyn Store, key: &str) -> DesiredRole {
    let item = store.range(KeyRange::exact(key)).await.expect("range").items.remove(0);
    DesiredRole::decode(&item.value).expect("a role")
}

#[tokio::test]
async fn a_frozen_leader_wakes_up_deposed_and_changes_nothing() {
    let etcd = EtcdServer::start().await;
    let store = etcd.store();
    let first = Controller::start("c1", &etcd);
    first.leads().await;
    let second = Controller::start("c2", &etcd);
    let mut a = Server::join(&first.endpoint, spec("a", 1), waiting()).await;
    let mut b = Server::join(&first.endpoint, spec("b", 1), waiting()).await;
    let before = (a.next_role().await, b.next_role().await);

    first.signal(Signal::STOP);
    let frozen = Instant::now();
    let mut a = Server::join_any(&[&second.endpoint], spec("a", 1), a.state).await;
    let took = frozen.elapsed();
    assert!(took < Duration::from_secs(5), "taken over after {took:?}");
    let b_new = Server::join_any(&[&second.endpoint], spec("b", 1), b.state).await;
    // The new leader decides something that the old one knows nothing of.
    b_new.bye().await;
    let alone = a.next_role().await;
    assert_eq!(alone.role(), v1::Role::Mixed);
    assert!(alone.epoch > before.0.epoch);
    let decided = role_in(&store, "/baton/v1/roles/a").await;
    let revision = store.range(KeyRange::prefix(keys::ROOT)).await.expect("range").revision;

    first.signal(Signal::CONT);
    // The old sessions end: whatever the old leader would still say, nobody hears it.
    assert_eq!(b.next_order(PATIENCE).await, Some(None));
    let until = Instant::now() + PATIENCE;
    let refusal = loop {
        match first.roles().await {
            Err(status) if status.message().contains("does not lead") => break status,
            _ => assert!(Instant::now() < until, "it still leads"),
        }
    };
    assert!(refusal.message().contains(&second.endpoint), "{}", refusal.message());
    a.hear_nothing(Duration::from_millis(1500)).await;
    assert_eq!(role_in(&store, "/baton/v1/roles/a").await, decided);
    let leader = store.range(KeyRange::exact(keys::LEADER)).await.expect("range").items.remove(0);
    assert_eq!(LeaderRecord::decode(&leader.value).expect("a record").controller_id, "c2");
    let now = store.range(KeyRange::prefix(keys::ROOT)).await.expect("range");
    assert!(now.items.iter().all(|item| item.mod_revision <= revision || item.key.starts_with(keys::STATUS)));
}
