//! A client that goes away, in whatever phase, leaves nothing behind on either side.

use std::time::{Duration, Instant};

use baton_integration_tests::{
    Cluster,
    chat::{Events, ask, long_prompt, request},
    metrics,
};
use tokio::task::JoinSet;

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

/// Clients that leave in mid answer, each beside two that stay.
const LEAVERS: u32 = 20;
/// By when half of them are to be gone. A step that is being computed ends first, and whoever looks competes with it for
/// the processors: none takes ten times as long.
const GONE_WITHIN: Duration = Duration::from_millis(100);
/// Of a leaver's prompt, at 16 tokens each; the answers of those that stay grow by fewer while one is looked at.
const BLOCKS_LEAST: f64 = 20.0;

#[tokio::test]
async fn what_clients_held_is_free_soon_after_they_left() {
    let cluster = Cluster::start(&[]).await;
    let (urls, client) = (cluster.metrics_urls().await, reqwest::Client::new());
    let held = async || {
        let mut held = 0.0;
        for url in &urls {
            let text =
                client.get(url).send().await.expect("the server answers").text().await.expect("a text");
            held += metrics::sum(&text, "baton_server_kv_blocks_used", "").expect("a metric");
        }
        held
    };
    let mut staying = JoinSet::new();
    for of in ["a river", "seven stones"] {
        let body = request(cluster.model(), &format!("Tell me a story of {of}."), 4000, true);
        let mut events = Events::open(cluster.url(), &body).await;
        events.next().await.expect("the stream goes on");
        staying.spawn(async move { while events.next().await.is_some() {} });
    }
    let mut times = Vec::new();
    for leaver in 0..LEAVERS {
        let before = held().await;
        let prompt = format!("{leaver}. {}", long_prompt(400));
        let mut events = Events::open(cluster.url(), &request(cluster.model(), &prompt, 4000, true)).await;
        for _ in 0..4 {
            events.next().await.expect("the stream goes on");
        }
        let with = held().await;
        assert!(with > before + BLOCKS_LEAST, "{before} blocks, and {with} with it");
        drop(events);
        let left = Instant::now();
        while held().await > with - BLOCKS_LEAST {
            assert!(left.elapsed() < 20 * GONE_WITHIN, "its blocks are still held");
        }
        times.push(left.elapsed());
        assert!(staying.try_join_next().is_none(), "an answer beside it has ended");
    }
    times.sort();
    println!("blocks were free after {times:?}");
    assert!(times[times.len() / 2] <= GONE_WITHIN, "{times:?}");
    assert!(times.iter().all(|time| *time <= 10 * GONE_WITHIN), "{times:?}");
    drop(staying);
    cluster.assert_nothing_held().await;
}
