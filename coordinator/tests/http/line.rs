//! Requests that wait for a seat, or for room on an instance: who goes first, who is told to come back, and who leaves.

use std::time::Duration;

use baton_proto::{KeyHash, v1};
use baton_schedule::{Among, Wanted};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use v1::{FinishReason, attach_response::Frame as Answer};

use crate::scripted::{Cluster, Instance, PATIENCE, merge, prompt_of, until};

async fn cluster(
    seats: usize,
    configure: impl FnOnce(&mut baton_coordinator::CoordinatorConfig),
) -> (Cluster, Instance) {
    let configure = |config: &mut baton_coordinator::CoordinatorConfig| {
        config.limits.max_concurrent = seats;
        configure(config);
    };
    let (cluster, [mixed]) = Cluster::start([("m", v1::Role::Mixed)], configure).await;
    (cluster, mixed)
}

/// Sends a request with this prompt, and waits until so many wait in line.
async fn queue(
    cluster: &Cluster,
    key: &str,
    prompt: &str,
    more: Value,
    waiting: i64,
) -> JoinHandle<reqwest::Response> {
    let mut body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 4});
    merge(&mut body, more);
    let request = cluster.client.post(format!("{}/v1/completions", cluster.url)).bearer_auth(key);
    let request = request.timeout(PATIENCE).body(body.to_string());
    let sent = tokio::spawn(async move { request.send().await.expect("an answer") });
    until("it waits", || cluster.service.metrics.queued.get() == waiting).await;
    sent
}

/// The prompt of the next dispatch, which is then answered.
async fn serve(instance: &mut Instance) -> String {
    let dispatch = instance.dispatch().await;
    instance.finish(dispatch.leg, 0, "x", FinishReason::Stop);
    prompt_of(&dispatch).iter().map(|&token| char::from(token as u8)).collect()
}

async fn ends(sent: JoinHandle<reqwest::Response>) -> reqwest::Response {
    sent.await.expect("ends")
}

#[tokio::test]
async fn whoever_has_priority_overtakes() {
    let (cluster, mut mixed) = cluster(1, |_| {}).await;
    let first = queue(&cluster, "", "first", json!({}), 0).await;
    let held = mixed.dispatch().await;
    let mut sent = Vec::new();
    for (waiting, (prompt, priority)) in [("last", 5), ("second", 0), ("next", -5)].into_iter().enumerate() {
        sent.push(queue(&cluster, "", prompt, json!({"priority": priority}), waiting as i64 + 1).await);
    }
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    for expected in ["next", "second", "last"] {
        assert_eq!(serve(&mut mixed).await, expected);
    }
    for sent in sent.into_iter().chain([first]) {
        assert_eq!(ends(sent).await.status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_full_line_takes_who_has_priority_in_place_of_the_last() {
    let (cluster, mut mixed) = cluster(1, |config| config.limits.max_queued = 1).await;
    let first = queue(&cluster, "", "first", json!({}), 0).await;
    let held = mixed.dispatch().await;
    let outranked = queue(&cluster, "", "outranked", json!({"priority": 5}), 1).await;
    let refused = queue(&cluster, "", "refused", json!({"priority": 5}), 1).await;
    let message = |answer: Value| answer["error"]["message"].as_str().expect("a message").to_owned();
    let answer = ends(refused).await;
    assert_eq!(answer.status(), 429);
    let told = message(answer.json().await.expect("is JSON"));
    assert!(told.starts_with("too many requests are waiting"), "{told}");
    let higher = queue(&cluster, "", "higher", json!({"priority": 4}), 1).await;
    let answer = ends(outranked).await;
    assert!(answer.status() == 429 && answer.headers().contains_key("retry-after"), "{answer:?}");
    let told = message(answer.json().await.expect("is JSON"));
    assert!(told.starts_with("others who go before it came while the line was full"), "{told}");
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    assert_eq!(serve(&mut mixed).await, "higher");
    for sent in [first, higher] {
        assert_eq!(ends(sent).await.status(), 200);
    }
    let metrics = cluster.get("/metrics").await.text().await.expect("is read");
    assert!(metrics.contains("baton_coordinator_refusals_total{reason=\"outranked\"} 1"), "{metrics}");
    cluster.at_rest().await;
}

/// A file of keys of these weights.
fn keys(weights: &[(&str, u32)]) -> (tempfile::TempDir, String) {
    let entry = |(name, weight): &(&str, u32)| {
        let hash = KeyHash::of(name).to_hex();
        format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{hash}\"\nweight = {weight}\n")
    };
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("keys.toml");
    std::fs::write(&path, weights.iter().map(entry).collect::<String>()).expect("is written");
    let file = path.to_str().expect("is text").to_owned();
    (directory, file)
}

#[tokio::test]
async fn who_fills_the_line_does_not_keep_others_out_of_it() {
    let (_directory, file) = keys(&[("floods", 1), ("comes", 1)]);
    let (cluster, mut mixed) = cluster(1, |config| {
        config.api_keys.file = file;
        config.limits.max_queued = 4;
    })
    .await;
    let mut sent = vec![queue(&cluster, "floods", "first", json!({}), 0).await];
    let held = mixed.dispatch().await;
    for waiting in 1..=4 {
        sent.push(queue(&cluster, "floods", "floods", json!({"priority": -9}), waiting).await);
    }
    sent.push(queue(&cluster, "comes", "comes", json!({}), 4).await);
    let outranked = ends(sent.remove(4)).await;
    assert!(outranked.status() == 429 && outranked.headers().contains_key("retry-after"), "{outranked:?}");
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    let mut served = Vec::new();
    for _ in 0..4 {
        served.push(serve(&mut mixed).await);
    }
    let turn = served.iter().position(|prompt| prompt == "comes");
    assert!(turn.is_some_and(|turn| turn < 2), "{served:?}");
    for sent in sent {
        assert_eq!(ends(sent).await.status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn tenants_are_served_by_their_weight() {
    let (_directory, file) = keys(&[("one", 1), ("three", 3)]);
    let (cluster, mut mixed) = cluster(1, |config| config.api_keys.file = file).await;
    let mut sent = vec![queue(&cluster, "one", "first", json!({}), 0).await];
    let held = mixed.dispatch().await;
    for waiting in 0..40 {
        let key = if waiting < 20 { "one" } else { "three" };
        sent.push(queue(&cluster, key, &format!("{key:>5}"), json!({}), waiting + 1).await);
    }
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    let mut of_three = 0;
    for _ in 0..24 {
        of_three += usize::from(serve(&mut mixed).await == "three");
    }
    assert!((17..=19).contains(&of_three), "{of_three} of 24");
    for _ in 24..40 {
        serve(&mut mixed).await;
    }
    for sent in sent {
        assert_eq!(ends(sent).await.status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_busy_instance_is_waited_for_and_the_receipt_says_how_long() {
    let (cluster, mut mixed) = cluster(8, |config| config.placement.room = Duration::from_secs(1)).await;
    let say = |tokens| {
        let load = v1::InstanceLoad { queued_prefill_tokens: tokens, ..Default::default() };
        mixed.say(Answer::Load(load));
    };
    say(1 << 20);
    let (board, new) = (&cluster.service.placer.board, Wanted::new(1, 1, "r1"));
    let new = Wanted { among: Among::Roomy, ..new };
    until("it is known", || board.book(&new).is_err()).await;
    let sent = queue(&cluster, "", "waits", json!({}), 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    say(0);
    let dispatch = mixed.dispatch().await;
    let card = cluster.service.roster.list().remove(0);
    let waited = card.placings().0[0].waited;
    assert!(waited >= Duration::from_millis(50) && waited < PATIENCE, "{waited:?}");
    mixed.finish(dispatch.leg, 0, "x", FinishReason::Stop);
    assert_eq!(ends(sent).await.status(), 200);
    let shown = cluster.get("/metrics").await.text().await.expect("is read");
    assert!(shown.contains("baton_coordinator_queue_wait_seconds_count{model=\"tiny\"} 1"), "{shown}");
    assert!(
        shown.contains("baton_coordinator_queued_by_band{model=\"tiny\",band=\"standard\"} 0"),
        "{shown}"
    );
    cluster.at_rest().await;
}

/// Waiters are woken by it as it comes, and would take it for idle.
#[tokio::test]
async fn an_instance_that_comes_back_is_given_nothing_before_it_has_told_its_load() {
    // If it tells nothing that is not waited for for ever.
    for (tells, waited_for) in [(true, PATIENCE), (false, Duration::from_millis(300))] {
        let (cluster, mut mixed) = cluster(8, |config| {
            config.placement.room = Duration::from_secs(1);
            config.limits.placement_timeout = PATIENCE;
            config.fleet.connect_timeout = waited_for;
        })
        .await;
        mixed.kill().await;
        until("it is known", || !cluster.can_serve()).await;
        let sent = queue(&cluster, "", "waits", json!({}), 1).await;
        mixed.restart_silent().await;
        mixed.greeting().await;
        if tells {
            tokio::time::sleep(Duration::from_millis(100)).await;
            for tokens in [1 << 20, 0] {
                assert!(mixed.is_quiet() && !sent.is_finished(), "it was given something");
                let load = v1::InstanceLoad { queued_prefill_tokens: tokens, ..Default::default() };
                mixed.say(Answer::Load(load));
                until("it is there", || cluster.can_serve()).await;
            }
        }
        assert_eq!(serve(&mut mixed).await, "waits");
        assert_eq!(ends(sent).await.status(), 200);
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn a_full_line_says_when_it_will_have_drained() {
    const TAKES: Duration = Duration::from_millis(250);
    let (cluster, mut mixed) = cluster(1, |config| config.limits.max_queued = 12).await;
    let mut sent = vec![queue(&cluster, "", "first", json!({}), 0).await];
    let mut held = mixed.dispatch().await;
    for waiting in 1..=12 {
        sent.push(queue(&cluster, "", "waits", json!({}), waiting).await);
    }
    for _ in 0..6 {
        tokio::time::sleep(TAKES).await;
        mixed.finish(held.leg, 0, "x", FinishReason::Stop);
        held = mixed.dispatch().await;
    }
    for waiting in 7..=12 {
        sent.push(queue(&cluster, "", "waits", json!({}), waiting).await);
    }
    let refused = ends(cluster.chat(json!({}))).await;
    let after: u64 = refused.headers()["retry-after"].to_str().expect("is text").parse().expect("seconds");
    // Twelve times 250 ms, on a machine that may be slow.
    assert!(refused.status() == 429 && (3..=8).contains(&after), "{after} s");
    let error: Value = refused.json().await.expect("is JSON");
    let message = error["error"]["message"].as_str().expect("a message");
    assert_eq!(message, format!("too many requests are waiting; try again in {after} s"));
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    for _ in 0..12 {
        serve(&mut mixed).await;
    }
    for sent in sent {
        assert_eq!(ends(sent).await.status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn with_nobody_to_serve_it_a_request_is_503_and_with_everybody_busy_429() {
    let (cluster, mut mixed) = cluster(8, |config| {
        config.placement.room = Duration::from_secs(1);
        config.limits.queue_timeout = Duration::from_millis(100);
    })
    .await;
    let load = v1::InstanceLoad { queued_prefill_tokens: 1 << 20, ..Default::default() };
    mixed.say(Answer::Load(load));
    let (board, new) = (&cluster.service.placer.board, Wanted::new(1, 1, "r1"));
    let new = Wanted { among: Among::Roomy, ..new };
    until("it is known", || board.book(&new).is_err()).await;
    let busy = ends(cluster.chat(json!({}))).await;
    assert_eq!(
        (busy.status().as_u16(), &busy.headers()["retry-after"]),
        (429, &"1".parse().expect("a value"))
    );
    mixed.kill().await;
    until("it is missed", || !cluster.can_serve()).await;
    let nobody = ends(cluster.chat(json!({}))).await;
    assert_eq!(nobody.status(), 503);
    cluster.at_rest().await;
}

#[tokio::test]
async fn whoever_leaves_the_line_leaves_at_once() {
    let (cluster, mut mixed) = cluster(1, |_| {}).await;
    let first = queue(&cluster, "", "first", json!({}), 0).await;
    let held = mixed.dispatch().await;
    let gone = queue(&cluster, "", "gone", json!({}), 1).await;
    let stays = queue(&cluster, "", "stays", json!({}), 2).await;
    gone.abort();
    until("it has left", || cluster.service.metrics.queued.get() == 1).await;
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    assert_eq!(serve(&mut mixed).await, "stays");
    assert_eq!((ends(first).await.status().as_u16(), ends(stays).await.status().as_u16()), (200, 200));
    cluster.at_rest().await;
}

#[tokio::test]
async fn those_in_line_are_served_while_the_coordinator_drains() {
    let (cluster, mut mixed) = cluster(1, |_| {}).await;
    let first = queue(&cluster, "", "first", json!({}), 0).await;
    let held = mixed.dispatch().await;
    let waits = queue(&cluster, "", "waits", json!({}), 1).await;
    let service = cluster.shut_down().await;
    mixed.finish(held.leg, 0, "x", FinishReason::Stop);
    assert_eq!(serve(&mut mixed).await, "waits");
    assert_eq!((ends(first).await.status().as_u16(), ends(waits).await.status().as_u16()), (200, 200));
    until("nothing is held", || service.metrics.in_flight.get() == 0).await;
}
