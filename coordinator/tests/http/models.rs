//! Several models behind one coordinator: each request at its own, whatever becomes of the others.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use baton_coordinator::{
    CoordinatorConfig, CoordinatorError, Parts, assemble, keys::Source, prepare::Served,
};
use baton_process::{Essential, HealthHandle, Tls, access::Access};
use baton_proto::v1;
use baton_registry::{FleetWatch, FleetWatchConfig, MemoryConfig, MemoryStore, Revision};
use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use v1::FinishReason;

use crate::scripted::{
    Cluster, Instance, PATIENCE, Watched, answer, chat_text, events, other, prompt_of, served, until,
};

/// A pair that runs `tiny`, and an instance that runs `other`.
const ROLES: [(&str, v1::Role, usize); 3] =
    [("p", v1::Role::Prefill, 0), ("d", v1::Role::Decode, 0), ("m", v1::Role::Mixed, 1)];

async fn both(configure: impl FnOnce(&mut CoordinatorConfig)) -> (Cluster, [Instance; 3]) {
    Cluster::start_models(vec![served(), other()], ROLES, configure).await
}

async fn error_of(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.expect("is JSON");
    (status, body["error"].clone())
}

async fn readiness(cluster: &Cluster) -> (u16, String) {
    let response = cluster.get("/readiness").await;
    let status = response.status().as_u16();
    let body: Value = response.json().await.expect("is JSON");
    (status, body["status"].as_str().expect("text").to_owned())
}

async fn has_metric(cluster: &Cluster, line: &str) {
    let metrics = cluster.get("/metrics").await.text().await.expect("text");
    assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
}

#[tokio::test]
async fn each_request_goes_to_the_instances_of_its_model() {
    let (cluster, [mut prefill, mut decode, mut mixed]) = both(|_| {}).await;
    assert_eq!(readiness(&cluster).await, (200, "ready".into()));
    let one = cluster.chat(json!({}));
    answer(&mut prefill, &mut decode, "one").await;
    let one: Value = one.await.expect("ends").json().await.expect("is JSON");
    assert_eq!((&one["model"], &one["choices"][0]["message"]["content"]), (&json!("tiny"), &json!("one")));

    let mut prints = vec![one["system_fingerprint"].clone()];
    for name in ["other", "alias"] {
        let response = cluster.chat(json!({"model": name, "stream": true}));
        let dispatch = mixed.dispatch().await;
        assert_eq!(dispatch.model, "other");
        mixed.finish(dispatch.leg, 0, "two", FinishReason::Stop);
        let body = response.await.expect("ends").text().await.expect("a body");
        let events = events(&body);
        assert_eq!(chat_text(&events), "two");
        let chunk: Value = serde_json::from_str(events[0]).expect("is JSON");
        assert_eq!(chunk["model"], "other", "answers say the model's name, not the alias");
        prints.push(chunk["system_fingerprint"].clone());
    }
    assert!(prints[0] != prints[1] && prints[1] == prints[2], "{prints:?}");
    assert!(prefill.is_quiet() && decode.is_quiet() && mixed.is_quiet());
    cluster.at_rest().await;
    for line in [
        "baton_coordinator_requests_total{route=\"/v1/chat/completions\",code=\"200\",model=\"tiny\"} 1",
        "baton_coordinator_requests_total{route=\"/v1/chat/completions\",code=\"200\",model=\"other\"} 2",
        "baton_coordinator_generation_tokens_total{model=\"other\"} 6",
        "baton_coordinator_model_ready{model=\"other\"} 1",
    ] {
        has_metric(&cluster, line).await;
    }
}

#[tokio::test]
async fn names_are_listed_and_others_are_not_found() {
    let (cluster, _instances) = both(|_| {}).await;
    let listed: Value = cluster.get("/v1/models").await.json().await.expect("is JSON");
    let field = |entry: &Value, key: &str| entry[key].as_str().expect("text").to_owned();
    let names: Vec<_> = listed["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| (field(entry, "id"), field(entry, "root")))
        .collect();
    let expected = [("tiny", "tiny"), ("other", "other"), ("alias", "other")];
    assert_eq!(names, expected.map(|(id, root)| (id.to_owned(), root.to_owned())));
    for (name, context) in [("tiny", 1000), ("other", 2000), ("alias", 2000)] {
        let entry: Value = cluster.get(&format!("/v1/models/{name}")).await.json().await.expect("is JSON");
        assert_eq!((&entry["id"], &entry["max_model_len"]), (&json!(name), &json!(context)));
    }

    // Support is asked with it, whatever was answered.
    for path in ["/v1/models", "/v1/models/tiny", "/v1/models/third", "/v1/third", "/v1/completions"] {
        let response =
            cluster.client.get(format!("{}{path}", cluster.url)).header("x-request-id", "mine").send();
        assert_eq!(response.await.expect("ends").headers()["x-request-id"], "mine", "{path}");
    }

    let listing = "`tiny`, `other`, `alias`";
    let (status, error) = error_of(cluster.get("/v1/models/third").await).await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    assert!(error["message"].as_str().expect("text").contains(listing), "{error}");
    let (status, error) = error_of(cluster.chat(json!({"model": "third"})).await.expect("ends")).await;
    assert_eq!((status, &error["code"], &error["param"]), (404, &json!("model_not_found"), &json!("model")));
    assert!(error["message"].as_str().expect("text").contains(listing), "{error}");
    let (status, error) = error_of(cluster.chat(json!({"model": null})).await.expect("ends")).await;
    assert_eq!((status, &error["code"], &error["param"]), (400, &json!("invalid_value"), &json!("model")));
    assert!(error["message"].as_str().expect("text").contains(listing), "{error}");
    has_metric(
        &cluster,
        "baton_coordinator_requests_total{route=\"/v1/chat/completions\",code=\"model_not_found\",model=\"\"} 1",
    )
    .await;
    cluster.at_rest().await;
}

#[tokio::test]
async fn limits_and_text_are_those_of_the_model() {
    let (cluster, [_, _, mut mixed]) = both(|_| {}).await;
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(1200)}], "max_tokens": 1});
    let refused = cluster.chat(long.clone()).await.expect("ends");
    let (status, error) = error_of(refused).await;
    assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")));
    let mut body = long;
    body["model"] = json!("other");
    let response = cluster.chat(body);
    let dispatch = mixed.dispatch().await;
    assert!(prompt_of(&dispatch).len() > 1200);
    mixed.finish(dispatch.leg, 0, "x", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    has_metric(
        &cluster,
        "baton_coordinator_requests_total{route=\"/v1/chat/completions\",code=\"context_length_exceeded\",model=\"tiny\"} 1",
    )
    .await;
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_model_without_instances_is_503_while_the_other_goes_on() {
    let (cluster, [mut prefill, mut decode, mut mixed]) = both(|_| {}).await;
    mixed.kill().await;
    until("it is missed", || {
        cluster.service.models.iter().any(|model| cluster.service.can_serve(model).is_err())
    })
    .await;
    let (status, error) = error_of(cluster.chat(json!({"model": "alias"})).await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (503, &json!("unavailable")));
    assert!(error["message"].as_str().expect("text").contains("`other`"), "{error}");
    let response = cluster.chat(json!({}));
    answer(&mut prefill, &mut decode, "still").await;
    assert_eq!(response.await.expect("ends").status(), 200);

    let (status, said) = readiness(&cluster).await;
    assert_eq!(status, 200, "{said}");
    assert!(said.starts_with("ready: `tiny`; not ready: model `other`: "), "{said}");
    has_metric(&cluster, "baton_coordinator_model_ready{model=\"other\"} 0").await;
    decode.kill().await;
    until("it is missed, too", || !cluster.can_serve()).await;
    let gone = async { while readiness(&cluster).await.0 == 200 {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("nothing is ready");
    let (_, said) = readiness(&cluster).await;
    assert!(said.contains("model `tiny`: ") && said.contains("model `other`: "), "{said}");
    cluster.at_rest().await;
}

/// Requests of one model fill their line, waiting for instances that are busy or not there; the other's go by.
#[tokio::test]
async fn a_full_line_of_one_model_holds_up_no_other() {
    let (cluster, [mut prefill, mut decode, mut mixed]) = both(|config| {
        config.limits.max_concurrent = 1;
        config.limits.max_queued = 2;
        config.limits.placement_timeout = Duration::from_secs(60);
    })
    .await;
    mixed.kill().await;
    until("it is missed", || {
        cluster.service.models.iter().any(|model| cluster.service.can_serve(model).is_err())
    })
    .await;
    let metrics = cluster.service.metrics.clone();
    let of_other = || json!({"model": "other"});
    let first = cluster.chat(of_other());
    until("one waits for an instance", || metrics.queued.get() == 1).await;
    let second = cluster.chat(of_other());
    until("two wait", || metrics.queued.get() == 2).await;
    let (status, error) = error_of(cluster.chat(of_other()).await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (429, &json!("queue_full")));
    has_metric(&cluster, "baton_coordinator_queued{model=\"other\"} 2").await;
    has_metric(&cluster, "baton_coordinator_queued{model=\"tiny\"} 0").await;

    for _ in 0..3 {
        let response = cluster.chat(json!({"messages": [{"role": "user", "content": "y".repeat(500)}]}));
        answer(&mut prefill, &mut decode, "by").await;
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    mixed.restart().await;
    for response in [first, second] {
        let dispatch = mixed.dispatch().await;
        mixed.finish(dispatch.leg, 0, "late", FinishReason::Stop);
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn an_answer_goes_on_at_an_instance_of_its_own_model() {
    let roles = [("a", v1::Role::Mixed, 0), ("b", v1::Role::Mixed, 1), ("c", v1::Role::Mixed, 1)];
    let (cluster, [mut tiny, b, c]) = Cluster::start_models(vec![served(), other()], roles, |config| {
        config.limits.request_timeout = PATIENCE;
    })
    .await;
    let of_tiny = cluster.chat(json!({}));
    let dispatch = tiny.dispatch().await;
    tiny.finish(dispatch.leg, 0, "x", FinishReason::Stop);
    assert_eq!(of_tiny.await.expect("ends").status(), 200);
    let response = cluster.chat(json!({"model": "other", "max_tokens": 4}));
    let mut others = [b, c];
    let [b, c] = &mut others;
    let (at, taken) = tokio::select! {
        dispatch = b.dispatch() => (0, dispatch),
        dispatch = c.dispatch() => (1, dispatch),
    };
    others[at].tokens(taken.leg, 0, "ab");
    until("the tokens are there", || {
        cluster.service.roster.list().iter().any(|card| card.completion_tokens() == 2)
    })
    .await;
    others[at].kill().await;
    let next = &mut others[1 - at];
    let resumed = next.dispatch().await;
    assert_eq!(resumed.generated_tokens, b"ab".map(u32::from));
    next.finish(resumed.leg, 2, "cd", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "abcd");
    assert!(tiny.is_quiet());
    has_metric(&cluster, "baton_coordinator_migrations_total{reason=\"instance_lost\",model=\"other\"} 1")
        .await;
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_long_body_is_tokenised_while_it_comes_by_the_model_that_it_names_first() {
    let (one, two) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let watched = |bytes: &Arc<AtomicUsize>| {
        let bytes = bytes.clone();
        let ahead = move |text: &str| _ = bytes.fetch_add(text.len(), Relaxed);
        Arc::new(Watched { tokenises: |_: &str| {}, ahead })
    };
    let models = vec![Served { text: watched(&one), ..served() }, Served { text: watched(&two), ..other() }];
    let (cluster, _instances) = Cluster::start_models(models, ROLES, |_| {}).await;
    let long = "some words ".repeat(100_000);
    let heard = || [&one, &two].map(|bytes| bytes.swap(0, Relaxed));
    let sent = async |body: String| cluster.post("/v1/completions", body).await.expect("ends").status();
    // It is too long for either.
    assert_eq!(sent(format!(r#"{{"model": "alias", "prompt": "{long}"}}"#)).await, 400);
    let [of_one, of_two] = heard();
    assert!(of_one == 0 && of_two > long.len() / 2, "{of_two} of {}", long.len());
    for unknown in
        [format!(r#"{{"prompt": "{long}", "model": "alias"}}"#), format!(r#"{{"prompt": "{long}"}}"#)]
    {
        assert_eq!(sent(unknown).await, 400);
        assert_eq!(heard(), [0, 0]);
    }
    assert_eq!(sent(format!(r#"{{"model": "nobody", "prompt": "{long}"}}"#)).await, 404);
    assert_eq!(heard(), [0, 0]);
}

#[tokio::test]
async fn operators_see_the_model_of_each_request() {
    use v1::request_admin_server::RequestAdmin;
    let (cluster, [mut prefill, mut decode, mut mixed]) = both(|_| {}).await;
    let admin =
        baton_coordinator::admin::Admin { service: cluster.service.clone(), access: Access::default() };
    let (one, two) = (cluster.chat(json!({})), cluster.chat(json!({"model": "alias"})));
    let (p, d, m) = (prefill.dispatch().await, decode.dispatch().await, mixed.dispatch().await);
    let listed = admin.list_requests(tonic::Request::new(v1::ListRequestsRequest {})).await;
    let mut views = listed.expect("a list").into_inner().requests;
    views.sort_by(|a, b| a.model.cmp(&b.model));
    let models: Vec<_> =
        views.iter().map(|view| (view.model.as_str(), view.decode_instance.as_str())).collect();
    assert_eq!(models, [("other", "m"), ("tiny", "d")]);
    let asked = v1::ExplainPlacementRequest { request_id: m.request_id.clone() };
    let told = admin.explain_placement(tonic::Request::new(asked)).await.expect("it runs").into_inner();
    assert_eq!(told.request.expect("named").model, "other");
    // Instances of other models are no candidates.
    assert_eq!(told.placements[0].candidates, 1);
    mixed.finish(m.leg, 0, "x", FinishReason::Stop);
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "b", FinishReason::Stop);
    for response in [one, two] {
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_name_that_two_models_have_is_refused_at_start() {
    let shutdown = CancellationToken::new();
    let tasks = TaskTracker::new();
    let store = MemoryStore::start(MemoryConfig::new(Revision(1)), shutdown.clone(), &tasks);
    let fleet = FleetWatch::start(Arc::new(store), FleetWatchConfig::default(), shutdown.clone(), &tasks);
    let namesake = Served { aliases: vec!["tiny".into()], ..other() };
    let parts = Parts {
        tls: Tls::plaintext(),
        served: vec![served(), namesake],
        keys: Source::Open,
        fleet,
        metrics: baton_process::Metrics::new("coordinator"),
        health: HealthHandle::default(),
        tasks: tasks.clone(),
        essential: Essential::new(tasks.clone(), shutdown.clone()),
        shutdown: shutdown.clone(),
        drained: shutdown.clone(),
    };
    let refused = assemble(&CoordinatorConfig::default(), parts).err().expect("the name is taken");
    assert!(matches!(refused, CoordinatorError::NameTaken { index: 1, by: 0, .. }), "{refused}");
    shutdown.cancel();
}
