//! A bare HTTP client for chat completions, for what the official client hides: raw events, and leaving early.

use futures::StreamExt;
use serde_json::{Value, json};

/// Body of a streamed chat request for `tokens` tokens exactly.
pub fn request(model: &str, prompt: &str, tokens: u32, stream: bool) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": true,
        "stream": stream,
    })
}

/// A prompt of about `words` tokens.
pub fn long_prompt(words: usize) -> String {
    let mut prompt = String::from("Here is a story. ");
    (0..words).for_each(|i| prompt.push_str(["one ", "river ", "and ", "seven ", "stones "][i % 5]));
    prompt
}

/// Server-sent events of one response, one at a time.
pub struct Events {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Events {
    pub async fn open(url: &str, body: &Value) -> Self {
        let response = reqwest::Client::new()
            .post(format!("{url}/v1/chat/completions"))
            .json(body)
            .send()
            .await
            .expect("the coordinator answers");
        assert_eq!(response.status(), 200, "{:?}", response.text().await);
        Self { response, buffer: Vec::new() }
    }

    /// The next event's data, or `None` at the end of the response.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let event = std::str::from_utf8(&event).expect("events are UTF-8").trim_end();
                match event.strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => continue,
                }
            }
            self.buffer.extend_from_slice(&self.response.chunk().await.ok()??);
        }
    }

    /// Every event to the end: the text said, and the error event if there was one.
    pub async fn rest(mut self) -> (String, Option<Value>) {
        let (mut text, mut error) = (String::new(), None);
        while let Some(data) = self.next().await {
            if data == "[DONE]" {
                break;
            }
            let event: Value = serde_json::from_str(&data).expect("each event is JSON");
            if event["error"].is_object() {
                assert!(error.is_none(), "more than one error: {event}");
                error = Some(event["error"].clone());
            }
            text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        }
        (text, error)
    }
}

/// A whole answer's text.
pub async fn ask(url: &str, body: &Value) -> String {
    let response = reqwest::Client::new().post(format!("{url}/v1/chat/completions")).json(body).send().await;
    let response = response.expect("the coordinator answers");
    let status = response.status();
    let answer: Value = response.json().await.expect("answers are JSON");
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["message"]["content"].as_str().expect("an answer has content").to_owned()
}

/// Asks many at once.
pub async fn ask_all(url: &str, bodies: &[Value]) -> Vec<String> {
    futures::stream::iter(bodies).map(|body| ask(url, body)).buffered(bodies.len().max(1)).collect().await
}
