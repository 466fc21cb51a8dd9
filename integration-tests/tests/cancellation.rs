//! A client that goes away, in whatever phase, leaves nothing behind on either side.

use std::time::Duration;

use baton_integration_tests::{
    Cluster,
    chat::{Events, ask, long_prompt, request},
};

#[tokio::test]
async fn leaving_frees_every_block_on_both_sides() {
    let cluster = Cluster::start(&[]).await;

    // While decoding.
    for tokens_seen in [2, 3, 10] {
        let mut events =
            Events::open(cluster.url(), &request(cluster.model(), "Tell me a story.", 4000, true)).await;
        for _ in 0..tokens_seen {
            events.next().await.expect("the stream goes on");
        }
        assert!(cluster.blocks_held().await > 0.0);
        drop(events);
        cluster.assert_nothing_held().await;
    }

    // Before the first token: in the queue, prefilling, handing over; at whatever moment each lands.
    let body = request(cluster.model(), &long_prompt(3000), 4000, true);
    for delay_millis in [0, 5, 20, 80, 200, 400, 800, 1600] {
        let url = format!("{}/v1/chat/completions", cluster.url());
        let asking = reqwest::Client::new().post(url).json(&body).send();
        let left = tokio::time::timeout(Duration::from_millis(delay_millis), asking).await;
        drop(left);
        cluster.assert_nothing_held().await;
    }

    // Not streamed: the answer is one body, the client leaves before it comes.
    let body = request(cluster.model(), "Tell me a story.", 4000, false);
    let asking = tokio::time::timeout(Duration::from_millis(700), ask(cluster.url(), &body)).await;
    assert!(asking.is_err(), "4,000 tokens came in 700 ms");
    cluster.assert_nothing_held().await;

    // And the cluster is as good as new.
    let answer =
        ask(cluster.url(), &request(cluster.model(), "What is the capital of France?", 12, false)).await;
    assert!(answer.contains("Paris"), "{answer}");
}
