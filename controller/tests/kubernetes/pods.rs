//! What nodes would do: pods run, in each there is a server that reports to the controller, and a pod is as ready as its
//! server says: a server that is cordoned and drained is not. The later a pod came, the more its server has to do: so the
//! last is not who goes, but is whom Kubernetes would take of pods that are alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use baton_proto::v1;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    DEPLOYMENT,
    cluster::{Server, spec, waiting},
    control_plane::NAMESPACE,
};

/// How long a server must have said that it is not ready for its pod not to be: some probes.
const PROBES: Duration = Duration::from_secs(4);
/// How long sequences go on after their server was told to serve nothing more.
const DRAIN: Duration = Duration::from_secs(2);

/// What is known of one server.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    serves: bool,
    drained: bool,
    /// As a server of its kind says at `/readiness`.
    ready: bool,
}

#[derive(Debug, Default)]
struct Shared {
    /// Requests a second of the whole group, in thousandths.
    demand: AtomicU64,
    servers: Mutex<BTreeMap<String, Seen>>,
    /// Those that went, and whether their server was drained.
    gone: Mutex<Vec<(String, bool)>>,
    /// In the order in which they came.
    came: Mutex<Vec<String>>,
}

pub(crate) struct Pods {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Pods {
    pub(crate) fn tend(client: Client, controller: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(tend(client, controller.to_owned(), shared.clone()));
        Self { shared, task }
    }

    pub(crate) fn ask_for(&self, requests_per_second: f64) {
        self.shared.demand.store((requests_per_second * 1000.0) as u64, Ordering::Relaxed);
    }

    pub(crate) fn serving(&self) -> usize {
        self.shared.servers.lock().expect("no panic").values().filter(|seen| seen.serves).count()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.shared.servers.lock().expect("no panic").keys().cloned().collect()
    }

    /// Those that went, and whether their server was drained.
    pub(crate) fn gone(&self) -> Vec<(String, bool)> {
        self.shared.gone.lock().expect("no panic").clone()
    }

    /// The one that came last.
    pub(crate) fn last(&self) -> Option<String> {
        self.shared.came.lock().expect("no panic").last().cloned()
    }

    pub(crate) fn api(&self, client: Client) -> Api<Pod> {
        Api::namespaced(client, NAMESPACE)
    }

    pub(crate) async fn end(self) {
        self.task.abort();
        self.task.await.ok();
    }
}

struct Tended {
    server: JoinHandle<()>,
    ready: bool,
    /// When its server last was.
    was_ready: Instant,
}

impl Drop for Tended {
    fn drop(&mut self) {
        // Its session ends, as when a process is killed.
        self.server.abort();
    }
}

fn of_deployment() -> String {
    format!("app={DEPLOYMENT}")
}

async fn tend(client: Client, controller: String, shared: Arc<Shared>) {
    let pods: Api<Pod> = Api::namespaced(client, NAMESPACE);
    let params = ListParams::default().labels(&of_deployment());
    let mut tended: BTreeMap<String, Tended> = BTreeMap::new();
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        // It may be down for a while.
        let Ok(list) = pods.list(&params).await else { continue };
        let there: BTreeSet<String> = list.items.into_iter().filter_map(|pod| pod.metadata.name).collect();
        let (here, went): (BTreeMap<_, _>, BTreeMap<_, _>) =
            tended.into_iter().partition(|(name, _)| there.contains(name));
        tended = here;
        for name in went.into_keys() {
            let drained = shared.servers.lock().expect("no panic").remove(&name).is_some_and(|it| it.drained);
            shared.gone.lock().expect("no panic").push((name, drained));
        }
        for name in there {
            let seen = shared.servers.lock().expect("no panic").get(&name).copied();
            let one = tended.entry(name.clone()).or_insert_with(|| {
                shared.servers.lock().expect("no panic").insert(name.clone(), Seen::default());
                let number = {
                    let mut came = shared.came.lock().expect("no panic");
                    came.push(name.clone());
                    came.len()
                };
                let server = tokio::spawn(serve(name.clone(), number, controller.clone(), shared.clone()));
                Tended { server, ready: false, was_ready: Instant::now() }
            });
            let own = seen.unwrap_or_default().ready;
            if own {
                one.was_ready = Instant::now();
            }
            let ready = own || (one.ready && one.was_ready.elapsed() < PROBES);
            if one.ready != ready {
                let condition = json!({"type": "Ready", "status": if ready { "True" } else { "False" }});
                let status = json!({"status": {"phase": "Running", "conditions": [condition]}});
                let patched = pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await;
                if patched.is_ok() {
                    one.ready = ready;
                }
            }
        }
    }
}

/// A server that obeys and counts what is asked of it.
async fn serve(name: String, number: usize, controller: String, shared: Arc<Shared>) {
    let mut server = Server::join_any(&[&controller], spec(&name, 1), waiting()).await;
    let (mut load, mut drained_at) = (v1::InstanceLoad::default(), Instant::now());
    let (mut requests, mut last) = (0.0, Instant::now());
    let mut cordoned = false;
    loop {
        let all = shared.servers.lock().expect("no panic").len().max(1) as f64;
        let rate = shared.demand.load(Ordering::Relaxed) as f64 / 1000.0;
        requests += rate / all * last.elapsed().as_secs_f64();
        last = Instant::now();
        let serves = server.state.role() != v1::Role::None;
        if serves {
            drained_at = Instant::now() + DRAIN;
        }
        let running = serves || Instant::now() < drained_at;
        load = count(load, requests, if running { number } else { 0 });
        server.state.load = Some(load);
        // It has been taken off the list if its pod is gone.
        if let Some(seen) = shared.servers.lock().expect("no panic").get_mut(&name) {
            *seen = Seen { serves, drained: !running, ready: running || !cordoned };
        }
        match server.next_order(Duration::from_millis(100)).await {
            Some(Some(assign)) => cordoned = assign.cordoned,
            Some(None) => return,
            None => {}
        }
    }
}

/// Prompts of 100 tokens, of which an instance prefills 1,000 a second; completions of 10 that cost next to nothing.
fn count(load: v1::InstanceLoad, requests: f64, running: usize) -> v1::InstanceLoad {
    let requests = requests as u64;
    v1::InstanceLoad {
        running_sequences: running as u32,
        kv_blocks_total: 10_000,
        kv_blocks_free: 10_000,
        prefill_tokens_per_second: 1000,
        decode_step_micros: 1000,
        max_sequences: 64,
        accepted_requests: requests,
        accepted_prompt_tokens: requests * 100,
        accepted_choices: requests,
        prefilled_requests: requests,
        prefilled_tokens: requests * 100,
        finished_requests: requests,
        finished_tokens: requests * 10,
        decoded_tokens: requests * 10,
        decode_steps: requests * 10,
        progress: load.progress + 1,
        ..load
    }
}
