//! A chat goes on where it began: its next turn is computed by the instance that has the turns before.

use baton_integration_tests::{Cluster, chat::long_prompt, eventually, metrics};
use serde_json::{Value, json};

/// What one request brought.
struct Turn {
    answer: String,
    cached_tokens: u64,
    prompt_tokens: u64,
    /// Its last placement, as `ctl explain placement` shows it.
    placement: Value,
}

async fn turn(cluster: &Cluster, messages: &[Value]) -> Turn {
    let body = json!({
        "model": cluster.model(), "messages": messages, "temperature": 0, "max_tokens": 4, "ignore_eos": true,
    });
    let url = format!("{}/v1/chat/completions", cluster.url());
    let response = reqwest::Client::new().post(url).json(&body).send().await.expect("an answer");
    assert_eq!(response.status(), 200);
    let id = response.headers()["x-request-id"].to_str().expect("is text").to_owned();
    let answer: Value = response.json().await.expect("answers are JSON");
    let said = cluster.run_ctl(&["explain", "placement", &id, "-o", "json"]).await;
    let explained: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    let placements = explained["placements"].as_array().expect("a list");
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("no number in {answer}"));
    Turn {
        answer: answer["choices"][0]["message"]["content"].as_str().expect("content").to_owned(),
        cached_tokens: number(&answer["usage"]["prompt_tokens_details"]["cached_tokens"]),
        prompt_tokens: number(&answer["usage"]["prompt_tokens"]),
        placement: placements.last().expect("it was placed").clone(),
    }
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Blocks that the coordinator knows of.
async fn known_blocks(cluster: &Cluster) -> Option<f64> {
    let text = reqwest::get(format!("{}/metrics", cluster.url())).await.ok()?.text().await.ok()?;
    metrics::sum(&text, "baton_coordinator_cached_blocks", "")
}

#[tokio::test]
async fn the_next_turn_of_a_chat_goes_to_the_instance_that_has_the_first() {
    let cluster = Cluster::start(&["--prefill", "2", "--decode", "1"]).await;
    // Both have measured themselves, so that they compare; no two prompts begin alike beyond the template.
    for warm in 0..4 {
        turn(&cluster, &[said("user", &format!("{warm} {}", long_prompt(60)))]).await;
    }
    let mut chats = Vec::new();
    for pair in [["red", "green"], ["blue", "black"]] {
        let before = known_blocks(&cluster).await.expect("a metric");
        let messages = pair.map(|chat| [said("user", &format!("A {chat} story. {}", long_prompt(400)))]);
        // At once, so that each of the two instances has one of them.
        let firsts = futures::join!(turn(&cluster, &messages[0]), turn(&cluster, &messages[1]));
        let firsts = [firsts.0, firsts.1];
        // It is told, and not only expected; of about every 64 tokens, chosen by names, a block.
        let more = firsts.iter().map(|first| first.prompt_tokens / 64).sum::<u64>() as f64 / 2.0;
        eventually("what is cached is known", || async {
            (known_blocks(&cluster).await? >= before + more).then_some(())
        })
        .await;
        chats.extend(messages.map(|messages| messages.to_vec()).into_iter().zip(firsts));
    }
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let mut used = std::collections::BTreeSet::new();
    for (mut messages, first) in chats {
        messages.push(said("assistant", &first.answer));
        messages.push(said("user", "And then?"));
        let second = turn(&cluster, &messages).await;
        let prefill = &first.placement["prefill_instance"];
        assert_eq!(second.placement["prefill_instance"], *prefill, "{}", second.placement);
        assert!(second.cached_tokens > 300, "{} of {}", second.cached_tokens, second.prompt_tokens);
        let receipt = second.placement["cheapest"].as_array().expect("a list");
        let taken = receipt.iter().find(|candidate| candidate["instance_id"] == *prefill).expect("is there");
        let expected = taken["cached_tokens"].as_u64().expect("a number");
        let told = second.cached_tokens / 2..=second.cached_tokens;
        assert!(told.contains(&expected), "{expected} of {} were expected", second.cached_tokens);
        used.insert(prefill.to_string());
    }
    assert_eq!(used.len(), 2, "all chats were on one instance: nothing is shown");
    cluster.stop().await;
}
