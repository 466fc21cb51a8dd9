//! A group divided by what it is asked for: what clients want shifts, and within two minutes so do the roles, on real
//! servers that measure themselves, under load and without a failure.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use baton_integration_tests::{
    Cluster,
    chat::{ask, long_prompt, request},
};
use serde_json::Value;
use tokio::task::JoinSet;

/// By when a group has to follow.
const BY: Duration = Duration::from_secs(120);

/// Clients that ask without a break until they are dropped: prompts of one kind, no two alike.
struct Clients {
    over: Arc<AtomicBool>,
    tasks: JoinSet<usize>,
}

impl Clients {
    fn ask(cluster: &Cluster, clients: usize, body: fn(&str, usize, usize) -> Value) -> Self {
        let (over, mut tasks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
        for client in 0..clients {
            let (url, model, over) = (cluster.url().to_owned(), cluster.model().to_owned(), over.clone());
            tasks.spawn(async move {
                let mut turn = 0;
                while !over.load(Ordering::Relaxed) {
                    ask(&url, &body(&model, client, turn)).await;
                    turn += 1;
                }
                turn
            });
        }
        Self { over, tasks }
    }

    /// How many answers there were; each was one.
    async fn end(mut self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        let mut answers = 0;
        while let Some(turns) = self.tasks.join_next().await {
            answers += turns.expect("no client saw a failure");
        }
        answers
    }
}

/// A long text, and an answer of next to nothing.
fn summary(model: &str, client: usize, turn: usize) -> Value {
    request(model, &format!("{client} {turn} {}", long_prompt(500)), 2, false)
}

/// A few words, and a long answer.
fn tale(model: &str, client: usize, turn: usize) -> Value {
    request(model, &format!("Tell {client} {turn}"), 80, false)
}

/// Waits until the group is divided so; after how long it was.
async fn until(cluster: &Cluster, roles: &[&str]) -> Duration {
    let begun = Instant::now();
    loop {
        if cluster.roles().await == roles {
            return begun.elapsed();
        }
        if begun.elapsed() > BY {
            let plan = cluster.run_ctl(&["rebalance", "default", "--dry-run"]).await;
            panic!("not {roles:?} after {BY:?}, but {:?}: {plan}", cluster.role_epochs().await);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_follow_what_is_asked_for_within_two_minutes() {
    // Batches of four, so that one instance has not places enough for all who want long answers.
    let few = ["--set", "server.runtime.max_sequences=4"];
    let cluster = Cluster::start(&[&["--prefill", "1", "--decode", "2"][..], &few].concat()).await;
    cluster.run_ctl(&["set-targets", "default", "--ttft", "300ms", "--tpot", "5ms"]).await;
    let long_prompts = Clients::ask(&cluster, 4, summary);
    let first = until(&cluster, &["decode", "prefill", "prefill"]).await;
    let summaries = long_prompts.end().await;
    let long_answers = Clients::ask(&cluster, 12, tale);
    let second = until(&cluster, &["decode", "decode", "prefill"]).await;
    let tales = long_answers.end().await;
    println!("{summaries} summaries: after {first:.1?}; {tales} tales: after {second:.1?}");
    let events = cluster.ctl("events").await;
    let why =
        |event: &&Value| event["kind"] == "role_decided" && event["message"].as_str().is_some_and(forecast);
    assert!(events.iter().filter(why).count() >= 2, "a role that was moved says from which numbers");
    cluster.assert_nothing_held().await;
}

fn forecast(message: &str) -> bool {
    ["TTFT", "TPOT", "better than"].iter().all(|part| message.contains(part))
}
