//! Requests that go well, and how their answers look.

use crate::scripted::{Cluster, answer, chat_text, events, prompt_of, until};
use baton_coordinator::{
    CoordinatorConfig,
    requests::{ENDED_KEPT, Stage},
};
use baton_process::access::Access;
use baton_proto::{RequestId, v1};
use serde_json::{Value, json};
use tokio::time::Instant;
use v1::{FinishReason, dispatch::Work};

#[tokio::test]
async fn both_legs_are_dispatched_at_once_with_one_transfer() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let body = json!({"seed": 7, "temperature": 0.5, "max_tokens": 3, "priority": -2});
    let response = cluster.chat(body);
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    // Both are told by when the first token is wanted: a second from its arrival, and some for the prompt.
    assert!([&p, &d].iter().all(|leg| (500..1_100).contains(&leg.first_token_within_millis)), "{p:?}");
    let prompt: Vec<u32> = b"user:hi\nassistant:".iter().map(|&byte| u32::from(byte)).collect();
    assert_eq!((prompt_of(&p), prompt_of(&d)), (prompt.clone(), prompt));
    assert_eq!((p.incarnation, p.role_epoch, p.model.as_str()), (1, 1, "tiny"));
    assert!(p.timeout_millis > 500_000);
    assert_eq!((p.priority, d.priority), (-2, -2));
    let sampling = p.sampling.clone().expect("sampling");
    assert_eq!((sampling.seed, sampling.temperature, sampling.max_tokens), (7, 0.5, 3));
    assert_eq!((sampling.stop_token_ids.as_slice(), p.sampling == d.sampling), (&[0][..], true));
    let (Some(Work::Prefill(hand_on)), Some(Work::Decode(take_up))) = (p.work, d.work) else {
        panic!("wrong work")
    };
    assert_eq!((hand_on.transfer_id.len(), &hand_on.transfer_id), (16, &take_up.transfer_id));
    assert_eq!((hand_on.decode_instance.as_str(), take_up.prefill_instance.as_str()), ("d", "p"));
    assert_eq!(hand_on.decode_handoff_endpoint, "d-handoff:1");
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "bc", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(
        answer["choices"][0]["message"],
        json!({"role": "assistant", "content": "abc", "refusal": null})
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["object"], "chat.completion");
    let usage = json!({"prompt_tokens": 18, "completion_tokens": 3, "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 5}});
    assert_eq!(answer["usage"], usage);
    cluster.at_rest().await;
    assert!(prefill.is_quiet() && decode.is_quiet(), "nothing was cancelled");
}

#[tokio::test]
async fn a_stream_is_in_order_though_decode_overtakes_prefill() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    decode.tokens(d.leg, 1, "b");
    decode.tokens(d.leg, 1, "bc");
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    // Byte 0 is the stop token: counted, not shown.
    decode.finish(d.leg, 3, "d\0", FinishReason::Stop);
    let response = response.await.expect("ends");
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let body = response.text().await.expect("a body");
    let events = events(&body);
    assert_eq!(chat_text(&events), "abcd");
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunk = |at: usize| serde_json::from_str::<Value>(events[at]).expect("is JSON");
    assert_eq!(chunk(0)["choices"][0]["delta"]["role"], "assistant");
    let (finish, usage) = (chunk(events.len() - 3), chunk(events.len() - 2));
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(5)));
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_mixed_instance_answers_alone() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let body = json!({"model": "tiny", "prompt": [104, 105], "stream": true, "max_tokens": 2});
    let response = cluster.post("/v1/completions", body.to_string());
    let dispatch = mixed.dispatch().await;
    assert!(matches!(dispatch.work, Some(Work::Whole(_))));
    assert_eq!(prompt_of(&dispatch), [104, 105]);
    mixed.tokens(dispatch.leg, 0, "x");
    mixed.finish(dispatch.leg, 1, "y", FinishReason::Length);
    let body = response.await.expect("ends").text().await.expect("a body");
    let text: String = events(&body)
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .map(|chunk| chunk["choices"][0]["text"].as_str().expect("text").to_owned())
        .collect();
    assert_eq!(text, "xy");
    cluster.at_rest().await;
}

#[tokio::test]
async fn prefill_that_ends_the_answer_cancels_decode() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({"max_tokens": 5}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.finish(p.leg, 0, "\0", FinishReason::Stop);
    assert_eq!(decode.cancelled().await.leg, d.leg);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "");
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    cluster.at_rest().await;
}

#[tokio::test]
async fn one_token_is_asked_of_prefill_alone() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let response = cluster.chat(json!({"max_tokens": 1}));
    let dispatch = prefill.dispatch().await;
    assert!(matches!(dispatch.work, Some(Work::Whole(_))));
    prefill.finish(dispatch.leg, 0, "a", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["choices"][0]["message"]["content"], "a");
    cluster.at_rest().await;
    // The first that decode hears of is a request of two.
    let response = cluster.chat(json!({"max_tokens": 2}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    assert_eq!(d.sampling.expect("sampling").max_tokens, 2);
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_answer_and_never_leaks() {
    for stream in [false, true] {
        let (cluster, mut prefill, mut decode) = Cluster::pair().await;
        let response = cluster.chat(json!({"stream": stream, "stop": ["END", "zz"]}));
        let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
        prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
        decode.tokens(d.leg, 1, "bE");
        decode.tokens(d.leg, 3, "N");
        decode.tokens(d.leg, 4, "Dmore");
        let cancel = decode.cancelled().await;
        assert_eq!((cancel.leg, cancel.reason.as_str()), (d.leg, "stop_string"));
        let body = response.await.expect("ends").text().await.expect("a body");
        assert!(!body.contains("more"), "{body}");
        if stream {
            assert_eq!(chat_text(&events(&body)), "ab");
            assert!(body.contains(r#""finish_reason":"stop""#), "{body}");
        } else {
            let answer: Value = serde_json::from_str(&body).expect("is JSON");
            assert_eq!(answer["choices"][0]["message"]["content"], "ab");
            assert_eq!(answer["usage"]["completion_tokens"], 5);
        }
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn what_was_cached_is_told_of_an_answer_that_a_stop_string_ends() {
    let (cluster, [mut instance]) = Cluster::start([("a", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"stop": "END"}));
    let leg = instance.dispatch().await.leg;
    instance.begin(leg, "a", 3);
    instance.tokens(leg, 1, "END");
    assert_eq!(instance.cancelled().await.reason, "stop_string");
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    cluster.at_rest().await;
}

#[tokio::test]
async fn no_more_is_said_to_be_cached_than_the_prompts_have() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let body = json!({"model": "tiny", "prompt": ["abc", "defg"], "max_tokens": 9});
    let response = cluster.post("/v1/completions", body.to_string());
    for _ in 0..2 {
        let leg = mixed.dispatch().await.leg;
        mixed.begin(leg, "x", u32::MAX);
        mixed.finish(leg, 1, "y", FinishReason::Stop);
    }
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    let usage = &answer["usage"];
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached.is_some() && cached == usage["prompt_tokens"].as_u64(), "{answer}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn ids_and_trace_context_are_passed_on() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 2});
    let request = cluster.client.post(format!("{}/v1/completions", cluster.url)).body(body.to_string());
    let request = request.header("x-request-id", "mine-1").header("traceparent", trace);
    let sent = tokio::spawn(request.header("tracestate", "theirs=1").header("tracestate", "ours=2").send());
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    assert_eq!((p.request_id.as_str(), d.request_id.as_str()), ("mine-1", "mine-1"));
    for leg in [&p, &d] {
        assert_eq!((leg.traceparent.as_str(), leg.tracestate.as_str()), (trace, "theirs=1,ours=2"));
    }
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "b", FinishReason::Length);
    let response = sent.await.expect("ends").expect("an answer");
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    let answer: Value = response.json().await.expect("is JSON");
    assert_eq!(answer["id"], "cmpl-mine-1");
    let fresh = cluster.get("/nowhere").await;
    assert_eq!(fresh.status(), 404);
}

#[tokio::test]
async fn models_and_metrics_are_shown() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let models: Value = cluster.get("/v1/models").await.json().await.expect("is JSON");
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    let model: Value = cluster.get("/v1/models/tiny").await.json().await.expect("is JSON");
    assert_eq!((&model["object"], &model["owned_by"]), (&json!("model"), &json!("baton")));
    let unreadable = cluster.get("/v1/models/%ff").await;
    assert_eq!(unreadable.status(), 404);
    let error: Value = unreadable.json().await.expect("is JSON");
    assert_eq!(error["error"]["code"], "model_not_found");
    let other = cluster.get("/v1/models/other/one").await;
    assert_eq!(other.status(), 404);

    let response = cluster.chat(json!({"max_tokens": 3}));
    answer(&mut prefill, &mut decode, "abc").await;
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
    let metrics = cluster.get("/metrics").await.text().await.expect("text");
    for line in [
        "baton_coordinator_requests_total{route=\"/v1/chat/completions\",code=\"200\",model=\"tiny\"} 1",
        "baton_coordinator_in_flight{model=\"tiny\"} 0",
        "baton_coordinator_generation_tokens_total{model=\"tiny\"} 3",
        "baton_coordinator_prompt_tokens_total{model=\"tiny\"} 18",
        "baton_coordinator_time_to_first_token_seconds_count{model=\"tiny\"} 1",
        "baton_coordinator_time_per_output_token_seconds_count{model=\"tiny\"} 1",
        "baton_coordinator_e2e_request_latency_seconds_count{model=\"tiny\"} 1",
        "baton_coordinator_refusals_total{reason=\"line\"} 0",
        "baton_coordinator_hand_ons_total{model=\"tiny\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn operators_see_what_is_under_way() {
    use v1::request_admin_server::RequestAdmin;
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let roster = cluster.service.roster.clone();
    let admin =
        baton_coordinator::admin::Admin { service: cluster.service.clone(), access: Access::default() };
    let list = async || {
        let response = admin.list_requests(tonic::Request::new(v1::ListRequestsRequest {})).await;
        response.expect("a list").into_inner().requests
    };
    assert!(list().await.is_empty());
    let response = cluster.chat(json!({"max_tokens": 2}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    let shown = list().await;
    assert_eq!(shown.len(), 1);
    let view = &shown[0];
    assert_eq!((view.stage.as_str(), view.model.as_str(), view.prompt_tokens), ("prefill", "tiny", 18));
    assert_eq!((view.prefill_instance.as_str(), view.decode_instance.as_str()), ("p", "d"));
    assert_eq!(view.request_id, p.request_id);
    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    until("the first token is counted", || roster.list()[0].completion_tokens() == 1).await;
    assert_eq!(list().await[0].stage, "decode");
    decode.finish(d.leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn operators_are_told_why_a_request_went_where_it_went() {
    use v1::request_admin_server::RequestAdmin;
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let admin =
        baton_coordinator::admin::Admin { service: cluster.service.clone(), access: Access::default() };
    let explain = async |id: &str| {
        let asked = v1::ExplainPlacementRequest { request_id: id.to_owned() };
        admin.explain_placement(tonic::Request::new(asked)).await.map(tonic::Response::into_inner)
    };
    let response = cluster.chat(json!({"max_tokens": 2}));
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    let told = explain(&p.request_id).await.expect("it runs");
    let [placement] = &told.placements[..] else { panic!("{told:?}") };
    assert_eq!((placement.prefill_instance.as_str(), placement.decode_instance.as_str()), ("p", "d"));
    assert_eq!((placement.prompt_tokens, placement.expected_tokens, placement.choices), (18, 2, 1));
    assert_eq!((placement.candidates, placement.because.as_str()), (2, ""));
    let parts: Vec<_> = placement
        .cheapest
        .iter()
        .map(|candidate| (candidate.instance_id.as_str(), candidate.part.as_str(), candidate.taken))
        .collect();
    assert_eq!(parts, [("p", "prefill", true), ("d", "decode", true)]);
    assert!(placement.cheapest.is_sorted_by_key(|candidate| candidate.cost_micros));
    let parts: u64 = placement.cheapest.iter().map(|candidate| candidate.cost_micros).sum();
    let rest = placement.cost_micros - placement.handoff_micros;
    assert!(rest.abs_diff(parts) <= 2, "{placement:?}");
    assert_eq!((&placement.runner_up, placement.away, placement.avoided), (&None, 0, 0));

    prefill.finish(p.leg, 0, "a", FinishReason::HandedOff);
    decode.finish(d.leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
    let told = explain(&p.request_id).await.expect("it has just ended");
    let request = told.request.expect("named");
    assert_eq!((request.stage.as_str(), request.completion_tokens, told.placements.len()), ("ended", 2, 1));
    assert_eq!(explain("another").await.expect_err("unknown").code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn operators_are_told_what_a_request_waits_for_and_why_one_was_refused() {
    use v1::request_admin_server::RequestAdmin;
    let few = |config: &mut CoordinatorConfig| {
        (config.limits.max_concurrent, config.limits.max_queued) = (1, 1);
    };
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], few).await;
    let admin =
        baton_coordinator::admin::Admin { service: cluster.service.clone(), access: Access::default() };
    let explain = async |id: &str| {
        let asked = v1::ExplainPlacementRequest { request_id: id.to_owned() };
        admin.explain_placement(tonic::Request::new(asked)).await.expect("it is known").into_inner()
    };
    let first = cluster.chat(json!({"max_tokens": 2}));
    let served = mixed.dispatch().await;
    assert_eq!(explain(&served.request_id).await.waiting, None);
    let roster = cluster.service.roster.clone();
    let waits = || roster.list().into_iter().find(|card| matches!(card.stage(), Stage::Queued { .. }));
    let second = cluster.chat(json!({"max_tokens": 2}));
    until("one waits", || waits().is_some()).await;
    let id = waits().expect("one waits").request.to_string();
    let told = explain(&id).await;
    let waiting = told.waiting.expect("it waits");
    assert!(waiting.because.contains("limits.max_concurrent: 1"), "{}", waiting.because);
    let place = waiting.place.expect("there is somebody");
    assert_eq!((place.prefill_instance.as_str(), place.candidates, place.prompt_tokens), ("m", 1, 18));
    assert_eq!((place.cheapest.len(), told.placements.len()), (1, 0));
    // Before it is read.
    let refused = cluster.chat(json!({})).await.expect("ends");
    let turned_away = refused.headers()["x-request-id"].to_str().expect("an id").to_owned();
    assert_eq!(refused.status(), 429);
    let told = explain(&turned_away).await.request.expect("named");
    assert_eq!(told.stage, "ended");
    assert!(told.error.starts_with("queue_full: too many requests are waiting"), "{}", told.error);

    mixed.finish(served.leg, 0, "a", FinishReason::Length);
    assert_eq!(first.await.expect("ends").status(), 200);
    let served = mixed.dispatch().await;
    mixed.finish(served.leg, 0, "a", FinishReason::Length);
    assert_eq!(second.await.expect("ends").status(), 200);
    let told = explain(&id).await;
    assert_eq!((told.waiting, told.placements.len()), (None, 1));
    assert_eq!(told.request.expect("named").error, "");
    let refused = cluster.chat(json!({"max_tokens": -2})).await.expect("ends");
    let id = refused.headers()["x-request-id"].to_str().expect("an id").to_owned();
    assert_eq!(refused.status(), 400);
    let told = explain(&id).await.request.expect("named");
    assert_eq!(told.stage, "ended");
    assert!(told.error.starts_with("invalid_value: max_tokens"), "{}", told.error);
    cluster.at_rest().await;
    // Whatever is refused afterwards, who was served is known.
    for _ in 0..=ENDED_KEPT {
        drop(roster.enter(RequestId::adopt("refused"), Instant::now(), std::sync::Arc::default()));
    }
    assert!(roster.find(&id).is_none() && roster.find(&turned_away).is_none());
    assert_eq!(explain(&served.request_id).await.placements.len(), 1);
}

/// What the scripted instances hold of a token: its logarithm is minus its byte over 100, and the next byte is likelier.
fn logprobs(text: &str) -> Vec<v1::TokenLogprobs> {
    let of = |byte: u8| v1::TokenLogprobs {
        logprob: -f32::from(byte) / 100.0,
        top_tokens: vec![u32::from(byte) + 1],
        top_logprobs: vec![-0.5],
    };
    text.bytes().map(of).collect()
}

#[tokio::test]
async fn log_probabilities_of_both_legs_stay_with_their_text() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let body = json!({"logprobs": true, "top_logprobs": 1, "stream": true, "stop": "de", "max_tokens": 9});
    let response = cluster.chat(body);
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    let asked = [p.sampling, d.sampling].map(|sampling| sampling.expect("sampling").top_logprobs);
    assert_eq!(asked, [Some(1), Some(1)]);
    decode.scored(d.leg, 1, "bcd", logprobs("bcd"), None);
    let handed = v1::Finished { reason: FinishReason::HandedOff.into(), ..Default::default() };
    prefill.scored(p.leg, 0, "a", logprobs("a"), Some(v1::leg_output::End::Finished(handed)));
    decode.scored(d.leg, 4, "e", logprobs("e"), None);
    let body = response.await.expect("ends").text().await.expect("a body");
    let chunks = events(&body).into_iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let mut told = Vec::new();
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        let tokens = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        let text: String = tokens.iter().map(|token| token["token"].as_str().expect("text")).collect();
        assert_eq!(text, choice["delta"]["content"].as_str().unwrap_or_default(), "told apart");
        told.extend(tokens);
    }
    // "d" and "e" are the stop string.
    let texts: Vec<&str> = told.iter().filter_map(|token| token["token"].as_str()).collect();
    assert_eq!(texts, ["a", "b", "c"]);
    let alternative = json!([{"token": "d", "logprob": -0.5, "bytes": [100]}]);
    assert_eq!((&told[2]["top_logprobs"], &told[2]["bytes"]), (&alternative, &json!([99])));
    assert!((told[2]["logprob"].as_f64().expect("a number") + 0.99).abs() < 1e-6);
    assert_eq!(decode.cancelled().await.leg, d.leg);
    cluster.at_rest().await;
}

#[tokio::test]
async fn an_instance_that_leaves_log_probabilities_out_is_told() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"logprobs": true}));
    // Nobody else is there to be asked the second time.
    for _ in 0..2 {
        let dispatch = mixed.dispatch().await;
        mixed.tokens(dispatch.leg, 0, "x");
        assert_eq!(mixed.cancelled().await.leg, dispatch.leg);
    }
    let response = response.await.expect("ends");
    assert_eq!(response.status(), 500);
    let body: Value = response.json().await.expect("JSON");
    assert!(body["error"]["message"].as_str().expect("text").contains("log probabilities"), "{body}");
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_completion_echoes_its_prompt_and_tells_lists_side_by_side() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let ask = |more: &str| {
        let body = format!(r#"{{"model": "tiny", "prompt": "hi ", "max_tokens": 2, {more}}}"#);
        cluster.post("/v1/completions", body)
    };
    let response = ask(r#""echo": true"#);
    let dispatch = mixed.dispatch().await;
    mixed.finish(dispatch.leg, 0, "xy", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][0]["logprobs"]),
        (&json!("hi xy"), &Value::Null)
    );

    let response = ask(r#""logprobs": 1"#);
    let dispatch = mixed.dispatch().await;
    mixed.scored(dispatch.leg, 0, "xy", logprobs("xy"), None);
    mixed.finish(dispatch.leg, 2, "", FinishReason::Length);
    let answer: Value = response.await.expect("ends").json().await.expect("is JSON");
    let told = &answer["choices"][0]["logprobs"];
    assert_eq!((&told["tokens"], &told["text_offset"]), (&json!(["x", "y"]), &json!([0, 1])));
    assert_eq!(told["top_logprobs"][0]["y"], -0.5);
    assert_eq!(told["top_logprobs"][0]["x"], told["token_logprobs"][0]);
    cluster.at_rest().await;
}
