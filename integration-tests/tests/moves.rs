//! Answers that leave an instance that is frozen, or drains: how long their clients wait, that they read what they would
//! have, and how little is computed again.

use std::time::{Duration, Instant};

use baton_integration_tests::{
    Cluster,
    chat::{ask_during, long_prompt, request},
    eventually, metrics,
};
use rustix::process::Signal;

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

/// Where the metrics of the instance are that prefills.
async fn prefill_metrics(cluster: &Cluster) -> Vec<String> {
    let id = cluster.instance_of("prefill").await;
    let instances = cluster.ctl("instances").await;
    let of = instances.iter().filter(|instance| instance["id"] == id || instance["instance_id"] == id);
    let urls: Vec<_> = of.filter_map(|of| of["metrics_endpoint"].as_str()).collect();
    assert_eq!(urls.len(), 1, "{instances:?}");
    urls.iter().map(|url| format!("http://{url}/metrics")).collect()
}

#[tokio::test]
async fn what_a_frozen_decode_has_goes_on_elsewhere_within_seconds_from_what_prefill_has_cached() {
    let cluster = Cluster::start(&["--prefill", "1", "--decode", "2"]).await;
    let tokens = 60;
    let bodies = [request(cluster.model(), &long_prompt(400), tokens, true)];
    let expected = ask_during(cluster.url(), &bodies, 0, async || {}).await;
    let urls = prefill_metrics(&cluster).await;

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
    assert_eq!(seen[0].text, expected[0].text);
    assert!(seen[0].longest_pause < MOVED_WITHIN, "{:?}", seen[0].longest_pause);
    assert!(seen[0].longest_pause > Duration::from_secs(2), "it was not on the frozen one");
    // Of the prompt fewer than two blocks; what was generated on the frozen one is nowhere else.
    assert!(again < f64::from(tokens + 2 * BLOCK_TOKENS), "{again} tokens were computed again");
    cluster.assert_nothing_held().await;
}

#[tokio::test]
async fn answers_leave_a_decode_that_drains_at_once_and_unchanged() {
    let settings = "coordinator.carry.move_after=0s";
    let cluster = Cluster::start(&["--prefill", "1", "--decode", "2", "--set", settings]).await;
    let question = |i| request(cluster.model(), &format!("Question {i}. {}", long_prompt(100)), 200, true);
    let bodies: Vec<_> = (0..4).map(question).collect();
    let expected = ask_during(cluster.url(), &bodies, 0, async || {}).await;

    let decode = cluster.instance_of("decode").await;
    let mut drained = Duration::ZERO;
    let seen = ask_during(cluster.url(), &bodies, 10, async || {
        let began = Instant::now();
        cluster.run_ctl(&["drain", &decode, "--within", "60s"]).await;
        drained = began.elapsed();
    })
    .await;
    let pause = seen.iter().map(|seen| seen.longest_pause).max().expect("four answers");
    println!("drained in {drained:?}; the longest pause of an answer was {pause:?}");
    for (seen, expected) in seen.iter().zip(&expected) {
        assert_eq!(seen.text, expected.text);
    }
    let text = reqwest::get(format!("{}/metrics", cluster.url())).await.expect("metrics").text().await;
    let moved =
        metrics::sum(&text.expect("a text"), "baton_coordinator_migrations_total", "reason=\"unavailable\"");
    assert!(moved.is_some_and(|moved| moved > 0.0), "nothing was on the one that drained");
    cluster.run_ctl(&["uncordon", &decode]).await;
    cluster.assert_nothing_held().await;
}
