//! OpenAI's response bodies: whole answers, chunks of streams, models, errors.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};
use baton_proto::{ApiError, ErrorCode, RequestId};
use bytes::Bytes;
use serde::Serialize;
use serde_json::json;

use super::logprobs;
use crate::{
    admit::RETRY_AFTER,
    fleet::StopReason,
    models::Models,
    prepare::{Endpoint, Served, Shape, TextModel},
    stream::{Delta, Usage},
};

const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Of what has gathered of a choice, an event has no more bytes of text than this, and no more tokens with log probabilities.
pub(super) const TEXT_MOST: usize = 32 << 10;
const SCORED_MOST: usize = 64;

/// The `usage` object.
fn usage_json(usage: &Usage) -> serde_json::Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

pub(super) fn json_response(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// `{"error": {...}}`.
pub fn error_json(error: &ApiError) -> Vec<u8> {
    let body = json!({ "error": {
        "message": error.message,
        "type": error.code.openai_type(),
        "param": error.param,
        "code": error.code.name(),
    }});
    body.to_string().into_bytes()
}

/// The error with its status, and when to try again where that helps.
pub fn error_response(error: &ApiError) -> Response {
    let status = StatusCode::from_u16(error.code.http()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json_response(status, error_json(error));
    let wait = match (status, error.retry_after) {
        // It can never be served within its key's limits. OpenAI's clients would try again without this.
        (_, None) if error.code == ErrorCode::RateLimited => {
            response.headers_mut().insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
            None
        }
        (StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, wait) => {
            Some(wait.unwrap_or(RETRY_AFTER))
        }
        _ => None,
    };
    if let Some(wait) = wait {
        // Rounded up, so that nobody comes too early.
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    if error.code == ErrorCode::InvalidApiKey {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(error.code, ErrorCode::PayloadTooLarge | ErrorCode::RequestTimeout) {
        // The rest of the body may still be on its way.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// An entry of `/v1/models`: a name that requests may use.
#[derive(Serialize)]
struct Name<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// What answers call the model.
    root: &'a str,
    max_model_len: u32,
}

fn entry<'a>(served: &'a Served, id: &'a str) -> Name<'a> {
    let (root, max_model_len) = (&*served.name, served.context_tokens);
    Name { id, object: "model", created: served.since, owned_by: "baton", root, max_model_len }
}

pub(super) fn models(models: &Models) -> Response {
    let entries = models.iter().flat_map(|model| {
        let served = &model.served;
        served.names().map(|name| entry(served, name))
    });
    let body = json!({ "object": "list", "data": entries.collect::<Vec<_>>() });
    json_response(StatusCode::OK, body.to_string().into_bytes())
}

/// `id` is one of its names.
pub(super) fn model(served: &Served, id: &str) -> Response {
    json_response(StatusCode::OK, json!(entry(served, id)).to_string().into_bytes())
}

/// How one request is answered: its shape, and what all of its chunks have in common, written once.
pub(super) struct Voice {
    shape: Shape,
    text: Arc<dyn TextModel>,
    /// `{"id": ..., "object": ..., ` up to the choices.
    head: Bytes,
}

impl Voice {
    pub(super) fn new(served: &Served, shape: Shape, request: &RequestId) -> Self {
        #[derive(Serialize)]
        struct Common<'a> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
            system_fingerprint: &'a str,
        }
        let (prefix, object) = match (shape.endpoint, shape.stream) {
            (Endpoint::Chat, false) => ("chatcmpl-", "chat.completion"),
            (Endpoint::Chat, true) => ("chatcmpl-", "chat.completion.chunk"),
            (Endpoint::Text, _) => ("cmpl-", "text_completion"),
        };
        let common = Common {
            id: &format!("{prefix}{request}"),
            object,
            created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            model: &served.name,
            system_fingerprint: &served.fingerprint(),
        };
        let mut head = Vec::new();
        write_json(&mut head, &common);
        // The closing brace.
        head.truncate(head.len().saturating_sub(1));
        head.extend_from_slice(b",\"choices\":[");
        Self { shape, text: served.text.clone(), head: head.into() }
    }

    /// The whole answer, as JSON.
    pub(super) fn whole(&self, choices: &[Delta], usage: &Usage) -> Vec<u8> {
        let mut out = self.head.to_vec();
        for (index, delta) in choices.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            let (before, after): (&[u8], &[u8]) = match self.shape.endpoint {
                Endpoint::Chat => (br#""message":{"role":"assistant","content":"#, br#","refusal":null}"#),
                Endpoint::Text => (br#""text":"#, b""),
            };
            self.choice(&mut out, index, delta, |out| {
                out.extend_from_slice(before);
                write_json(out, &delta.text);
                out.extend_from_slice(after);
            });
        }
        out.extend_from_slice(b"],\"usage\":");
        write_json(&mut out, &usage_json(usage));
        out.push(b'}');
        out
    }

    /// The chunks that open a chat, one for each choice.
    pub(super) fn opening(&self, out: &mut Vec<u8>, choices: usize) {
        if self.shape.endpoint == Endpoint::Chat {
            for index in 0..choices {
                self.chunk(out, index, &Delta::default(), |out| {
                    out.extend_from_slice(br#""delta":{"role":"assistant","content":""}"#);
                });
            }
        }
    }

    /// What one choice has to say: a chunk of text if there is any, and one that closes it at its end. Leaves in `delta` what
    /// is more than an event may have; of a choice with much of both, text goes ahead of its tokens.
    pub(super) fn delta(&self, out: &mut Vec<u8>, index: usize, delta: &mut Delta) {
        let finish = delta.finish.take();
        let (open, close, nothing): (&[u8], &[u8], &[u8]) = match self.shape.endpoint {
            Endpoint::Chat => (br#""delta":{"content":"#, b"}", br#""delta":{}"#),
            Endpoint::Text => (br#""text":"#, b"", br#""text":"""#),
        };
        if !delta.is_empty() {
            let text = beginning(&delta.text);
            self.chunk(out, index, delta, |out| {
                out.extend_from_slice(open);
                write_json(out, &text);
                out.extend_from_slice(close);
            });
            delta.told(text.len(), SCORED_MOST);
        }
        if !delta.is_empty() {
            delta.finish = finish;
        } else if finish.is_some() {
            let end = Delta { finish, ..Delta::default() };
            self.chunk(out, index, &end, |out| out.extend_from_slice(nothing));
        }
    }

    /// What follows the last choice's end: usage if it was asked for, and the end mark.
    pub(super) fn closing(&self, out: &mut Vec<u8>, usage: &Usage) {
        if self.shape.include_usage {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            write_json(out, &usage_json(usage));
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// The event that ends a stream that failed; no end mark follows.
    pub(super) fn failure(&self, out: &mut Vec<u8>, error: &ApiError) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&error_json(error));
        out.extend_from_slice(b"\n\n");
    }

    /// What comes before the text in each event of an only choice that has nothing but text to tell.
    pub(super) fn before_text(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&self.head);
        out.extend_from_slice(match self.shape.endpoint {
            Endpoint::Chat => br#"{"index":0,"delta":{"content":"#,
            Endpoint::Text => br#"{"index":0,"text":"#,
        });
    }

    /// The text of such an event, and what comes after it.
    pub(super) fn text(&self, out: &mut Vec<u8>, text: &str) {
        write_json(out, &text);
        if self.shape.endpoint == Endpoint::Chat {
            out.push(b'}');
        }
        out.extend_from_slice(br#","logprobs":null,"finish_reason":null}"#);
        self.end(out);
    }

    /// One event with one choice.
    fn chunk(&self, out: &mut Vec<u8>, index: usize, delta: &Delta, body: impl FnOnce(&mut Vec<u8>)) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&self.head);
        self.choice(out, index, delta, body);
        self.end(out);
    }

    /// What comes after an event's choices.
    fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.shape.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" });
    }

    /// One choice: its index, what `body` writes, and what `delta` says besides text.
    fn choice(&self, out: &mut Vec<u8>, index: usize, delta: &Delta, body: impl FnOnce(&mut Vec<u8>)) {
        out.extend_from_slice(br#"{"index":"#);
        write_json(out, &index);
        out.push(b',');
        body(out);
        out.extend_from_slice(br#","logprobs":"#);
        // A chunk without tokens has none to tell; a whole answer that was to tell them has a list, be it empty.
        if self.shape.logprobs && !(self.shape.stream && delta.tokens.is_empty()) {
            let most = if self.shape.stream { SCORED_MOST } else { usize::MAX };
            let tokens = delta.tokens.iter().take(most);
            write_json(out, &logprobs::object(self.shape.endpoint, &*self.text, tokens));
        } else {
            out.extend_from_slice(b"null");
        }
        out.extend_from_slice(br#","finish_reason":"#);
        out.extend_from_slice(match delta.finish {
            None => b"null",
            Some(StopReason::Stop) => br#""stop""#,
            Some(StopReason::Length) => br#""length""#,
        });
        out.push(b'}');
    }
}

/// As much of a text as an event may have.
fn beginning(text: &str) -> &str {
    let most = text.len().min(TEXT_MOST);
    let end = (0..=most).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or_default()]
}

/// Writing to memory, of types that JSON can say, cannot fail.
fn write_json(out: &mut Vec<u8>, value: &impl Serialize) {
    let _ = serde_json::to_writer(out, value);
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use serde_json::Value;

    use super::*;
    use crate::{fleet::TokenLogprobs, prepare::tests::served, stream::ScoredToken};

    fn events(write: impl Fn(&Voice, &mut Vec<u8>), endpoint: Endpoint, include_usage: bool) -> Vec<String> {
        let shape = Shape { endpoint, stream: true, include_usage, logprobs: false };
        let voice = Voice::new(&served(), shape, &RequestId::adopt("r"));
        let mut out = Vec::new();
        write(&voice, &mut out);
        let out = String::from_utf8(out).expect("is UTF-8");
        let events = out.split_terminator("\n\n");
        events.map(|event| event.strip_prefix("data: ").expect("is an event").to_owned()).collect()
    }

    fn parsed(event: &str) -> Value {
        serde_json::from_str(event).expect("is JSON")
    }

    const USAGE: Usage = Usage { prompt_tokens: 3, completion_tokens: 4, cached_tokens: 2 };

    fn last(text: &str) -> Delta {
        Delta { text: text.into(), tokens: VecDeque::new(), finish: Some(StopReason::Length) }
    }

    #[test]
    fn a_chat_streams_in_chunks() {
        let write = |voice: &Voice, out: &mut Vec<u8>| {
            voice.opening(out, 1);
            voice.delta(out, 0, &mut last("a \"b\"\n\u{1F600}\u{7}"));
            voice.closing(out, &USAGE);
        };
        let events = events(write, Endpoint::Chat, true);
        assert_eq!(events.len(), 5);
        let chunks: Vec<_> = events[..4].iter().map(|event| parsed(event)).collect();
        assert!(
            chunks
                .iter()
                .all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == "chatcmpl-r")
        );
        assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(chunks[1]["choices"][0]["delta"], json!({"content": "a \"b\"\n\u{1F600}\u{7}"}));
        assert!(chunks[1]["usage"].is_null() && chunks[1]["choices"][0]["finish_reason"].is_null());
        assert_eq!(chunks[2]["choices"][0]["delta"], json!({}));
        assert_eq!(chunks[2]["choices"][0]["finish_reason"], "length");
        assert_eq!(chunks[3]["choices"], json!([]));
        assert_eq!(chunks[3]["usage"]["total_tokens"], 7);
        assert_eq!(chunks[3]["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
        assert_eq!(events[4], "[DONE]");
    }

    #[test]
    fn a_text_completion_streams_without_an_opening() {
        let write = |voice: &Voice, out: &mut Vec<u8>| {
            voice.opening(out, 1);
            voice.delta(out, 0, &mut last("x"));
            voice.closing(out, &USAGE);
        };
        let events = events(write, Endpoint::Text, false);
        assert_eq!(events.len(), 3);
        let first = parsed(&events[0]);
        assert_eq!(
            (&first["object"], &first["choices"][0]["text"]),
            (&json!("text_completion"), &json!("x"))
        );
        assert!(first.get("usage").is_none());
        let last = parsed(&events[1]);
        assert_eq!(
            (&last["choices"][0]["text"], &last["choices"][0]["finish_reason"]),
            (&json!(""), &json!("length"))
        );
    }

    #[test]
    fn an_event_of_text_alone_is_written_around_it_as_any_other() {
        for endpoint in [Endpoint::Chat, Endpoint::Text] {
            for include_usage in [false, true] {
                let text = "a \"b\"\n\u{1F600}";
                let around = |voice: &Voice, out: &mut Vec<u8>| {
                    voice.before_text(out);
                    let at = out.len();
                    voice.text(out, "another");
                    out.truncate(at);
                    voice.text(out, text);
                };
                let whole = |voice: &Voice, out: &mut Vec<u8>| {
                    voice.delta(out, 0, &mut Delta { text: text.into(), ..Delta::default() });
                };
                assert_eq!(events(around, endpoint, include_usage), events(whole, endpoint, include_usage));
            }
        }
    }

    #[test]
    fn what_has_gathered_is_told_some_at_a_time() {
        let shape = Shape { endpoint: Endpoint::Chat, stream: true, include_usage: false, logprobs: true };
        let voice = Voice::new(&served(), shape, &RequestId::adopt("r"));
        let logprobs = TokenLogprobs { logprob: -1.0, top: vec![] };
        let scored = |text_offset| ScoredToken { token: 97, text_offset, logprobs: logprobs.clone() };
        // The bytes that an event may have end within a character.
        let text = format!("a{}", "\u{e9}".repeat(TEXT_MOST));
        let mut delta = Delta { text: text.clone(), tokens: (0..200).map(scored).collect(), ..last("") };
        let (mut told, mut counts) = (String::new(), Vec::new());
        while !delta.is_empty() {
            let mut out = Vec::new();
            voice.delta(&mut out, 0, &mut delta);
            for event in String::from_utf8(out).expect("is UTF-8").split_terminator("\n\n") {
                let choice = parsed(event.strip_prefix("data: ").expect("an event"))["choices"][0].clone();
                told.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
                let tokens = choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
                counts.push((tokens, choice["finish_reason"].is_string()));
            }
        }
        assert!(told == text, "{} bytes of {}", told.len(), text.len());
        assert_eq!(counts, [(64, false), (64, false), (64, false), (8, false), (0, true)]);
    }

    #[test]
    fn errors_have_openai_shape() {
        let error = ApiError::new(ErrorCode::InvalidArgument, "top_p: no").param("top_p");
        let body: Value = serde_json::from_slice(&error_json(&error)).expect("is JSON");
        let expected = json!({"error": {"message": "top_p: no", "type": "invalid_request_error", "param": "top_p",
            "code": "invalid_value"}});
        assert_eq!(body, expected);
        let full = error_response(&ApiError::new(ErrorCode::QueueFull, "full"));
        assert_eq!(full.status(), 429);
        assert!(full.headers().contains_key(header::RETRY_AFTER));
    }
}
