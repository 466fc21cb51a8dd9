//! Bugs of the coordinator's own that an answer meets: it fails, is told so, and is counted so.

use baton_coordinator::requests::Lookup;
use baton_proto::{ErrorCode, v1};
use serde_json::json;
use v1::{FinishReason, leg_output::End};

use crate::scripted::{Cluster, Instance, other};

/// To spell it panics, as no byte is it.
const NO_TOKEN: u32 = 999;

/// A model with room for an answer that is not written on the spot.
async fn cluster() -> (Cluster, Instance) {
    let (cluster, [mixed]) = Cluster::start_with(other(), [("m", v1::Role::Mixed)], |_| {}).await;
    (cluster, mixed)
}

/// So many tokens of a leg that ends with them, each beside one that cannot be written.
fn finish(mixed: &Instance, leg: u64, first_position: u32, tokens: usize) {
    let scored = v1::TokenLogprobs { logprob: -1.0, top_tokens: vec![NO_TOKEN], top_logprobs: vec![-2.0] };
    let finished = v1::Finished { reason: FinishReason::Length.into(), ..Default::default() };
    let end = Some(End::Finished(finished));
    mixed.scored(leg, first_position, &"a".repeat(tokens), vec![scored; tokens], end);
}

/// So many requests have ended, all of them by a bug, of which operators are told.
async fn met_bugs(cluster: &Cluster, requests: &[String]) {
    cluster.at_rest().await;
    for id in requests {
        let Some(Lookup::Ended(card)) = cluster.service.roster.find(id) else { panic!("{id} is not kept") };
        assert_eq!(card.error().map(|error| error.code), Some(ErrorCode::Internal));
    }
    let metrics = cluster.get("/metrics").await.text().await.expect("is read");
    let ended: Vec<_> =
        metrics.lines().filter(|line| line.starts_with("baton_coordinator_requests_total{")).collect();
    let all = format!("}} {}", requests.len());
    assert!(
        matches!(ended[..], [line] if line.contains("code=\"internal_error\"") && line.ends_with(&all)),
        "{ended:?}"
    );
}

#[tokio::test]
async fn an_answer_that_cannot_be_written_has_failed() {
    let (cluster, mut mixed) = cluster().await;
    // The second is so long that it is written elsewhere.
    let mut requests = Vec::new();
    for tokens in [2, 1100] {
        let asked = json!({"model": "other", "logprobs": true, "top_logprobs": 1, "max_tokens": tokens});
        let response = cluster.chat(asked);
        let dispatch = mixed.dispatch().await;
        finish(&mixed, dispatch.leg, 0, tokens);
        requests.push(dispatch.request_id);
        let response = response.await.expect("ends");
        assert_eq!(response.status(), 500);
        assert!(response.headers().contains_key("x-request-id"));
    }
    met_bugs(&cluster, &requests).await;
}

#[tokio::test]
async fn a_stream_whose_end_cannot_be_written_breaks_off() {
    let (cluster, mut mixed) = cluster().await;
    let asked = json!({"model": "other", "logprobs": true, "top_logprobs": 1, "stream": true});
    let response = cluster.chat(asked);
    let v1::Dispatch { leg, request_id, .. } = mixed.dispatch().await;
    let fine = v1::TokenLogprobs { logprob: -1.0, ..Default::default() };
    mixed.scored(leg, 0, "a", vec![fine], None);
    let mut response = response.await.expect("begins");
    assert!(response.chunk().await.expect("a first event").is_some());
    finish(&mixed, leg, 1, 1);
    assert!(response.text().await.is_err());
    met_bugs(&cluster, &[request_id]).await;
}
