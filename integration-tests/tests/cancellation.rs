//! A client that goes away, in whatever phase, leaves nothing behind on either side.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use baton_integration_tests::{
    Cluster,
    chat::{Events, ask, long_prompt, request},
    metrics,
};
use tokio::{sync::mpsc, task::JoinSet};

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

/// Streams that go on meanwhile.
const BESIDE: usize = 64;
/// Clients that leave: nine of ten during prefill, with both legs to be cancelled, the others in mid answer.
const CANCELS: usize = 200;
const TOLD_WITHIN: Duration = Duration::from_millis(100);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The time of day at which a line was logged, in UTC.
fn logged_at(line: &str) -> Option<Duration> {
    let time = line.split_once('T')?.1.split_once('Z')?.0;
    let mut parts = time.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    let (hours, minutes, seconds) = (next()?, next()?, next()?);
    Some(Duration::from_secs_f64(hours * 3600.0 + minutes * 60.0 + seconds))
}

fn time_of_day() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970");
    Duration::from_nanos((since.as_nanos() % DAY.as_nanos()) as u64)
}

#[tokio::test]
async fn every_leg_is_told_within_a_tenth_of_a_second_that_its_client_has_left() {
    let level = "server.process.log.level=info,baton_server::inference=debug";
    let cluster = Cluster::start(&["--prefill", "1", "--decode", "1", "--set", level]).await;
    let servers: Vec<_> = cluster.role_epochs().await.into_keys().collect();
    let mut staying = JoinSet::new();
    let (begun, mut begin) = mpsc::channel(BESIDE);
    for beside in 0..BESIDE {
        let body = request(cluster.model(), &format!("Tell me story {beside}."), 4000, true);
        let (url, begun) = (cluster.url().to_owned(), begun.clone());
        staying.spawn(async move {
            let mut events = Events::open(&url, &body).await;
            events.next().await.expect("the stream goes on");
            begun.send(()).await.expect("it is waited for");
            while events.next().await.is_some() {}
        });
    }
    for _ in 0..BESIDE {
        begin.recv().await.expect("all begin");
    }
    // When each left, and how many legs it had.
    let mut left = Vec::new();
    let told = || -> Vec<Duration> {
        let logs: Vec<_> = servers.iter().map(|server| cluster.log(server)).collect();
        let lines = logs.iter().flat_map(|log| log.lines());
        lines.filter(|line| line.contains("client_gone")).filter_map(logged_at).collect()
    };
    let mut expected = 0;
    for leaver in 0..CANCELS {
        let answering = leaver % 10 == 0;
        let words = if answering { 20 } else { 3000 };
        let body = request(cluster.model(), &format!("{leaver}. {}", long_prompt(words)), 4000, true);
        if answering {
            let mut events = Events::open(cluster.url(), &body).await;
            for _ in 0..2 {
                events.next().await.expect("the stream goes on");
            }
            left.push(time_of_day());
            drop(events);
        } else {
            let url = format!("{}/v1/chat/completions", cluster.url());
            let asking = reqwest::Client::new().post(url).json(&body).send();
            let asked = tokio::time::timeout(Duration::from_millis(80), asking).await;
            left.push(time_of_day());
            drop(asked);
        }
        expected += if answering { 1 } else { 2 };
        let asked = Instant::now();
        while told().len() < expected {
            assert!(asked.elapsed() < 50 * TOLD_WITHIN, "leaver {leaver}: not every leg was told");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert!(staying.try_join_next().is_none(), "an answer beside them has ended");
    let mut told = told();
    told.sort();
    // The last to be told before the next has left.
    let last_of = |index: usize| {
        let until = left.get(index + 1).copied().unwrap_or(Duration::MAX);
        let last = told.iter().rev().find(|at| **at < until).expect("it was told");
        last.saturating_sub(left[index])
    };
    let mut took: Vec<_> = (0..left.len()).map(last_of).collect();
    took.sort();
    let of = |share: usize| took[took.len() * share / 100];
    println!(
        "the last leg was told after {:?} (p50), {:?} (p99), {:?} at most",
        of(50),
        of(99),
        took[took.len() - 1]
    );
    assert!(of(99) <= TOLD_WITHIN, "{took:?}");
    drop(staying);
    cluster.assert_nothing_held().await;
}
