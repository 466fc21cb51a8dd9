//! Processes killed with -9: what the client sees, what is left behind, and how the cluster comes back.

use baton_integration_tests::{
    Cluster,
    chat::{Events, ask, long_prompt, request},
    eventually,
};
use rustix::process::Signal;

async fn serves_again(cluster: &Cluster) {
    let body = request(cluster.model(), "What is the capital of France?", 12, false);
    eventually("an answer after the fault", || async {
        let answer =
            reqwest::Client::new().post(format!("{}/v1/chat/completions", cluster.url())).json(&body).send();
        let answer = answer.await.ok()?.error_for_status().ok()?;
        answer.text().await.ok()?.contains("Paris").then_some(())
    })
    .await;
    cluster.assert_nothing_held().await;
}

#[tokio::test]
async fn killed_decode_ends_its_streams_with_one_clear_error_and_comes_back() {
    let cluster = Cluster::start(&[]).await;
    let decode = cluster.instance_of("decode").await;
    let roles = cluster.role_epochs().await;

    let mut events =
        Events::open(cluster.url(), &request(cluster.model(), "Tell me a story.", 4000, true)).await;
    for _ in 0..5 {
        events.next().await.expect("the stream goes on");
    }
    let killed = cluster.kill(&decode, Signal::KILL);
    let (_, error) = events.rest().await;
    let error = error.expect("the stream ends with an error");
    assert_eq!(error["code"], "instance_lost", "{error}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");

    cluster.assert_restarted(&decode, killed).await;
    serves_again(&cluster).await;
    assert_eq!(cluster.role_epochs().await.keys().collect::<Vec<_>>(), roles.keys().collect::<Vec<_>>());
    assert_eq!(cluster.instance_of("decode").await, decode, "a quick restart keeps the role");
}

#[tokio::test]
async fn killed_while_the_cache_crosses_leaves_no_block_on_the_other_side() {
    let cluster = Cluster::start(&[]).await;
    for role in ["decode", "prefill"] {
        let victim = cluster.instance_of(role).await;
        let body = request(cluster.model(), &long_prompt(3000), 50, true);
        let url = cluster.url().to_owned();
        let asking = tokio::spawn(async move {
            reqwest::Client::new()
                .post(format!("{url}/v1/chat/completions"))
                .json(&body)
                .send()
                .await?
                .text()
                .await
        });
        eventually("the prompt is being computed", || async {
            (cluster.blocks_held().await > 0.0).then_some(())
        })
        .await;
        let killed = cluster.kill(&victim, Signal::KILL);
        let answer = asking.await.expect("the client does not panic").expect("the coordinator answers");
        // Nothing had been said yet, so the request may be placed again and complete; or it ends with one clear error.
        let whole = answer.contains("\"finish_reason\":\"length\"") && answer.ends_with("data: [DONE]\n\n");
        let refused = answer.matches("\"error\"").count() == 1 && answer.contains("\"message\"");
        assert!(whole != refused, "{role}: {answer}");
        cluster.assert_restarted(&victim, killed).await;
        serves_again(&cluster).await;
    }
}

#[tokio::test]
async fn killed_controller_changes_no_role_and_stops_no_traffic() {
    let cluster = Cluster::start(&[]).await;
    let before = cluster.role_epochs().await;
    let reference = ask(cluster.url(), &request(cluster.model(), "Tell me a story.", 200, false)).await;

    let events = Events::open(cluster.url(), &request(cluster.model(), "Tell me a story.", 200, true)).await;
    let killed = cluster.kill("controller", Signal::KILL);
    let (text, error) = events.rest().await;
    assert_eq!(error, None);
    assert_eq!(text, reference);
    assert_eq!(
        ask(cluster.url(), &request(cluster.model(), "Tell me a story.", 200, false)).await,
        reference
    );

    cluster.assert_restarted("controller", killed).await;
    eventually("both servers registered again", || async {
        (cluster.role_epochs().await == before).then_some(())
    })
    .await;
    serves_again(&cluster).await;
}

#[tokio::test]
async fn killed_coordinator_comes_back_on_the_same_address() {
    let cluster = Cluster::start(&[]).await;
    let mut events =
        Events::open(cluster.url(), &request(cluster.model(), "Tell me a story.", 4000, true)).await;
    events.next().await.expect("the stream goes on");
    let killed = cluster.kill("coordinator", Signal::KILL);
    while events.next().await.is_some() {}
    // The supervisor holds the listener: requests made meanwhile wait, none is refused.
    let answer =
        ask(cluster.url(), &request(cluster.model(), "What is the capital of France?", 12, false)).await;
    assert!(answer.contains("Paris"), "{answer}");
    cluster.assert_restarted("coordinator", killed).await;
    cluster.assert_nothing_held().await;
}
