//! Answers that leave an instance that is frozen, or drains: how long their clients wait, that they read what they would
//! have, and how little is computed again.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use baton_integration_tests::{
    Cluster, binary,
    chat::{Seen, ask_during, long_prompt, request},
    eventually, metrics, model,
    process::Service,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// From when a process freezes to the next token of what it had.
const MOVED_WITHIN: Duration = Duration::from_secs(5);
const BLOCK_TOKENS: u32 = 16;

/// What the servers in `urls` have computed of prompts.
async fn prefilled(urls: &[String]) -> f64 {
    let mut sum = 0.0;
    for url in urls {
        let text = reqwest::get(url).await.expect("it answers").text().await.expect("a text");
        sum += metrics::sum(&text, "baton_server_prefill_tokens_total", "").expect("a metric");
    }
    sum
}

/// Who decodes the only request.
async fn decodes(cluster: &Cluster) -> String {
    eventually("the request is placed", || async {
        let requests = cluster.try_ctl("requests").await?;
        Some(requests.first()?["decode_instance"].as_str()?.to_owned()).filter(|id| !id.is_empty())
    })
    .await
}

/// Where the metrics of an instance are, and of the others.
async fn metrics_of(cluster: &Cluster, id: &str) -> (Vec<String>, Vec<String>) {
    let instances = cluster.ctl("instances").await;
    let urls = instances.iter().map(|of| {
        let url = of["metrics_endpoint"].as_str().expect("an endpoint");
        (of["id"] == id || of["instance_id"] == id, format!("http://{url}/metrics"))
    });
    let (own, others): (Vec<_>, Vec<_>) = urls.partition(|(is, _)| *is);
    assert_eq!(own.len(), 1, "{instances:?}");
    let urls = |of: Vec<(bool, String)>| of.into_iter().map(|(_, url)| url).collect();
    (urls(own), urls(others))
}

/// How many answers were begun on one instance and went on elsewhere for this reason.
async fn moved(cluster: &Cluster, reason: &str) -> f64 {
    let text = reqwest::get(format!("{}/metrics", cluster.url())).await.expect("metrics").text().await;
    let name = "baton_coordinator_migrations_total";
    metrics::sum(&text.expect("a text"), name, &format!("reason=\"{reason}\"")).unwrap_or(0.0)
}

/// What an instance that drained has computed, and the others together, while answers left it.
struct Again {
    drained: f64,
    others: f64,
    moved: f64,
}

/// Drains the decode that has the most of these answers when each has said `after` events, and reads them to their end.
async fn ask_and_drain(cluster: &Cluster, bodies: &[Value], after: usize) -> (Vec<Seen>, Again) {
    let mut decode = String::new();
    let mut before = (0.0, 0.0);
    let already = moved(cluster, "unavailable").await;
    let seen = ask_during(cluster.url(), bodies, after, async || {
        decode = decodes(cluster).await;
        let (own, others) = metrics_of(cluster, &decode).await;
        before = (prefilled(&own).await, prefilled(&others).await);
        let began = Instant::now();
        cluster.run_ctl(&["drain", &decode, "--within", "60s"]).await;
        println!("drained in {:?}", began.elapsed());
    })
    .await;
    let (own, others) = metrics_of(cluster, &decode).await;
    let again = Again {
        drained: prefilled(&own).await - before.0,
        others: prefilled(&others).await - before.1,
        moved: moved(cluster, "unavailable").await - already,
    };
    cluster.run_ctl(&["uncordon", &decode]).await;
    cluster.assert_nothing_held().await;
    (seen, again)
}

#[tokio::test]
async fn what_a_frozen_decode_has_goes_on_elsewhere_within_seconds_from_what_prefill_has_cached() {
    let cluster = Cluster::start(&["--prefill", "1", "--decode", "2"]).await;
    let tokens = 60;
    let bodies = [request(cluster.model(), &long_prompt(400), tokens, true)];
    let expected = ask_during(cluster.url(), &bodies, 0, async || {}).await;
    let (urls, _) = metrics_of(&cluster, &cluster.instance_of("prefill").await).await;

    let (mut frozen, mut before) = (String::new(), 0.0);
    let seen = ask_during(cluster.url(), &bodies, 6, async || {
        frozen = decodes(&cluster).await;
        before = prefilled(&urls).await;
        cluster.kill(&frozen, Signal::STOP);
    })
    .await;
    let again = prefilled(&urls).await - before;
    cluster.kill(&frozen, Signal::CONT);
    println!("the client waited {:?}; {again} tokens were computed again", seen[0].longest_pause);
    seen[0].assert_is(&expected[0]);
    assert!(seen[0].longest_pause < MOVED_WITHIN, "{:?}", seen[0].longest_pause);
    assert!(seen[0].longest_pause > Duration::from_secs(2), "it was not on the frozen one");
    // Of the prompt fewer than two blocks; what was generated on the frozen one is nowhere else.
    assert!(again < f64::from(tokens + 2 * BLOCK_TOKENS), "{again} tokens were computed again");
    cluster.assert_nothing_held().await;
}

const AT_ONCE: [&str; 6] = ["--prefill", "1", "--decode", "2", "--set", "coordinator.carry.move_after=0s"];

#[tokio::test]
async fn answers_leave_a_decode_that_drains_at_once_and_unchanged_and_next_to_nothing_is_computed_again() {
    let cluster = Cluster::start(&AT_ONCE).await;
    let question = |i| request(cluster.model(), &format!("Question {i}. {}", long_prompt(100)), 200, true);
    let bodies: Vec<_> = (0..4).map(question).collect();
    let expected = ask_during(cluster.url(), &bodies, 0, async || {}).await;

    let (seen, again) = ask_and_drain(&cluster, &bodies, 10).await;
    let pause = seen.iter().map(|seen| seen.longest_pause).max().expect("four answers");
    let Again { drained, others, moved } = again;
    println!("{moved} answers moved, {drained} tokens were computed again; the longest pause was {pause:?}");
    for (seen, expected) in seen.iter().zip(&expected) {
        seen.assert_is(expected);
    }
    assert!(moved > 0.0, "nothing was on the one that drained");
    assert!(drained > 0.0 && drained <= moved * f64::from(BLOCK_TOKENS), "{drained} tokens, {moved} answers");
    assert_eq!(others, 0.0, "others computed what the one that drained has");
}

#[tokio::test]
async fn choices_stop_strings_log_probabilities_and_counts_are_those_of_an_answer_that_stays() {
    let cluster = Cluster::start(&AT_ONCE).await;
    let mut body = request(cluster.model(), &long_prompt(90), 150, true);
    let more = json!({"temperature": 0.8, "seed": 7, "n": 3, "logprobs": true, "top_logprobs": 2,
        "frequency_penalty": 0.2, "stream_options": {"include_usage": true}});
    body.as_object_mut().expect("a body").extend(more.as_object().expect("settings").clone());
    // A stop string that ends the first choice in the middle, by what comes after the move.
    let without = ask_during(cluster.url(), std::slice::from_ref(&body), 0, async || {}).await;
    let text: Vec<char> = without[0].choices[&0].text.chars().collect();
    let from = text.len() * 3 / 4;
    body["stop"] = json!([text[from..from + 9].iter().collect::<String>()]);
    let bodies = [body];
    let expected = ask_during(cluster.url(), &bodies, 0, async || {}).await;
    assert_eq!(expected[0].choices[&0].finish_reason, "stop");
    assert!(expected[0].choices.len() == 3 && expected[0].usage["completion_tokens"].is_u64());

    let (seen, Again { drained, others, moved }) = ask_and_drain(&cluster, &bodies, 20).await;
    seen[0].assert_is(&expected[0]);
    assert_eq!(moved, 3.0, "each choice goes on by itself");
    assert!(drained > 0.0 && drained <= moved * f64::from(BLOCK_TOKENS), "{drained} tokens");
    assert_eq!(others, 0.0);
}

#[tokio::test]
async fn an_answer_that_fills_its_instance_goes_on_where_there_is_more_room() {
    let cluster =
        Cluster::start(&["--prefill", "1", "--decode", "0", "--set", "server.runtime.kv_blocks=24"]).await;
    let small = cluster.instance_of("mixed").await;
    cluster.run_ctl(&["set-role", &small, "mixed"]).await;
    let mut body = request(cluster.model(), &long_prompt(60), 400, true);
    let more =
        json!({"temperature": 0.8, "seed": 7, "logprobs": true, "stream_options": {"include_usage": true}});
    body.as_object_mut().expect("a body").extend(more.as_object().expect("settings").clone());
    let bodies = [body];
    let short = ask_during(cluster.url(), &bodies, 0, async || {}).await;
    assert_eq!(short[0].choices[&0].finish_reason, "length");
    let all = u64::from(24 * BLOCK_TOKENS + 1);
    assert_eq!(short[0].usage["total_tokens"], all, "the cache holds all but the last token");

    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut server = Command::new(binary("baton-server"));
    server.args(["--instance-id", "large", "--controller", cluster.controller(), "--listen", "127.0.0.1:0"]);
    server.args(["--set", "runtime.threads=1", "--model"]).arg(model());
    let _large = Service::start(&mut server, &dir.path().join("large.log"));
    eventually("another instance", || async { (cluster.roles().await.len() == 2).then_some(()) }).await;
    cluster.run_ctl(&["set-role", "large", "mixed"]).await;
    let serve = async |roles: [&str; 2]| {
        eventually("roles", || async { (cluster.roles().await == roles).then_some(()) }).await;
    };
    serve(["mixed", "mixed"]).await;
    cluster.run_ctl(&["cordon", &small]).await;
    serve(["mixed", "none"]).await;
    let expected = ask_during(cluster.url(), &bodies, 0, async || {}).await;
    assert_eq!(expected[0].usage["completion_tokens"], 400);
    cluster.run_ctl(&["uncordon", &small]).await;
    serve(["mixed", "mixed"]).await;
    cluster.run_ctl(&["cordon", "large"]).await;
    serve(["mixed", "none"]).await;
    let seen = ask_during(cluster.url(), &bodies, 20, async || {
        cluster.run_ctl(&["uncordon", "large"]).await;
        serve(["mixed", "mixed"]).await;
    })
    .await;
    assert_eq!(seen[0].choices, expected[0].choices);
    assert_eq!(seen[0].usage["completion_tokens"], 400);
    assert_eq!(moved(&cluster, "kv_exhausted").await, 1.0);
    cluster.assert_nothing_held().await;
}
