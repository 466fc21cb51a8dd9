//! Output with prefill and decode apart is, token for token, that of one instance doing both.

use baton_integration_tests::{
    Cluster,
    chat::{ask, ask_all, long_prompt, request},
};
use serde_json::{Value, json};

/// Short, long (several chunks, many blocks), and block-border prompts; greedy and sampled.
fn requests(model: &str) -> Vec<Value> {
    let prompts =
        ["Hi", "What is the capital of France?", "Write a haiku about rain.", "Count from one to twenty."];
    let long = [14, 15, 16, 17, 180, 700, 1500].map(long_prompt);
    let mut all = Vec::new();
    for prompt in prompts.iter().map(|prompt| prompt.to_string()).chain(long) {
        let greedy = request(model, &prompt, 24, false);
        let mut sampled = greedy.clone();
        for (key, value) in [
            ("temperature", json!(0.9)),
            ("top_p", json!(0.9)),
            ("seed", json!(7)),
            ("frequency_penalty", json!(0.5)),
        ] {
            sampled[key] = value;
        }
        all.extend([greedy, sampled]);
    }
    all
}

/// What one answer says it cost.
async fn usage_of(url: &str, body: &Value) -> Value {
    let response = reqwest::Client::new().post(format!("{url}/v1/chat/completions")).json(body).send().await;
    let answer: Value = response.expect("the coordinator answers").json().await.expect("answers are JSON");
    answer["usage"].clone()
}

#[tokio::test]
async fn apart_equals_mixed() {
    let apart = Cluster::start(&["--prefill", "1", "--decode", "1"]).await;
    assert_eq!(apart.roles().await, ["decode", "prefill"]);
    let requests = requests(apart.model());
    let mut one_by_one = Vec::new();
    for request in &requests {
        one_by_one.push(ask(apart.url(), request).await);
    }
    let together = ask_all(apart.url(), &requests).await;
    // By now both have the prompts in their caches: full blocks of 16 tokens, all but the last token at most.
    let usage = usage_of(apart.url(), &requests[20]).await;
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached, usage["prompt_tokens"].as_u64().map(|tokens| (tokens - 1) / 16 * 16), "{usage}");
    apart.assert_nothing_held().await;
    let handed_off = apart.server_metric("baton_server_transfers_out_total", "").await;
    assert!(handed_off >= 2.0 * requests.len() as f64, "only {handed_off} caches crossed");
    apart.stop().await;

    // As it is by default: what decode has, or what is short, it computes itself while it is not busy.
    let default = "coordinator.placement.local_prefill_tokens=2048";
    // However slow its steps are here.
    let steps = "coordinator.placement.tpot_target=1m";
    let either = Cluster::start(&["--prefill", "1", "--decode", "1", "--set", default, "--set", steps]).await;
    let mut local = Vec::new();
    for request in &requests {
        local.push(ask(either.url(), request).await);
    }
    let handed_over = either.server_metric("baton_server_transfers_out_total", "").await;
    assert!(handed_over < requests.len() as f64 / 2.0, "{handed_over} of {} caches crossed", requests.len());
    let both = ask_all(either.url(), &requests).await;
    either.assert_nothing_held().await;
    either.stop().await;

    let mixed = Cluster::start(&["--prefill", "1", "--decode", "0"]).await;
    assert_eq!(mixed.roles().await, ["mixed"]);
    let alone = ask_all(mixed.url(), &requests).await;
    mixed.stop().await;

    for (i, request) in requests.iter().enumerate() {
        assert_eq!(one_by_one[i], alone[i], "apart, one by one, against mixed: {request}");
        assert_eq!(together[i], alone[i], "apart, all together, against mixed: {request}");
        assert_eq!(local[i], alone[i], "by decode, one by one, against mixed: {request}");
        assert_eq!(both[i], alone[i], "by either, all together, against mixed: {request}");
    }
}
