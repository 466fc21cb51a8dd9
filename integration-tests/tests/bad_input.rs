//! Wrong requests, over bare HTTP: each gets an OpenAI-shaped error that names what is wrong.

use baton_integration_tests::Cluster;
use reqwest::{Method, Response};
use serde_json::{Value, json};

async fn error_of(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.expect("a body");
    let body: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: not JSON: {text}"));
    let error = body["error"].clone();
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{status}: {body}");
    assert!(
        error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(),
        "{body}"
    );
    (status, error)
}

#[tokio::test]
async fn wrong_requests_get_clear_errors() {
    let cluster = Cluster::start(&[]).await;
    let client = reqwest::Client::new();
    let chat = format!("{}/v1/chat/completions", cluster.url());
    let post = |body: String| client.post(&chat).header("content-type", "application/json").body(body).send();
    let ok =
        json!({"model": cluster.model(), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});

    let (status, error) = error_of(post("{\"model\": ".into()).await.unwrap()).await;
    assert_eq!(status, 400, "{error}");
    assert!(error["message"].as_str().unwrap().contains("column"), "{error}");

    let cases = [
        ("model", json!({"model": "nope"}), 404),
        ("model", json!({"model": 3}), 400),
        ("messages", json!({"messages": []}), 400),
        ("messages", json!({"messages": "Hi"}), 400),
        ("messages", json!({"messages": [{"role": "wizard", "content": "Hi"}]}), 400),
        ("messages", json!({"messages": [{"role": "user", "content": "word ".repeat(20_000)}]}), 400),
        ("temperature", json!({"temperature": -1}), 400),
        ("temperature", json!({"temperature": "hot"}), 400),
        ("top_p", json!({"top_p": 1.5}), 400),
        ("min_p", json!({"min_p": -0.5}), 400),
        ("top_k", json!({"top_k": 1.5}), 400),
        ("frequency_penalty", json!({"frequency_penalty": 9}), 400),
        ("presence_penalty", json!({"presence_penalty": -9}), 400),
        ("repetition_penalty", json!({"repetition_penalty": -1}), 400),
        ("max_tokens", json!({"max_tokens": 0}), 400),
        ("max_completion_tokens", json!({"max_completion_tokens": -4}), 400),
        ("stop", json!({"stop": [1]}), 400),
        ("stream_options", json!({"stream_options": {"include_usage": true}}), 400),
        ("n", json!({"n": 33}), 400),
        ("best_of", json!({"best_of": 2}), 400),
        ("logprobs", json!({"logprobs": "yes"}), 400),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 21}), 400),
        ("logit_bias", json!({"logit_bias": {"word": 1}}), 400),
        ("tools", json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), 400),
    ];
    for (field, change, expected) in cases {
        let mut body = ok.clone();
        change.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
        let (status, error) = error_of(post(body.to_string()).await.unwrap()).await;
        let shown: String = change.to_string().chars().take(80).collect();
        assert_eq!(status, expected, "{shown}: {error}");
        let param = error["param"].as_str().unwrap_or_else(|| panic!("{shown}: no param: {error}"));
        assert!(
            param == field
                || param.starts_with(&format!("{field}["))
                || param.starts_with(&format!("{field}.")),
            "{shown}: {error}"
        );
    }

    let huge = post(
        json!({"model": "x", "messages": [{"role": "user", "content": "a".repeat(40 << 20)}]}).to_string(),
    );
    let (status, error) = error_of(huge.await.unwrap()).await;
    assert_eq!(status, 413, "{error}");

    let (status, _) = error_of(client.get(&chat).send().await.unwrap()).await;
    assert_eq!(status, 405);
    let (status, _) =
        error_of(client.post(format!("{}/v1/nothing", cluster.url())).send().await.unwrap()).await;
    assert_eq!(status, 404);
    let (status, _) =
        error_of(client.get(format!("{}/v1/models/nope", cluster.url())).send().await.unwrap()).await;
    assert_eq!(status, 404);

    for path in ["/health", "/readiness", "/metrics", "/v1/models"] {
        let answer = client.request(Method::GET, format!("{}{path}", cluster.url())).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
    }
    assert_eq!(post(ok.to_string()).await.unwrap().status(), 200);
    cluster.assert_nothing_held().await;
}
