//! Requests that do not go well: one clear answer each, and nothing held afterwards.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use crate::scripted::{Cluster, PATIENCE, Watched, answer, chat_text, events, served, until};
use baton_coordinator::prepare::Served;
use baton_proto::{ApiError, ErrorCode, v1};
use baton_registry::{KeyRange, LeaderRecord, Store, Txn, keys};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use v1::{FinishReason, attach_response::Frame as Answer, leg_output::End};

pub(crate) async fn error_of(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    assert_eq!(response.headers()["content-type"], "application/json");
    let body: Value = response.json().await.expect("is JSON");
    (status, body["error"].clone())
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_both_legs() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({"stream": true}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.tokens(p.leg, 0, "a");
    let mut body = response.await.expect("ends").bytes_stream();
    body.next().await.expect("a chunk").expect("is read");
    drop(body);
    let (gone_p, gone_d) = (prefill.cancelled().await, decode.cancelled().await);
    assert_eq!((gone_p.leg, gone_d.leg), (p.leg, d.leg));
    assert_eq!(gone_d.reason, "client_gone");
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_cancels_both_legs() {
    for stream in [false, true] {
        let (cluster, mut prefill, mut decode) = Cluster::pair().await;
        let response = cluster.chat(json!({"stream": stream}));
        let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
        response.abort();
        assert_eq!((prefill.cancelled().await.leg, decode.cancelled().await.leg), (p.leg, d.leg));
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn the_rest_of_a_request_that_fails_is_not_told_to_be_the_clients_doing() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let body = json!({"model": "tiny", "prompt": ["x", "y"]}).to_string();
    let request = cluster.client.post(format!("{}/v1/completions", cluster.url)).body(body);
    let response = tokio::spawn(request.send());
    let (first, second) = (mixed.dispatch().await, mixed.dispatch().await);
    mixed.fail(first.leg, ErrorCode::InvalidArgument);
    let cancel = mixed.cancelled().await;
    assert_eq!((cancel.leg, cancel.reason.as_str()), (second.leg, "request_failed"));
    assert_eq!(error_of(response.await.expect("ends").expect("an answer")).await.0, 400);
    cluster.at_rest().await;
}

#[tokio::test]
async fn tokens_that_come_together_with_a_failure_are_given_and_counted() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"stream": true, "n": 2}));
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "a");
    let response = response.await.expect("ends");
    let tokens = b"bc".map(u32::from).to_vec();
    let last = v1::LegOutput { leg, first_position: 1, tokens, ..Default::default() };
    let failed = Some(End::Failed(ApiError::new(ErrorCode::KvExhausted, "as scripted").into()));
    let failed = v1::LegOutput { leg, choice: 1, end: failed, ..Default::default() };
    mixed.say(Answer::Step(v1::StepOutput { legs: vec![last, failed] }));
    let body = response.text().await.expect("the stream ends well");
    let events = events(&body);
    assert_eq!(chat_text(&events), "abc");
    assert!(events.last().expect("events").contains("kv_exhausted"), "{body}");
    cluster.at_rest().await;
    let metrics = cluster.get("/metrics").await.text().await.expect("is read");
    assert!(metrics.contains("baton_coordinator_generation_tokens_total{model=\"tiny\"} 3"), "{metrics}");
}

#[tokio::test]
async fn decode_lost_in_mid_stream_ends_it_with_one_error() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({"stream": true}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.tokens(p.leg, 0, "a");
    decode.tokens(d.leg, 1, "b");
    let response = response.await.expect("ends");
    assert_eq!(response.status(), 200);
    decode.kill().await;
    let body = response.text().await.expect("the stream ends well");
    let events = events(&body);
    assert_eq!(chat_text(&events), "ab");
    let errors: Vec<Value> = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .filter(|event| event.get("error").is_some())
        .collect();
    assert_eq!(errors.len(), 1, "{body}");
    assert_eq!(errors[0]["error"]["code"], "instance_lost");
    assert!(events.last().expect("events").contains("instance_lost"), "nothing follows the error: {body}");
    assert_eq!(prefill.cancelled().await.leg, p.leg);
    cluster.at_rest().await;

    assert_eq!(cluster.get("/readiness").await.status(), 503);
    let (status, error) = error_of(cluster.chat(json!({})).await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (503, &json!("unavailable")));
    assert!(error["message"].as_str().expect("a message").contains("decode"), "{error}");

    decode.restart().await;
    until("the coordinator is back with it", || cluster.can_serve()).await;
    let response = cluster.chat(json!({}));
    answer(&mut prefill, &mut decode, "again").await;
    assert_eq!(response.await.expect("ends").status(), 200);
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_a_status() {
    for (code, status) in [(ErrorCode::HandoffFailed, 502), (ErrorCode::KvExhausted, 503)] {
        let (cluster, mut prefill, mut decode) = Cluster::pair().await;
        let response = cluster.chat(json!({"stream": true}));
        // What another attempt may mend is tried once more.
        let attempts = if code == ErrorCode::HandoffFailed { 2 } else { 1 };
        for _ in 0..attempts {
            let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
            decode.fail(d.leg, code);
            if code == ErrorCode::HandoffFailed {
                // Prefill has the last word on a transfer.
                prefill.fail(p.leg, code);
            } else {
                assert_eq!(prefill.cancelled().await.leg, p.leg);
            }
        }
        let (got, error) = error_of(response.await.expect("ends")).await;
        assert_eq!((got, &error["code"]), (status, &json!(code.name())));
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn a_request_without_an_answer_yet_is_placed_again() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({}));
    let (first, _) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.fail(first.leg, ErrorCode::StaleEpoch);
    decode.cancelled().await;
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    assert_eq!(first.prompt_tokens, p.prompt_tokens);
    assert_eq!(first.sampling, p.sampling, "the seed is kept");
    let transfer = |dispatch: &v1::Dispatch| match &dispatch.work {
        Some(v1::dispatch::Work::Prefill(work)) => work.transfer_id.clone(),
        other => panic!("{other:?}"),
    };
    assert_ne!(transfer(&first), transfer(&p), "an attempt has a transfer of its own");
    prefill.finish(p.leg, 0, "o", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "k", FinishReason::Stop);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "ok");
    cluster.at_rest().await;
}

#[tokio::test]
async fn time_runs_out_with_one_error() {
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut prefill, mut decode]) =
        Cluster::start(roles, |config| config.limits.request_timeout = Duration::from_millis(200)).await;
    let response = cluster.chat(json!({}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    assert!(p.timeout_millis <= 200);
    let cancel = prefill.cancelled().await;
    assert_eq!((cancel.leg, cancel.reason.as_str()), (p.leg, "deadline"));
    assert_eq!(decode.cancelled().await.leg, d.leg);
    let (status, error) = error_of(response.await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (504, &json!("deadline_exceeded")));
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_client_that_gives_no_room_holds_nothing_past_the_deadline() {
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut prefill, mut decode]) =
        Cluster::start(roles, |config| config.limits.request_timeout = Duration::from_millis(500)).await;
    // It acknowledges all and takes no byte of any answer.
    let address = cluster.url.strip_prefix("http://").expect("a URL");
    let stream = TcpStream::connect(address).await.expect("connects");
    let (mut client, connection) = h2::client::Builder::new()
        .initial_window_size(0)
        .handshake::<_, Bytes>(stream)
        .await
        .expect("greets");
    tokio::spawn(connection);
    let request = http::Request::post(format!("{}/v1/completions", cluster.url)).body(()).expect("a request");
    let (response, mut body) = client.send_request(request, false).expect("is sent");
    let asked = json!({"model": "tiny", "prompt": "hi", "stream": true}).to_string();
    body.send_data(asked.into(), true).expect("is sent");
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    assert_eq!(response.await.expect("a head").status(), 200);
    assert_eq!(decode.cancelled().await.leg, d.leg);
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_full_house_is_429_with_when_to_come_back() {
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut prefill, mut decode]) = Cluster::start(roles, |config| {
        config.limits.max_concurrent = 1;
        config.limits.max_queued = 1;
    })
    .await;
    let first = cluster.chat(json!({}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    let second = cluster.chat(json!({}));
    until("the second waits", || cluster.service.metrics.queued.get() == 1).await;
    let third = cluster.chat(json!({})).await.expect("ends");
    assert_eq!(third.headers()["retry-after"], "1");
    let (status, error) = error_of(third).await;
    assert_eq!((status, &error["code"]), (429, &json!("queue_full")));
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "b", FinishReason::Length);
    assert_eq!(first.await.expect("ends").status(), 200);
    answer(&mut prefill, &mut decode, "cd").await;
    assert_eq!(second.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

/// A model that tokenises once the sender is dropped, and how many texts it was given.
fn held() -> (Served, Arc<AtomicUsize>, mpsc::Sender<()>) {
    let (let_go, held) = mpsc::channel();
    let (entered, held) = (Arc::<AtomicUsize>::default(), Mutex::new(held));
    let counted = entered.clone();
    let tokenises = move |_: &str| {
        counted.fetch_add(1, Ordering::Release);
        let _ = held.lock().map(|held| held.recv());
    };
    let text = Arc::new(Watched { tokenises, ahead: |_: &str| {} });
    (Served { text, ..served() }, entered, let_go)
}

#[tokio::test]
async fn a_body_that_is_still_worked_on_keeps_its_place_when_the_client_leaves() {
    let (served, entered, let_go) = held();
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut prefill, mut decode]) = Cluster::start_with(served, roles, |config| {
        config.limits.max_concurrent = 1;
        config.limits.max_queued = 0;
    })
    .await;
    let body = json!({"model": "tiny", "prompt": "x".repeat(4096)}).to_string();
    let left = cluster.post("/v1/completions", body);
    until("it is worked on", || entered.load(Ordering::Acquire) == 1).await;
    left.abort();
    until("its client is missed", || cluster.service.roster.list().is_empty()).await;
    let (status, _) = error_of(cluster.chat(json!({})).await.expect("ends")).await;
    assert_eq!(status, 429, "the memory of the first is still in use");
    drop(let_go);
    until("its place is given back", || cluster.service.gate.enter(|| None, || false).is_ok()).await;
    let response = cluster.chat(json!({}));
    answer(&mut prefill, &mut decode, "ok").await;
    assert_eq!(response.await.expect("ends").status(), 200);
}

#[tokio::test]
async fn no_more_bodies_are_worked_on_at_a_time_than_there_are_cores() {
    let (served, entered, let_go) = held();
    let cores = std::thread::available_parallelism().map_or(1, usize::from).max(2);
    let (cluster, [mut mixed]) = Cluster::start_with(served, [("m", v1::Role::Mixed)], |_| {}).await;
    let body = json!({"model": "tiny", "prompt": "x".repeat(600), "user": "u".repeat(4096), "max_tokens": 1});
    let post = || cluster.post("/v1/completions", body.to_string());
    let worked_on: Vec<_> = (0..cores).map(|_| post()).collect();
    until("they are worked on", || entered.load(Ordering::Acquire) == cores).await;
    let left = post();
    until("it waits for its turn", || cluster.service.metrics.queued.get() == 1).await;
    let waits = post();
    until("it waits, too", || cluster.service.metrics.queued.get() == 2).await;
    left.abort();
    until("it waits no more", || cluster.service.metrics.queued.get() == 1).await;
    assert_eq!(entered.load(Ordering::Acquire), cores);
    drop(let_go);
    for _ in 0..=cores {
        let leg = mixed.dispatch().await.leg;
        mixed.finish(leg, 0, "x", FinishReason::Length);
    }
    for response in worked_on.into_iter().chain([waits]) {
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    assert_eq!(entered.load(Ordering::Acquire), cores + 1, "who left is not worked on");
    cluster.at_rest().await;
}

#[tokio::test]
async fn nobody_there_is_503_until_somebody_is_ready() {
    let (cluster, [mut alone]) = Cluster::start([("a", v1::Role::None)], |_| {}).await;
    assert_eq!(cluster.get("/health").await.status(), 200);
    assert_eq!(cluster.get("/readiness").await.status(), 503);
    let (status, error) = error_of(cluster.chat(json!({})).await.expect("ends")).await;
    assert_eq!((status, &error["code"]), (503, &json!("unavailable")));

    let change = |phase: v1::Phase, epoch| {
        Answer::Role(v1::RoleChange { role: v1::Role::Mixed.into(), epoch, phase: phase.into() })
    };
    alone.say(change(v1::Phase::Ready, 2));
    until("it is ready", || cluster.can_serve()).await;
    let response = cluster.chat(json!({}));
    let dispatch = alone.dispatch().await;
    assert_eq!(dispatch.role_epoch, 2);
    alone.say(change(v1::Phase::Draining, 2));
    until("it drains", || !cluster.can_serve()).await;
    alone.finish(dispatch.leg, 0, "x", FinishReason::Stop);
    assert_eq!(response.await.expect("ends").status(), 200, "what it had is finished");
}

#[tokio::test]
async fn a_request_waits_a_little_for_an_instance_that_is_coming() {
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [mut prefill, mut decode]) =
        Cluster::start(roles, |config| config.limits.placement_timeout = Duration::from_secs(60)).await;
    decode.kill().await;
    until("it is missed", || !cluster.can_serve()).await;
    let response = cluster.chat(json!({}));
    until("the request is there", || cluster.service.metrics.queued.get() == 1).await;
    decode.restart().await;
    answer(&mut prefill, &mut decode, "ok").await;
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn an_instance_lost_before_the_first_token_is_waited_for() {
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    for stream in [false, true] {
        let (cluster, [mut prefill, mut decode]) =
            Cluster::start(roles, |config| config.limits.placement_timeout = Duration::from_secs(60)).await;
        let response = cluster.chat(json!({"stream": stream}));
        let (p, _) = (prefill.dispatch().await, decode.dispatch().await);
        decode.kill().await;
        assert_eq!(prefill.cancelled().await.leg, p.leg);
        decode.restart().await;
        answer(&mut prefill, &mut decode, "ok").await;
        let response = response.await.expect("ends");
        assert_eq!(response.status(), 200);
        assert!(!response.text().await.expect("a body").contains("error"));
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn traffic_goes_on_while_the_store_has_nothing() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    cluster.store.txn(Txn::new().delete_prefix(keys::ROOT)).await.expect("deletes");
    let response = cluster.chat(json!({}));
    answer(&mut prefill, &mut decode, "still").await;
    assert_eq!(response.await.expect("ends").status(), 200);
}

#[tokio::test]
async fn readiness_ends_with_the_grace_of_an_instance_that_was_taken_out() {
    let roles = [("p", v1::Role::Prefill), ("d", v1::Role::Decode)];
    let (cluster, [_prefill, decode]) = Cluster::start(roles, |config| {
        config.fleet.absent_grace = Duration::from_millis(100);
        config.fleet.sweep = Duration::from_millis(20);
    })
    .await;
    assert_eq!(cluster.get("/readiness").await.status(), 200);
    // A leader, and what it wrote itself, so that what it takes away is gone for good.
    let (key, store) = (keys::instance(&decode.id), &cluster.store);
    let leader = LeaderRecord { controller_id: "c".into(), endpoint: "c:1".into() };
    store.txn(Txn::new().put(keys::LEADER, leader.encode(), None)).await.expect("puts");
    let listed = store.range(KeyRange::exact(&key)).await.expect("lists").items.remove(0).value;
    store.txn(Txn::new().put(&key, listed, None)).await.expect("puts");
    store.txn(Txn::new().delete(&key)).await.expect("deletes");
    // Its stream stands and says nothing: time alone makes the difference.
    let ends = async { while cluster.get("/readiness").await.status() == 200 {} };
    timeout(PATIENCE, ends).await.expect("it is not ready");
}

#[tokio::test]
async fn bad_requests_are_refused_by_field() {
    let (cluster, [_mixed]) =
        Cluster::start([("m", v1::Role::Mixed)], |config| config.limits.max_body_bytes = 2000).await;
    let good = r#""model": "tiny", "messages": [{"role": "user", "content": "hi"}]"#;
    let long = "x".repeat(1200);
    let huge = "x".repeat(3000);
    let cases = [
        ("{".to_owned(), 400, "invalid_value", None),
        ("[]".into(), 400, "invalid_value", None),
        (r#"{"model": "gone", "messages": []}"#.into(), 404, "model_not_found", Some("model")),
        (r#"{"model": "tiny", "messages": []}"#.into(), 400, "invalid_value", Some("messages")),
        (format!(r#"{{{good}, "temperature": 3}}"#), 400, "invalid_value", Some("temperature")),
        (format!(r#"{{{good}, "top_p": "x"}}"#), 400, "invalid_value", Some("top_p")),
        (format!(r#"{{{good}, "n": 33}}"#), 400, "invalid_value", Some("n")),
        (format!(r#"{{{good}, "best_of": 2}}"#), 400, "unsupported", Some("best_of")),
        (format!(r#"{{{good}, "max_tokens": 5000}}"#), 400, "context_length_exceeded", Some("max_tokens")),
        (
            format!(r#"{{"model": "tiny", "messages": [{{"role": "user", "content": "{long}"}}]}}"#),
            400,
            "context_length_exceeded",
            Some("messages"),
        ),
        (format!(r#"{{{good}, "user": "{huge}"}}"#), 413, "payload_too_large", None),
    ];
    for (body, status, code, param) in cases {
        let shown = body.chars().take(80).collect::<String>();
        let response = cluster.post("/v1/chat/completions", body).await.expect("ends");
        assert!(response.headers().contains_key("x-request-id"));
        let (got, error) = error_of(response).await;
        assert_eq!(
            (got, &error["code"], error["param"].as_str()),
            (status, &json!(code), param),
            "{shown}: {error}"
        );
        assert!(error["type"].is_string() && error["message"].is_string());
    }
    let (status, error) = error_of(cluster.get("/v1/nothing").await).await;
    assert_eq!((status, &error["code"]), (404, &json!("not_found")));
    let (status, error) = error_of(cluster.get("/v1/chat/completions").await).await;
    assert_eq!(
        (status, &error["type"], &error["code"]),
        (405, &json!("invalid_request_error"), &json!("method_not_allowed"))
    );
    cluster.at_rest().await;
}
