//! OpenAI's response bodies: whole answers, chunks of streams, models, errors.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use baton_proto::{ApiError, ErrorCode, RequestId};
use serde::Serialize;
use serde_json::json;

use crate::{
    dispatch::StopReason,
    prepare::{Endpoint, Served, Shape},
    stream::{Finish, Usage},
};

/// `finish_reason` as OpenAI spells it.
fn reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Stop => "stop",
        StopReason::Length => "length",
    }
}

/// The `usage` object.
fn usage(usage: &Usage) -> serde_json::Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

fn json_response(status: StatusCode, body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
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
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(header::RETRY_AFTER, super::retry_after());
    }
    if error.code == ErrorCode::PayloadTooLarge {
        // The rest of the body may still be on its way.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// An entry of `/v1/models`.
#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: u32,
}

fn entry(served: &Served) -> Model<'_> {
    let max_model_len = served.context_tokens;
    Model { id: &served.name, object: "model", created: served.since, owned_by: "baton", max_model_len }
}

pub(super) fn models(served: &Served) -> Response {
    let body = json!({ "object": "list", "data": [entry(served)] });
    json_response(StatusCode::OK, body.to_string().into_bytes())
}

pub(super) fn model(served: &Served) -> Response {
    json_response(StatusCode::OK, json!(entry(served)).to_string().into_bytes())
}

/// How one request is answered: its shape, and what all of its chunks have in common, written once.
pub(super) struct Voice {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    /// `data: {"id": ..., "model": ..., ` up to the choices.
    chunk_head: Vec<u8>,
}

impl Voice {
    pub(super) fn new(served: &Served, shape: Shape, request: &RequestId) -> Self {
        let prefix = match shape.endpoint {
            Endpoint::Chat => "chatcmpl-",
            Endpoint::Text => "cmpl-",
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut voice = Self {
            shape,
            id: format!("{prefix}{request}"),
            created,
            model: served.name.clone(),
            fingerprint: served.fingerprint(),
            chunk_head: Vec::new(),
        };
        if shape.stream {
            let mut head = voice.common(match shape.endpoint {
                Endpoint::Chat => "chat.completion.chunk",
                Endpoint::Text => "text_completion",
            });
            head.pop();
            voice.chunk_head = format!("data: {head},").into_bytes();
        }
        voice
    }

    fn common(&self, object: &str) -> String {
        #[derive(Serialize)]
        struct Common<'a> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
            system_fingerprint: &'a str,
        }
        let common = Common {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
        };
        // Strings and a number in a struct: cannot fail.
        serde_json::to_string(&common).unwrap_or_default()
    }

    /// The whole answer.
    pub(super) fn whole(&self, text: &str, finish: &Finish) -> Response {
        let reason = reason(finish.reason);
        let (object, choice) = match self.shape.endpoint {
            Endpoint::Chat => (
                "chat.completion",
                json!({
                    "index": 0,
                    "message": { "role": "assistant", "content": text, "refusal": null },
                    "logprobs": null,
                    "finish_reason": reason,
                }),
            ),
            Endpoint::Text => (
                "text_completion",
                json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason }),
            ),
        };
        let body = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [choice],
            "usage": usage(&finish.usage),
        });
        json_response(StatusCode::OK, body.to_string().into_bytes())
    }

    /// The chunk that opens a chat.
    pub(super) fn opening(&self, out: &mut Vec<u8>) {
        if self.shape.endpoint == Endpoint::Chat {
            self.choice(out, r#""delta":{"role":"assistant","content":""}"#.as_bytes(), "", b"", "null");
        }
    }

    /// A chunk of text.
    pub(super) fn text(&self, out: &mut Vec<u8>, text: &str) {
        match self.shape.endpoint {
            Endpoint::Chat => self.choice(out, br#""delta":{"content":"#, text, b"}", "null"),
            Endpoint::Text => self.choice(out, br#""text":"#, text, b"", "null"),
        }
    }

    /// The chunks that close a complete answer, and the end mark.
    pub(super) fn closing(&self, out: &mut Vec<u8>, finish: &Finish) {
        let reason = match finish.reason {
            StopReason::Stop => "\"stop\"",
            StopReason::Length => "\"length\"",
        };
        let nothing: &[u8] = match self.shape.endpoint {
            Endpoint::Chat => br#""delta":{}"#,
            Endpoint::Text => br#""text":"""#,
        };
        self.choice(out, nothing, "", b"", reason);
        if self.shape.include_usage {
            out.extend_from_slice(&self.chunk_head);
            out.extend_from_slice(br#""choices":[],"usage":"#);
            out.extend_from_slice(usage(&finish.usage).to_string().as_bytes());
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

    /// One chunk with one choice: `before`, then `text` as a JSON string unless it is empty, then `after`.
    fn choice(&self, out: &mut Vec<u8>, before: &[u8], text: &str, after: &[u8], finish_reason: &str) {
        out.extend_from_slice(&self.chunk_head);
        out.extend_from_slice(br#""choices":[{"index":0,"#);
        out.extend_from_slice(before);
        if !text.is_empty() {
            // Writing to memory and a str's escaping cannot fail.
            let _ = serde_json::to_writer(&mut *out, text);
        }
        out.extend_from_slice(after);
        out.extend_from_slice(br#","logprobs":null,"finish_reason":"#);
        out.extend_from_slice(finish_reason.as_bytes());
        out.extend_from_slice(if self.shape.include_usage { b"}],\"usage\":null}\n\n" } else { b"}]}\n\n" });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::prepare::tests::served;

    fn events(write: impl Fn(&Voice, &mut Vec<u8>), endpoint: Endpoint, include_usage: bool) -> Vec<String> {
        let shape = Shape { endpoint, stream: true, include_usage };
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

    const FINISH: Finish = Finish {
        reason: StopReason::Length,
        usage: Usage { prompt_tokens: 3, completion_tokens: 4, cached_tokens: 2 },
    };

    #[test]
    fn a_chat_streams_in_chunks() {
        let write = |voice: &Voice, out: &mut Vec<u8>| {
            voice.opening(out);
            voice.text(out, "a \"b\"\n\u{1F600}\u{7}");
            voice.closing(out, &FINISH);
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
            voice.opening(out);
            voice.text(out, "x");
            voice.closing(out, &FINISH);
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
