//! The whole product with tiny models of other families, whose caches and blocks are unlike LLaMA's: from the tokeniser
//! over the handoff to the answer.

use baton_integration_tests::{
    Cluster,
    chat::{ask, ask_all, request},
    folder,
};
use serde_json::Value;

/// Prompts within a block, on its border and over several; their tokens are bytes, more or less.
fn requests(model: &str) -> Vec<Value> {
    let prompts = ["Hi".to_owned(), "the hen in the rain".to_owned(), "an inn on a river ".repeat(7)];
    prompts.iter().map(|prompt| request(model, prompt, 40, false)).collect()
}

/// Answers of one model with prefill and decode apart are those of one instance.
async fn apart_equals_mixed(name: &str) {
    let model = folder().join("../server/runtime/tests/reference/tiny").join(name);
    let apart = Cluster::start_with(&model, &["--prefill", "1", "--decode", "1"]).await;
    assert_eq!((apart.model(), apart.roles().await), (name, vec!["decode".to_owned(), "prefill".to_owned()]));
    let requests = requests(name);
    let together = ask_all(apart.url(), &requests).await;
    let again = ask(apart.url(), &requests[2]).await;
    apart.assert_nothing_held().await;
    let handed_off = apart.server_metric("baton_server_transfers_out_total", "").await;
    assert!(handed_off >= requests.len() as f64, "only {handed_off} caches crossed");
    apart.stop().await;

    let mixed = Cluster::start_with(&model, &["--prefill", "1", "--decode", "0"]).await;
    let alone = ask_all(mixed.url(), &requests).await;
    mixed.stop().await;

    assert!(alone.iter().all(|text| !text.is_empty()) && alone[0] != alone[1], "{alone:?}");
    assert_eq!(together, alone, "{name}: apart against mixed");
    assert_eq!(again, alone[2], "{name}: asked once more");
}

#[tokio::test]
async fn a_qwen2_apart_equals_mixed() {
    apart_equals_mixed("hf-bf16-qwen2-ratio8-tied").await;
}

#[tokio::test]
async fn a_qwen3_apart_equals_mixed() {
    apart_equals_mixed("hf-bf16-qwen3-wide-heads").await;
}

#[tokio::test]
async fn a_qwen_with_experts_apart_equals_mixed() {
    apart_equals_mixed("hf-bf16-qwen3moe-some-dense").await;
}

#[tokio::test]
async fn a_deepseek_with_latents_apart_equals_mixed() {
    apart_equals_mixed("hf-bf16-deepseek3-yarn-mtp").await;
}
