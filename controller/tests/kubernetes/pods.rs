//! What nodes would do: pods run and are ready, and in each there is a server that reports to the controller.
//!
//! Kubernetes 1.20 does not know deletion costs yet. So that it takes the pod that later versions would take, one whose
//! server serves nothing is said not to be ready: of those Kubernetes of any version takes the first.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use baton_proto::v1;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, WatchEvent, WatchParams},
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    DEPLOYMENT,
    cluster::{Server, spec, waiting},
    control_plane::NAMESPACE,
};

/// How long sequences go on after their server was told to serve nothing more.
const DRAIN: Duration = Duration::from_secs(2);
const COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// What is known of one server.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    serves: bool,
    drained: bool,
}

#[derive(Debug, Default)]
struct Shared {
    /// Requests a second of the whole group, in thousandths.
    demand: AtomicU64,
    servers: Mutex<BTreeMap<String, Seen>>,
    /// Those that went, and whether their server was drained.
    gone: Mutex<Vec<(String, bool)>>,
    /// Those whose pod has ever been marked as the one to delete.
    marked: Mutex<BTreeSet<String>>,
}

pub(crate) struct Pods {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

impl Pods {
    pub(crate) fn tend(client: Client, controller: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let marks = tokio::spawn(watch_marks(client.clone(), shared.clone()));
        let tended = tokio::spawn(tend(client, controller.to_owned(), shared.clone()));
        Self { shared, tasks: [marks, tended] }
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

    pub(crate) fn was_marked(&self, pod: &str) -> bool {
        self.shared.marked.lock().expect("no panic").contains(pod)
    }

    pub(crate) fn api(&self, client: Client) -> Api<Pod> {
        Api::namespaced(client, NAMESPACE)
    }

    pub(crate) async fn end(self) {
        for task in self.tasks {
            task.abort();
            task.await.ok();
        }
    }
}

struct Tended {
    server: JoinHandle<()>,
    ready: bool,
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

/// A mark stands for some milliseconds before its pod is gone.
async fn watch_marks(client: Client, shared: Arc<Shared>) {
    let pods: Api<Pod> = Api::namespaced(client, NAMESPACE);
    let params = WatchParams::default().labels(&of_deployment());
    loop {
        if let Ok(events) = pods.watch(&params, "0").await {
            let mut events = std::pin::pin!(events);
            while let Some(Ok(event)) = events.next().await {
                let (WatchEvent::Modified(pod) | WatchEvent::Deleted(pod)) = event else { continue };
                let cost = pod.metadata.annotations.as_ref().and_then(|all| all.get(COST));
                if cost.is_some_and(|cost| *cost == i32::MIN.to_string()) {
                    shared.marked.lock().expect("no panic").extend(pod.metadata.name);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
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
                let server = tokio::spawn(serve(name.clone(), controller.clone(), shared.clone()));
                Tended { server, ready: false }
            });
            let ready = seen.unwrap_or_default().serves;
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
async fn serve(name: String, controller: String, shared: Arc<Shared>) {
    let mut server = Server::join_any(&[&controller], spec(&name, 1), waiting()).await;
    let (mut load, mut drained_at) = (v1::InstanceLoad::default(), Instant::now());
    let (mut requests, mut last) = (0.0, Instant::now());
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
        load = count(load, requests, running);
        server.state.load = Some(load);
        // It has been taken off the list if its pod is gone.
        if let Some(seen) = shared.servers.lock().expect("no panic").get_mut(&name) {
            *seen = Seen { serves, drained: !running };
        }
        if let Some(None) = server.next_order(Duration::from_millis(100)).await {
            return;
        }
    }
}

/// Prompts of 100 tokens, of which an instance prefills 1,000 a second; completions of 10 that cost next to nothing.
fn count(load: v1::InstanceLoad, requests: f64, running: bool) -> v1::InstanceLoad {
    let requests = requests as u64;
    v1::InstanceLoad {
        running_sequences: running.into(),
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
