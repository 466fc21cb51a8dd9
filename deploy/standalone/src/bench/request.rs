//! One timed, streamed chat request.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use reqwest::{
    StatusCode,
    header::{self, HeaderMap, HeaderValue},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{BenchArgs, BenchError};

/// The endpoint under load.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    client: reqwest::Client,
    url: String,
    model: String,
}

/// What one request took. Times are from sending.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Timing {
    /// When it was sent, from the start of the run.
    pub(super) sent_seconds: f64,
    /// To the first piece of text.
    pub(super) ttft_seconds: f64,
    /// To the end of the answer.
    pub(super) e2e_seconds: f64,
    /// Between one piece of text and the next.
    #[serde(skip)]
    pub(super) gaps_seconds: Vec<f64>,
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

impl Timing {
    /// Mean time of a token after the first; `None` for answers of one token.
    pub(super) fn tpot_seconds(&self) -> Option<f64> {
        let further = self.completion_tokens.checked_sub(1).filter(|&n| n > 0)?;
        Some(self.gaps_seconds.iter().sum::<f64>() / f64::from(further))
    }
}

impl Endpoint {
    /// Finds the endpoint and the model.
    pub(super) async fn connect(args: &BenchArgs) -> Result<Self, BenchError> {
        let headers = args.api_key_file.as_deref().map(bearer).transpose()?.unwrap_or_default();
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .timeout(Duration::from_secs_f64(args.timeout_seconds))
            .pool_max_idle_per_host(usize::MAX)
            .build()
            .map_err(BenchError::Client)?;
        let url = args.url.trim_end_matches('/').to_owned();
        let unreachable = |source| BenchError::Unreachable { url: url.clone(), source };
        let model = match &args.model {
            Some(model) => model.clone(),
            None => {
                let listed = client.get(format!("{url}/v1/models")).send().await.map_err(&unreachable)?;
                if listed.status() == StatusCode::UNAUTHORIZED {
                    return Err(BenchError::Unauthorized(url.clone()));
                }
                let listed: Value = listed.json().await.map_err(&unreachable)?;
                let first = listed["data"][0]["id"].as_str().map(str::to_owned);
                first.ok_or_else(|| BenchError::NoModel { url: url.clone() })?
            }
        };
        Ok(Self { client, url, model })
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// Sends one request and reads its answer to the end. Failures are part of the result.
    pub(super) async fn ask(&self, prompt: &str, output_tokens: u32) -> Timing {
        let mut timing = Timing::default();
        if let Err(error) = self.stream(prompt, output_tokens, &mut timing).await {
            timing.error = Some(error);
        }
        timing
    }

    async fn stream(&self, prompt: &str, output_tokens: u32, timing: &mut Timing) -> Result<(), String> {
        let body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": output_tokens,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let sent = Instant::now();
        let url = format!("{}/v1/chat/completions", self.url);
        let mut response = self.client.post(url).json(&body).send().await.map_err(|error| told(&error))?;
        if !response.status().is_success() {
            let status = response.status();
            return Err(format!("{status}: {}", response.text().await.unwrap_or_default()));
        }
        let (mut buffer, mut last_text) = (Vec::new(), None);
        while let Some(bytes) = response.chunk().await.map_err(|error| told(&error))? {
            let now = Instant::now();
            buffer.extend_from_slice(&bytes);
            while let Some(data) = next_event(&mut buffer) {
                if data == b"[DONE]" {
                    timing.e2e_seconds = (now - sent).as_secs_f64();
                    return Ok(());
                }
                let event: Value =
                    serde_json::from_slice(&data).map_err(|_| "an event that is not JSON".to_owned())?;
                if event["error"].is_object() {
                    return Err(event["error"]["message"].to_string());
                }
                if says_something(&event) {
                    match last_text.replace(now) {
                        None => timing.ttft_seconds = (now - sent).as_secs_f64(),
                        Some(before) => timing.gaps_seconds.push((now - before).as_secs_f64()),
                    }
                }
                if let Some(usage) = event["usage"].as_object() {
                    let count = |key: &str| usage.get(key).and_then(Value::as_u64).unwrap_or(0) as u32;
                    (timing.prompt_tokens, timing.completion_tokens) =
                        (count("prompt_tokens"), count("completion_tokens"));
                }
            }
        }
        Err("the answer ended without [DONE]".into())
    }
}

/// The header that shows the key in a file.
fn bearer(path: &Path) -> Result<HeaderMap, BenchError> {
    let unreadable = |source| BenchError::KeyFile { path: path.to_owned(), source };
    let key = std::fs::read_to_string(path).map_err(unreadable)?;
    let no_key = || BenchError::Key(path.to_owned());
    let key = Some(key.trim()).filter(|key| !key.is_empty()).ok_or_else(no_key)?;
    let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| no_key())?;
    value.set_sensitive(true);
    Ok(HeaderMap::from_iter([(header::AUTHORIZATION, value)]))
}

fn told(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

fn says_something(event: &Value) -> bool {
    event["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty())
}

/// Takes the next `data:` event off the front of the buffer; other events are skipped.
fn next_event(buffer: &mut Vec<u8>) -> Option<Vec<u8>> {
    loop {
        let end = buffer.windows(2).position(|pair| pair == b"\n\n")?;
        let event: Vec<u8> = buffer.drain(..end + 2).take(end).collect();
        if let Some(data) = event.strip_prefix(b"data:") {
            return Some(data.trim_ascii().to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_taken_one_by_one_and_waited_for() {
        let mut buffer = b": ping\n\ndata: {\"a\":1}\n\ndata:[DONE]\n\ndata: half".to_vec();
        assert_eq!(next_event(&mut buffer).as_deref(), Some(b"{\"a\":1}".as_slice()));
        assert_eq!(next_event(&mut buffer).as_deref(), Some(b"[DONE]".as_slice()));
        assert_eq!(next_event(&mut buffer), None);
        buffer.extend_from_slice(b"\n\n");
        assert_eq!(next_event(&mut buffer).as_deref(), Some(b"half".as_slice()));
    }

    #[test]
    fn a_key_is_shown_as_it_stands_in_its_file_and_in_no_debugging() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "sk-baton-1\n").unwrap();
        let headers = bearer(&path).unwrap();
        assert_eq!(headers[header::AUTHORIZATION], "Bearer sk-baton-1");
        assert!(!format!("{headers:?}").contains("sk-baton"));
        for bad in ["", " \n", "a\nb"] {
            std::fs::write(&path, bad).unwrap();
            assert!(bearer(&path).unwrap_err().to_string().contains("does not hold an API key"), "{bad:?}");
        }
        assert!(bearer(&directory.path().join("none")).unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn tpot_is_the_mean_of_further_tokens() {
        let mut timing = Timing { completion_tokens: 5, gaps_seconds: vec![0.1, 0.3], ..Timing::default() };
        assert_eq!(timing.tpot_seconds(), Some(0.1));
        timing.completion_tokens = 1;
        assert_eq!(timing.tpot_seconds(), None);
    }
}
