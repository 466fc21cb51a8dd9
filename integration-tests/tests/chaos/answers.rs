//! What is asked, and all that has to be the same of an answer whatever happens meanwhile.

use std::time::{Duration, Instant};

use baton_integration_tests::chat::long_prompt;
use futures::StreamExt;
use serde_json::{Value, json};

const MODEL: &str = "SmolLM2-135M-Instruct";

#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) name: String,
    path: &'static str,
    pub(crate) body: Value,
}

impl Question {
    fn streamed(&self) -> bool {
        self.body["stream"] == true
    }
}

/// Of one choice.
#[derive(Debug, Clone, Default, PartialEq)]
struct Choice {
    text: String,
    finish_reason: Option<String>,
    /// Tokens, their log probabilities and those of their alternatives.
    logprobs: Vec<Value>,
}

/// An answer, without its id, its time and what was cached.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Answer {
    choices: Vec<Choice>,
    prompt_tokens: u64,
    completion_tokens: u64,
}

/// When what came came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// The latest of anything that has come.
    pub(crate) last: Instant,
    /// Longest time between two events of a stream, once it has begun.
    pub(crate) gap: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unanswered {
    #[error("no connection: {0}")]
    Connection(#[from] reqwest::Error),
    #[error("status {0}: {1}")]
    Status(u16, String),
    #[error("an error in the stream: {0}")]
    Event(Value),
    #[error("a stream without an end")]
    Cut,
    #[error("no answer in {0:?}")]
    Slow(Duration),
}

impl Unanswered {
    /// Whether a client sees this of a coordinator that is killed, frozen or cut off, or has just come back: no whole
    /// answer, or a word that it, or its instances, cannot be asked now. Anything else it says is wrong of it.
    pub(crate) fn may_be_of_the_harm(&self) -> bool {
        match self {
            Self::Connection(_) | Self::Cut | Self::Slow(_) => true,
            Self::Status(status, _) => [429, 502, 503, 504].contains(status),
            Self::Event(event) => {
                let code = event["error"]["code"].as_str().unwrap_or_default();
                ["unavailable", "instance_lost", "handoff_failed", "deadline_exceeded"].contains(&code)
            }
        }
    }
}

/// A mix: greedy and sampled, one answer and several, stop strings, log probabilities, chats and completions, streamed
/// and not, short prompts and long ones.
pub(crate) fn questions() -> Vec<Question> {
    let mut all = Vec::new();
    for number in 0..18 {
        let tokens = 20 + 5 * (number % 8);
        let words = [6, 40, 120, 12, 260, 30][number % 6];
        let prompt = format!("Question {number}. {}What comes next?", long_prompt(words));
        let mut body = json!({"model": MODEL, "max_tokens": tokens, "ignore_eos": true, "temperature": 0});
        let mut name = format!("{number}, {words} words, {tokens} tokens");
        let mut add = |said: &str, entries: Value| {
            name += said;
            let entries = entries.as_object().expect("entries").clone();
            body.as_object_mut().expect("an object").extend(entries);
        };
        if number % 2 == 1 {
            let seed = 1000 + number;
            add(", sampled", json!({"temperature": 0.9, "top_p": 0.95, "seed": seed}));
        }
        if number % 5 == 3 {
            add(", n = 3", json!({"n": 3}));
        }
        if number % 4 == 2 {
            // Words that come, or half come, in such stories.
            add(", stop strings", json!({"stop": ["seven stones and", "river one seven two", "the end"]}));
        }
        let path = if number % 6 == 5 { "completions" } else { "chat/completions" };
        match path {
            "completions" => add(", completion", json!({"prompt": prompt})),
            _ => add("", json!({"messages": [{"role": "user", "content": prompt}]})),
        }
        if number % 7 == 1 && path != "completions" {
            add(", logprobs", json!({"logprobs": true, "top_logprobs": 2}));
        }
        if number % 3 != 2 {
            add(", streamed", json!({"stream": true, "stream_options": {"include_usage": true}}));
        }
        all.push(Question { name, path, body });
    }
    all
}

/// Asks a coordinator; `came` is called with the times whenever something has come.
pub(crate) async fn ask(
    client: &reqwest::Client,
    url: &str,
    question: &Question,
    mut came: impl FnMut(Times),
) -> Result<Answer, Unanswered> {
    let mut times = Times { last: Instant::now(), gap: Duration::ZERO };
    let response = client.post(format!("{url}/v1/{}", question.path)).json(&question.body).send().await?;
    let status = response.status();
    if !status.is_success() {
        return Err(Unanswered::Status(status.as_u16(), response.text().await.unwrap_or_default()));
    }
    let mut answer = Answer::default();
    if !question.streamed() {
        let whole: Value = response.json().await?;
        answer.add(&whole, "message");
        return Ok(answer);
    }
    let (mut chunks, mut buffer, mut begun) = (response.bytes_stream(), Vec::new(), false);
    while let Some(chunk) = chunks.next().await {
        buffer.extend_from_slice(&chunk?);
        while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            let event = std::str::from_utf8(&event).expect("events are UTF-8").trim_end();
            let Some(data) = event.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(answer);
            }
            let event: Value = serde_json::from_str(data).expect("each event is JSON");
            if event["error"].is_object() {
                return Err(Unanswered::Event(event["error"].clone()));
            }
            answer.add(&event, "delta");
            let now = Instant::now();
            if begun {
                times.gap = times.gap.max(now - times.last);
            }
            (times.last, begun) = (now, true);
            came(times);
        }
    }
    Err(Unanswered::Cut)
}

impl Answer {
    fn add(&mut self, part: &Value, said_in: &str) {
        for said in part["choices"].as_array().into_iter().flatten() {
            let index = said["index"].as_u64().expect("a choice has an index") as usize;
            if self.choices.len() <= index {
                self.choices.resize(index + 1, Choice::default());
            }
            let choice = &mut self.choices[index];
            let text = said[said_in]["content"].as_str().or(said["text"].as_str());
            choice.text += text.unwrap_or_default();
            if let Some(reason) = said["finish_reason"].as_str() {
                let before = choice.finish_reason.replace(reason.to_owned());
                assert_eq!(before, None, "a choice ends once");
            }
            choice.logprobs.extend(said["logprobs"]["content"].as_array().into_iter().flatten().cloned());
        }
        if part["usage"].is_object() {
            let count = |key: &str| part["usage"][key].as_u64().expect("a number of tokens");
            (self.prompt_tokens, self.completion_tokens) =
                (count("prompt_tokens"), count("completion_tokens"));
        }
    }

    /// Whether it says enough to be compared with.
    pub(crate) fn is_whole(&self) -> bool {
        let ended = self.choices.iter().all(|choice| choice.finish_reason.is_some());
        !self.choices.is_empty() && ended && self.completion_tokens > 0
    }
}
