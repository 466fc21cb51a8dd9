//! A bare HTTP client for chat completions, for what the official client hides: raw events, and leaving early.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::watch;

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

/// One of an answer's choices as its client saw it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    pub text: String,
    /// Of each token, if they were asked for.
    pub logprobs: Vec<Value>,
    pub finish_reason: Value,
}

/// An answer as its client saw it.
#[derive(Debug)]
pub struct Seen {
    pub choices: BTreeMap<u64, Choice>,
    /// Null if it was not asked for.
    pub usage: Value,
    /// Between two tokens.
    pub longest_pause: Duration,
}

impl Seen {
    fn take(&mut self, event: &Value) {
        for piece in event["choices"].as_array().into_iter().flatten() {
            let choice = self.choices.entry(piece["index"].as_u64().expect("an index")).or_default();
            choice.text.push_str(piece["delta"]["content"].as_str().unwrap_or_default());
            choice.logprobs.extend(piece["logprobs"]["content"].as_array().into_iter().flatten().cloned());
            if !piece["finish_reason"].is_null() {
                choice.finish_reason = piece["finish_reason"].clone();
            }
        }
        if !event["usage"].is_null() {
            self.usage = event["usage"].clone();
        }
    }

    /// Of the first choice.
    pub fn into_text(mut self) -> String {
        self.choices.remove(&0).unwrap_or_default().text
    }

    /// Whether it says the same, and counts the same.
    pub fn assert_is(&self, other: &Self) {
        assert_eq!(self.choices, other.choices);
        assert_eq!(self.usage, other.usage);
    }
}

/// Reads a stream to its end; every event says to `said` that there was one more.
async fn read(url: String, body: Value, said: watch::Sender<usize>) -> Seen {
    let mut events = Events::open(&url, &body).await;
    let mut seen = Seen { choices: BTreeMap::new(), usage: Value::Null, longest_pause: Duration::ZERO };
    let mut last = Instant::now();
    while let Some(data) = events.next().await.filter(|data| data != "[DONE]") {
        let event: Value = serde_json::from_str(&data).expect("each event is JSON");
        assert!(event["error"].is_null(), "the stream failed: {event}");
        seen.take(&event);
        // Until the first token it waits for prefill.
        if *said.borrow() > 1 {
            seen.longest_pause = seen.longest_pause.max(last.elapsed());
        }
        last = Instant::now();
        said.send_modify(|events| *events += 1);
    }
    seen
}

/// Asks all at once, and does `fault` when every stream has said `after` events.
pub async fn ask_during(url: &str, bodies: &[Value], after: usize, fault: impl AsyncFnOnce()) -> Vec<Seen> {
    let (mut streams, mut saids) = (Vec::new(), Vec::new());
    for body in bodies {
        let (say, said) = watch::channel(0);
        streams.push(tokio::spawn(read(url.to_owned(), body.clone(), say)));
        saids.push(said);
    }
    for said in &mut saids {
        said.wait_for(|events| *events >= after).await.expect("the stream goes on");
    }
    fault().await;
    let mut seen = Vec::new();
    for stream in streams {
        seen.push(stream.await.expect("no stream fails"));
    }
    seen
}
