//! API keys as clients meet them: who is let in, within which limits, and what becomes of both while requests run.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::http::{HeaderMap, header};
use baton_coordinator::{
    CoordinatorConfig,
    config::ApiKeysConfig,
    keys::{Keys, Source},
    metrics::Metrics,
};
use baton_process::Essential;
use baton_proto::{ApiKey, ApiKeyName, ErrorCode, KeyHash, KeyLimits, TenantName, v1};
use baton_registry::{Store, Txn, keys as layout, records, testing::EtcdServer};
use parking_lot::Mutex;
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing_subscriber::{fmt::MakeWriter, layer::SubscriberExt};
use v1::FinishReason;

use crate::{
    bodies::Upload,
    scripted::{Cluster, Instance, PATIENCE, merge, until},
};

/// A file of keys; a key's secret is `secret-of-` and its name.
struct File {
    directory: TempDir,
}

fn secret(name: &str) -> String {
    format!("secret-of-{name}")
}

fn entry(name: &str, more: &str) -> String {
    let hash = KeyHash::of(&secret(name)).to_hex();
    format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{hash}\"\n{more}\n")
}

impl File {
    fn new(text: &str) -> Self {
        let file = Self { directory: tempfile::tempdir().expect("a directory") };
        file.write(text);
        file
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("keys.toml")
    }

    /// In one go, as operators are told to.
    fn write(&self, text: &str) {
        let aside: &Path = &self.directory.path().join("aside");
        std::fs::write(aside, text).expect("is written");
        std::fs::rename(aside, self.path()).expect("is put in place");
    }

    async fn cluster(&self) -> (Cluster, Instance) {
        let file = self.path().to_str().expect("is text").to_owned();
        cluster(|config| config.api_keys.file = file).await
    }
}

async fn cluster(configure: impl FnOnce(&mut CoordinatorConfig)) -> (Cluster, Instance) {
    let (cluster, [mixed]) = Cluster::start([("m", v1::Role::Mixed)], configure).await;
    (cluster, mixed)
}

fn completion(cluster: &Cluster, name: &str, more: Value) -> RequestBuilder {
    let mut body = json!({"model": "tiny", "prompt": "0123456789", "max_tokens": 10});
    merge(&mut body, more);
    let request = cluster.client.post(format!("{}/v1/completions", cluster.url)).bearer_auth(secret(name));
    // One that is let in where it should not be is answered by nobody.
    request.timeout(PATIENCE).body(body.to_string())
}

/// Sends it, in a task.
fn sent(request: RequestBuilder) -> tokio::task::JoinHandle<Response> {
    tokio::spawn(async move { request.send().await.expect("an answer") })
}

/// Sends it and answers it with one token.
async fn answered(cluster: &Cluster, instance: &mut Instance, name: &str) -> Response {
    let request = sent(completion(cluster, name, json!({})));
    let leg = instance.dispatch().await.leg;
    instance.finish(leg, 0, "x", FinishReason::Stop);
    let response = request.await.expect("ends");
    assert_eq!(response.status(), 200, "{name}");
    response
}

/// The status and the code of an answer that is an error.
async fn refusal(request: RequestBuilder) -> (u16, String) {
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    let body: Value = response.json().await.expect("is JSON");
    (status, body["error"]["code"].as_str().unwrap_or_default().to_owned())
}

fn told<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map(|value| value.to_str().expect("is text")).unwrap_or_default()
}

async fn metric(cluster: &Cluster, line: &str) -> bool {
    let shown = cluster.get("/metrics").await.text().await.expect("is read");
    shown.lines().any(|shown| shown == line)
}

/// Waits until a request of this key is answered so; it must be one that no instance is needed for.
async fn until_refused_as(cluster: &Cluster, name: &str, code: &str) {
    let wait = async {
        while refusal(completion(cluster, name, json!({"model": "none"}))).await.1 != code {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{name} never got {code}"));
}

#[tokio::test]
async fn a_stranger_who_sends_all_before_looking_sees_that_a_key_is_asked_for() {
    let (cluster, _mixed) = File::new(&entry("a", "")).cluster().await;
    let long = vec![b'u'; 7 << 20];
    let length = format!("content-length: {}", long.len());
    for path in ["/v1/completions", "/v1/nowhere"] {
        assert_eq!(Upload::to(&cluster, path, &length, &long).await.answer().await.0, 401, "{path}");
    }
}

#[tokio::test]
async fn nothing_of_the_api_is_reached_without_a_key_that_is_known() {
    let file = File::new(&entry("alice", ""));
    let (cluster, mut mixed) = file.cluster().await;
    for path in
        ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/tiny", "/v1/none", "/v1"]
    {
        let url = format!("{}{path}", cluster.url);
        let without = cluster.client.post(&url).body("{}").send().await.expect("an answer");
        assert_eq!(
            (without.status().as_u16(), told(&without, "www-authenticate")),
            (401, "Bearer"),
            "{path}"
        );
        assert!(!told(&without, "x-request-id").is_empty());
        let error: Value = without.json().await.expect("is JSON");
        assert_eq!(error["error"]["type"], "invalid_request_error");
        assert_eq!(error["error"]["code"], "invalid_api_key");
        let unknown = refusal(cluster.client.get(&url).bearer_auth("sk-nobody's")).await;
        assert_eq!(unknown, (401, "invalid_api_key".to_owned()), "{path}");
        let known = cluster.client.get(&url).bearer_auth(secret("alice")).send().await.expect("an answer");
        assert_ne!(known.status(), 401, "{path}");
    }
    for path in ["/health", "/readiness", "/metrics"] {
        assert_eq!(cluster.get(path).await.status(), 200, "{path}");
    }
    let response = answered(&cluster, &mut mixed, "alice").await;
    assert_eq!(told(&response, "x-ratelimit-limit-requests"), "", "it has no limits");
    for line in [
        "baton_coordinator_api_keys 1",
        "baton_coordinator_api_key_refusals_total{tenant=\"\",reason=\"missing\"} 6",
        "baton_coordinator_api_key_refusals_total{tenant=\"\",reason=\"unknown\"} 6",
        "baton_coordinator_requests_total{route=\"/v1/completions\",code=\"invalid_api_key\",model=\"\"} 2",
        "baton_coordinator_tenant_requests_total{tenant=\"alice\"} 1",
        "baton_coordinator_tenant_prompt_tokens_total{tenant=\"alice\"} 10",
        "baton_coordinator_tenant_generation_tokens_total{tenant=\"alice\"} 1",
    ] {
        assert!(metric(&cluster, line).await, "{line}");
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn without_a_source_of_keys_everybody_is_let_in() {
    let (cluster, mut mixed) = cluster(|_| {}).await;
    assert_eq!(cluster.get("/v1/models").await.status(), 200);
    let response = answered(&cluster, &mut mixed, "whoever").await;
    assert!(response.headers().keys().all(|name| !name.as_str().starts_with("x-ratelimit")));
}

#[tokio::test]
async fn a_key_is_revoked_by_its_file_while_its_stream_goes_on() {
    let file = File::new(&(entry("old", "tenant = \"alice\"") + &entry("new", "tenant = \"alice\"")));
    let (cluster, mut mixed) = file.cluster().await;
    // Two keys of a tenant are good at the same time: one takes over from the other.
    answered(&cluster, &mut mixed, "new").await;
    let stream = sent(completion(&cluster, "old", json!({"stream": true})));
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "a");
    file.write(&entry("new", "tenant = \"alice\""));
    until_refused_as(&cluster, "old", "invalid_api_key").await;
    mixed.finish(leg, 1, "b", FinishReason::Stop);
    let body = stream.await.expect("ends").text().await.expect("is read");
    assert!(body.contains("\"b\"") && body.ends_with("data: [DONE]\n\n"), "{body}");
    answered(&cluster, &mut mixed, "new").await;

    // A bad file takes nobody's key away, and a good one ends that.
    file.write("[[keys]]\nname = \"other\"\n");
    until("it was looked at", || cluster.service.metrics.keys.not_renewed.get() == 1).await;
    answered(&cluster, &mut mixed, "new").await;
    file.write(&(entry("new", "tenant = \"alice\"") + &entry("other", "")));
    until_refused_as(&cluster, "other", "model_not_found").await;
    answered(&cluster, &mut mixed, "new").await;
    cluster.at_rest().await;
}

fn stored(name: &str, limits: KeyLimits) -> Txn {
    let name = ApiKeyName::new(name).expect("a good name");
    let key = ApiKey {
        tenant: TenantName::new("alice").expect("a good name"),
        hash: KeyHash::of(&secret(name.as_str())),
        limits,
        band: Default::default(),
        weight: ApiKey::WEIGHT,
        expires_unix_seconds: None,
        created_by: String::new(),
        created_unix_millis: 0,
        name,
    };
    Txn::new().put(layout::api_key(&key.name), records::encode_api_key(&key), None)
}

#[tokio::test]
async fn keys_in_the_store_come_and_go_while_requests_run() {
    let (cluster, mut mixed) = cluster(|config| config.api_keys.store = true).await;
    until_refused_as(&cluster, "first", "invalid_api_key").await;
    cluster.store.txn(stored("first", KeyLimits::default())).await.expect("is stored");
    until_refused_as(&cluster, "first", "model_not_found").await;
    cluster.store.txn(stored("second", KeyLimits::default())).await.expect("is stored");
    until_refused_as(&cluster, "second", "model_not_found").await;

    let running = sent(completion(&cluster, "first", json!({})));
    let leg = mixed.dispatch().await.leg;
    let first = ApiKeyName::new("first").expect("a good name");
    cluster.store.txn(Txn::new().delete(layout::api_key(&first))).await.expect("is deleted");
    until_refused_as(&cluster, "first", "invalid_api_key").await;
    mixed.finish(leg, 0, "x", FinishReason::Stop);
    assert_eq!(running.await.expect("ends").status(), 200);
    // One that says what nobody understands lets nobody in, and disturbs no other.
    let second = ApiKeyName::new("second").expect("a good name");
    let third = ApiKeyName::new("third").expect("a good name");
    let spoil = Txn::new().put(layout::api_key(&third), &b"\xff"[..], None);
    cluster.store.txn(spoil).await.expect("is stored");
    answered(&cluster, &mut mixed, "second").await;
    let spoil = Txn::new().put(layout::api_key(&second), &b"\xff"[..], None);
    cluster.store.txn(spoil).await.expect("is stored");
    until_refused_as(&cluster, "second", "invalid_api_key").await;
    cluster.at_rest().await;
}

#[tokio::test]
async fn losing_etcd_takes_nobodys_key_away_and_before_it_is_read_nobody_is_let_in() {
    let mut etcd = EtcdServer::start().await;
    let store: Arc<dyn Store> = Arc::new(etcd.store());
    store.txn(stored("first", KeyLimits::default())).await.expect("is stored");
    etcd.kill();
    let metrics = baton_process::Metrics::new("coordinator").register(Metrics::register);
    let shutdown = CancellationToken::new();
    let essential = Essential::new(TaskTracker::new(), shutdown.clone());
    let source = Source::Store(store.clone());
    let keys = Keys::start(source, &ApiKeysConfig::default(), metrics.clone(), shutdown.clone(), &essential);
    let by = |name: &str| {
        let value = format!("Bearer {}", secret(name)).parse().expect("a header");
        keys.caller(&mut HeaderMap::from_iter([(header::AUTHORIZATION, value)])).map_err(|error| error.code)
    };
    assert_eq!(by("first").expect_err("nobody knows yet"), ErrorCode::Unavailable);
    etcd.restart().await;
    tokio::time::timeout(PATIENCE, keys.known()).await.expect("they are read");
    by("first").expect("is known");

    etcd.kill();
    until("the watch has broken", || metrics.keys.not_renewed.get() > 0).await;
    by("first").expect("is known still");
    etcd.restart().await;
    let first = ApiKeyName::new("first").expect("a good name");
    let change = stored("second", KeyLimits::default()).delete(layout::api_key(&first));
    let changed = async {
        while store.txn(change.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, changed).await.expect("etcd is back");
    until("what came meanwhile is known", || by("second").is_ok()).await;
    assert_eq!(by("first").expect_err("was revoked"), ErrorCode::InvalidApiKey);
    shutdown.cancel();
}

#[tokio::test]
async fn over_its_requests_a_minute_a_key_is_told_when_to_come_again() {
    let file =
        File::new(&(entry("alice", "requests_per_minute = 3") + &entry("bob", "requests_per_minute = 3")));
    let (cluster, mut mixed) = file.cluster().await;
    let first = answered(&cluster, &mut mixed, "alice").await;
    assert_eq!(told(&first, "x-ratelimit-limit-requests"), "3");
    assert_eq!(told(&first, "x-ratelimit-remaining-requests"), "2");
    assert!(told(&first, "x-ratelimit-reset-requests").ends_with('s'), "{first:?}");
    // One that is refused for another reason counts.
    assert_eq!(refusal(completion(&cluster, "alice", json!({"model": "none"}))).await.0, 404);
    answered(&cluster, &mut mixed, "alice").await;
    let over = completion(&cluster, "alice", json!({})).send().await.expect("an answer");
    assert_eq!((over.status().as_u16(), told(&over, "x-ratelimit-remaining-requests")), (429, "0"));
    let wait: u64 = told(&over, "retry-after").parse().expect("seconds");
    assert!((10..=20).contains(&wait), "{wait}");
    let error: Value = over.json().await.expect("is JSON");
    assert_eq!(
        (&error["error"]["code"], &error["error"]["type"]),
        (&json!("rate_limit_exceeded"), &json!("rate_limit_error"))
    );
    // The models may be listed, and another tenant notices nothing.
    let list = cluster.client.get(format!("{}/v1/models", cluster.url)).bearer_auth(secret("alice"));
    assert_eq!(list.send().await.expect("an answer").status(), 200);
    let other = answered(&cluster, &mut mixed, "bob").await;
    assert_eq!(told(&other, "x-ratelimit-remaining-requests"), "2");
    let line = "baton_coordinator_api_key_refusals_total{tenant=\"alice\",reason=\"requests\"} 1";
    assert!(metric(&cluster, line).await);
    cluster.at_rest().await;
}

#[tokio::test]
async fn tokens_a_minute_are_held_while_a_request_runs_and_settled_as_it_ends() {
    let file = File::new(&entry("alice", "tokens_per_minute = 100"));
    let (cluster, mut mixed) = file.cluster().await;
    let large = json!({"max_tokens": 80});
    let running = sent(completion(&cluster, "alice", large.clone()));
    let leg = mixed.dispatch().await.leg;
    let over = completion(&cluster, "alice", json!({})).send().await.expect("an answer");
    assert_eq!((over.status().as_u16(), told(&over, "x-ratelimit-limit-tokens")), (429, "100"));
    assert_eq!(told(&over, "x-ratelimit-remaining-tokens"), "10");
    let wait: u64 = told(&over, "retry-after").parse().expect("seconds");
    assert!((1..=6).contains(&wait), "{wait}");
    mixed.finish(leg, 0, "x", FinishReason::Stop);
    let response = running.await.expect("ends");
    assert_eq!(response.status(), 200);
    // 10 and 1 were used of it, so that there is room again.
    let stream = sent(completion(&cluster, "alice", json!({"max_tokens": 70, "stream": true})));
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "abcde");
    let mut stream = stream.await.expect("begins");
    assert!(stream.chunk().await.expect("is read").is_some());
    // The client leaves: 15 were used, and the rest is free.
    drop(stream);
    assert_eq!(mixed.cancelled().await.leg, leg);
    cluster.at_rest().await;
    let asked = completion(&cluster, "alice", json!({"model": "none"})).send().await.expect("an answer");
    let left: u32 = told(&asked, "x-ratelimit-remaining-tokens").parse().expect("a number");
    assert!((74..90).contains(&left), "{left}");
    let never =
        completion(&cluster, "alice", json!({"prompt": "x".repeat(100)})).send().await.expect("an answer");
    assert_eq!((never.status().as_u16(), told(&never, "x-should-retry")), (429, "false"));
    assert_eq!(told(&never, "retry-after"), "");
}

#[tokio::test]
async fn a_key_has_so_many_requests_at_a_time() {
    let file = File::new(&entry("alice", "concurrent = 1"));
    let (cluster, mut mixed) = file.cluster().await;
    let running = sent(completion(&cluster, "alice", json!({})));
    let leg = mixed.dispatch().await.leg;
    let over = completion(&cluster, "alice", json!({})).send().await.expect("an answer");
    assert_eq!((over.status().as_u16(), told(&over, "retry-after")), (429, "1"));
    mixed.finish(leg, 0, "x", FinishReason::Stop);
    assert_eq!(running.await.expect("ends").status(), 200);
    // Nor does a client that leaves keep its place.
    let left = sent(completion(&cluster, "alice", json!({})));
    let leg = mixed.dispatch().await.leg;
    left.abort();
    assert_eq!(mixed.cancelled().await.leg, leg);
    cluster.at_rest().await;
    answered(&cluster, &mut mixed, "alice").await;
}

#[tokio::test]
async fn each_tenants_requests_are_computed_in_the_order_of_its_band() {
    let bands = [("first", "interactive"), ("second", "standard"), ("last", "batch")];
    let text: String = bands.iter().map(|(name, band)| entry(name, &format!("band = \"{band}\""))).collect();
    let file = File::new(&text);
    let (cluster, mut mixed) = file.cluster().await;
    let mut priorities = Vec::new();
    for (name, _) in bands {
        for priority in [-2_000_000_000, 0, 2_000_000_000] {
            let request = sent(completion(&cluster, name, json!({"priority": priority})));
            let dispatch = mixed.dispatch().await;
            let listed = cluster.service.roster.list();
            assert_eq!(&*listed[0].api_key, name, "operators see whose it is");
            mixed.finish(dispatch.leg, 0, "x", FinishReason::Stop);
            assert_eq!(request.await.expect("ends").status(), 200);
            priorities.push(dispatch.priority);
        }
    }
    // Within its band a request may ask to be behind others, not before them.
    let expected = [-1, 0, 1].map(|band: i32| [band << 30, band << 30, (band << 30) + (1 << 29) - 1]);
    assert_eq!(priorities, expected.as_flattened());
    for (name, _) in bands {
        let line = format!("baton_coordinator_tenant_requests_total{{tenant=\"{name}\"}} 3");
        assert!(metric(&cluster, &line).await, "{line}");
    }
}

/// What is logged, of every kind, to be read by the test.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn no_log_line_and_no_answer_carries_a_key() {
    let log = Log::default();
    let lines = tracing_subscriber::fmt::layer().with_writer(log.clone()).with_ansi(false);
    // Of a single subscriber tracing asks that of the thread that comes first, which may be another test's; of two it asks
    // both.
    let _another = tracing::Dispatch::new(tracing_subscriber::registry());
    let _heard = tracing::subscriber::set_default(tracing_subscriber::registry().with(lines));
    let file = File::new(&entry("alice", "requests_per_minute = 2"));
    let (cluster, mut mixed) = file.cluster().await;
    answered(&cluster, &mut mixed, "alice").await;
    let mut said = String::new();
    for (name, more) in [("alice", json!({"model": "none"})), ("alice", json!({})), ("nobody", json!({}))] {
        let response = completion(&cluster, name, more).send().await.expect("an answer");
        said += &format!("{:?}", response.headers());
        said += &response.text().await.expect("is read");
    }
    // Who puts the key itself where its hash belongs is not repeated.
    file.write(&format!("[[keys]]\nname = \"alice\"\nsha256 = \"{}\"\n", secret("alice")));
    until("it was looked at", || cluster.service.metrics.keys.not_renewed.get() == 1).await;
    said += &cluster.get("/metrics").await.text().await.expect("is read");
    // The client of this test logs, too; what it does with its headers is its own affair.
    let heard = String::from_utf8(log.0.lock().clone()).expect("is text");
    let ours: Vec<&str> = heard.lines().filter(|line| line.contains(" baton_")).collect();
    assert!(ours.iter().any(|line| line.contains("api_key=\"alice\"")), "{heard}");
    assert!(ours.iter().any(|line| line.contains("invalid_api_key")), "{heard}");
    assert!(ours.iter().any(|line| line.contains("see to their file")), "{heard}");
    for name in ["alice", "nobody"] {
        let hash = KeyHash::of(&secret(name)).to_hex();
        for shown in [secret(name), hash] {
            assert!(!heard.contains(&shown) && !said.contains(&shown), "{shown} in {heard}{said}");
        }
    }
}
