//! A coordinator in this process, between a real HTTP client and scripted instances on loopback.
//!
//! Tests read what instances are sent and answer it step by step; nothing computes anything here. Tokens are bytes.

use std::time::Duration;

use baton_proto::{tokens, v1};
use serde_json::Value;
use tokio::time::timeout;

pub(crate) mod cache;
mod cluster;
mod instance;
mod models;
pub(crate) use cluster::{COORDINATOR, Cluster};
pub(crate) use instance::Instance;
pub(crate) use models::{Watched, other, served};

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `what` is true.
pub(crate) async fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let wait = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never came true: {what}"));
}

/// The tokens of a dispatched prompt.
pub(crate) fn prompt_of(dispatch: &v1::Dispatch) -> Vec<u32> {
    tokens::from_wire(&dispatch.prompt_tokens).expect("whole token ids")
}

pub(crate) fn merge(into: &mut Value, more: Value) {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend(more);
    }
}

/// The events of a stream that has ended, without `data: `.
pub(crate) fn events(body: &str) -> Vec<&str> {
    let events = body.split_terminator("\n\n");
    events.map(|event| event.strip_prefix("data: ").expect("an event")).collect()
}

/// The text that a chat's stream carried.
pub(crate) fn chat_text(events: &[&str]) -> String {
    let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    chunks.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

pub(crate) fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Waits until the only request has this many tokens.
pub(crate) async fn consumed(cluster: &Cluster, tokens: u32) {
    until("the tokens are there", || {
        cluster.service.roster.list().iter().any(|card| card.completion_tokens() == tokens)
    })
    .await;
}

/// Answers one request on a pair: `text`'s first byte by prefill, the rest by decode.
pub(crate) async fn answer(prefill: &mut Instance, decode: &mut Instance, text: &str) {
    let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
    prefill.finish(p.leg, 0, &text[..1], v1::FinishReason::HandedOff);
    decode.finish(d.leg, 1, &text[1..], v1::FinishReason::Length);
}
