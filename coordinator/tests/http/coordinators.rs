//! Several coordinators over the same instances: each knows its own work exactly and that of the others by what
//! instances report.

use baton_proto::{InstanceId, v1};
use baton_schedule::Wanted;
use serde_json::json;
use v1::{FinishReason, Role, attach_response::Frame as Answer};

use crate::scripted::{COORDINATOR, Cluster, Instance, until};

/// Tokens of the prompt of [`Cluster::chat`].
const PROMPT: u64 = 18;

/// Prompt tokens that a coordinator takes to be queued on an instance.
fn queued(cluster: &Cluster, instance: &InstanceId) -> u64 {
    let board = &cluster.service.placer.board;
    let trial = board.book(&Wanted::new(10, 10, "r1")).expect("there is a place");
    let scored = trial.receipt.cheapest.iter().find(|scored| scored.instance == *instance);
    scored.expect("it is a candidate").standing.queued_prefill_tokens
}

async fn until_queued(cluster: &Cluster, instance: &InstanceId, tokens: u64) {
    until(&format!("{tokens} tokens are queued on {instance}"), || queued(cluster, instance) == tokens).await;
}

fn report(instance: &Instance, coordinator: &str, queued_prefill_tokens: u64, seen_leg: Option<u64>) {
    let running_sequences = u32::from(queued_prefill_tokens > 0);
    let load = v1::InstanceLoad { running_sequences, queued_prefill_tokens, seen_leg, ..Default::default() };
    instance.say_to(coordinator, Answer::Load(load));
}

#[tokio::test]
async fn two_coordinators_know_their_own_work_exactly_and_see_each_others() {
    let roles = [("m0", Role::Mixed), ("m1", Role::Mixed)];
    let (one, [mut m0, mut m1]) = Cluster::start(roles, |_| {}).await;
    let two = one.another("coordinator-1").await;
    report(&m1, COORDINATOR, 5000, Some(0));
    report(&m1, "coordinator-1", 5000, Some(0));
    until_queued(&one, &m1.id, 5000).await;
    until_queued(&two, &m1.id, 5000).await;

    let of_one = one.chat(json!({"max_tokens": 2}));
    let first = m0.dispatch().await;
    assert_eq!((queued(&one, &m0.id), queued(&two, &m0.id)), (PROMPT, 0), "nobody has told the other yet");
    // Made before the leg came, and on its way for long.
    report(&m0, COORDINATOR, 7, Some(0));
    report(&m0, "coordinator-1", PROMPT, Some(0));
    until_queued(&one, &m0.id, PROMPT + 7).await;
    until_queued(&two, &m0.id, PROMPT).await;

    let of_two = two.chat(json!({"max_tokens": 2}));
    let second = m0.dispatch().await;
    assert_eq!(queued(&two, &m0.id), 2 * PROMPT);
    report(&m0, COORDINATOR, 2 * PROMPT, Some(first.leg));
    report(&m0, "coordinator-1", 2 * PROMPT, Some(second.leg));
    until_queued(&one, &m0.id, 2 * PROMPT).await;
    // A little of the first prompt is left when a report is made: it is believed.
    report(&m0, "coordinator-1", PROMPT + 3, Some(second.leg));
    until_queued(&two, &m0.id, PROMPT + 3).await;
    // The end of its own prompt is known to each at once, of the other's with the next report.
    m0.tokens(first.leg, 0, "a");
    until_queued(&one, &m0.id, PROMPT).await;
    assert_eq!(queued(&two, &m0.id), PROMPT + 3);
    report(&m0, "coordinator-1", PROMPT, Some(second.leg));
    until_queued(&two, &m0.id, PROMPT).await;

    // With this much on one, a third request goes to the other, whoever is asked.
    for (coordinator, seen) in [(COORDINATOR, first.leg), ("coordinator-1", second.leg)] {
        report(&m0, coordinator, 9000, Some(seen));
    }
    until_queued(&one, &m0.id, 9000).await;
    until_queued(&two, &m0.id, 9000).await;
    for (cluster, coordinator) in [(&one, COORDINATOR), (&two, "coordinator-1")] {
        let response = cluster.chat(json!({"max_tokens": 1}));
        let third = m1.dispatch().await;
        finish(&m1, coordinator, third.leg, 0, "x");
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    finish(&m0, COORDINATOR, first.leg, 1, "b");
    finish(&m0, "coordinator-1", second.leg, 0, "cd");
    assert_eq!(of_one.await.expect("ends").status(), 200);
    assert_eq!(of_two.await.expect("ends").status(), 200);
    one.at_rest().await;
    two.at_rest().await;
}

fn finish(instance: &Instance, coordinator: &str, leg: u64, first_position: u32, text: &str) {
    let finished = v1::Finished { reason: FinishReason::Length.into(), ..Default::default() };
    let output = v1::LegOutput {
        leg,
        first_position,
        tokens: text.bytes().map(u32::from).collect(),
        end: Some(v1::leg_output::End::Finished(finished)),
        ..Default::default()
    };
    instance.say_to(coordinator, Answer::Step(v1::StepOutput { legs: vec![output] }));
}

#[tokio::test]
async fn a_cancelled_leg_is_counted_by_reports_until_its_end_is_told() {
    let (cluster, [mut mixed]) = Cluster::start([("m", Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 2, "stream": true}));
    let leg = mixed.dispatch().await.leg;
    response.abort();
    assert_eq!(mixed.cancelled().await.leg, leg);
    until_queued(&cluster, &mixed.id, 0).await;
    // The dispatch has come, the cancel has not.
    report(&mixed, COORDINATOR, PROMPT + 100, Some(leg));
    until_queued(&cluster, &mixed.id, 100).await;
    finish_cancelled(&mixed, leg);
    report(&mixed, COORDINATOR, 70, Some(leg));
    until_queued(&cluster, &mixed.id, 70).await;
    cluster.at_rest().await;
}

fn finish_cancelled(instance: &Instance, leg: u64) {
    let finished = v1::Finished { reason: FinishReason::Cancelled.into(), ..Default::default() };
    let end = Some(v1::leg_output::End::Finished(finished));
    let output = v1::LegOutput { leg, end, ..Default::default() };
    instance.say(Answer::Step(v1::StepOutput { legs: vec![output] }));
}

#[tokio::test]
async fn an_instance_that_does_not_say_what_it_counts_is_believed_as_its_reports_come() {
    let (cluster, [mut mixed]) = Cluster::start([("m", Role::Mixed)], |_| {}).await;
    let response = cluster.chat(json!({"max_tokens": 2}));
    let leg = mixed.dispatch().await.leg;
    assert_eq!(queued(&cluster, &mixed.id), PROMPT);
    report(&mixed, COORDINATOR, PROMPT + 50, None);
    until_queued(&cluster, &mixed.id, PROMPT + 50).await;
    mixed.tokens(leg, 0, "a");
    until_queued(&cluster, &mixed.id, 50).await;
    mixed.finish(leg, 1, "b", FinishReason::Length);
    assert_eq!(response.await.expect("ends").status(), 200);
    cluster.at_rest().await;
}

#[tokio::test]
async fn instances_are_asked_to_tell_their_load_often_while_they_are_few() {
    let (_cluster, [mut mixed]) = Cluster::start([("m", Role::Mixed)], |_| {}).await;
    let hello = mixed.greeting().await;
    assert_eq!((hello.coordinator_id.as_str(), hello.load_interval_millis), (COORDINATOR, 50));
}
