//! What OpenAI clients send, as it is on the wire: one type for both endpoints, every field optional.
//!
//! Read by [`super::prepare`], which checks it and hands nothing of it on. Fields that are not here are ignored, as
//! clients send many (`user`, `metadata`, `store`, ...). Fields that would change the answer and are not served yet are
//! here to be refused by name.

use baton_proto::{ApiError, ErrorCode};
use serde::Deserialize;
use serde_json::Value;

/// Body of `POST /v1/chat/completions` and `POST /v1/completions`.
#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "a JSON object")]
pub struct Request {
    pub model: Option<String>,
    pub messages: Option<Vec<Message>>,
    pub prompt: Option<Prompt>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,

    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub seed: Option<i64>,
    pub max_tokens: Option<i64>,
    pub max_completion_tokens: Option<i64>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub ignore_eos: Option<bool>,

    // Refused unless they ask for nothing.
    pub n: Option<i64>,
    pub best_of: Option<i64>,
    pub echo: Option<bool>,
    pub suffix: Option<String>,
    pub logprobs: Option<Value>,
    pub top_logprobs: Option<Value>,
    pub logit_bias: Option<Value>,
    pub tools: Option<Value>,
    pub tool_choice: Option<Value>,
    pub functions: Option<Value>,
    pub function_call: Option<Value>,
    pub response_format: Option<Value>,
    pub modalities: Option<Vec<String>>,
    pub audio: Option<Value>,
}

/// One turn of a chat.
#[derive(Debug, Deserialize)]
pub struct Message {
    pub role: Option<String>,
    pub content: Option<Content>,
    pub tool_calls: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of {\"type\": \"text\", \"text\": ...} parts")]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
pub struct Part {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub text: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string, a list of token ids, or a list that holds one of either")]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
}

/// Reads a body; errors say where and, where one is at fault, which field.
pub fn parse(body: &[u8]) -> Result<Request, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let request: Request = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            // An object that is none at all has no path.
            let field = if path == "." { None } else { Some(path) };
            let subject = field.as_deref().unwrap_or("the request body");
            let error = ApiError::new(ErrorCode::InvalidArgument, format!("{subject}: {inner}"));
            return match field {
                Some(field) => error.param(field),
                None => error,
            };
        }
        not_json(&inner)
    })?;
    json.end().map_err(|error| not_json(&error))?;
    Ok(request)
}

fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, format!("the request body is not valid JSON: {error}"))
}

impl Request {
    /// Refuses what is not served, by field.
    pub fn refuse_unserved(&self) -> Result<(), ApiError> {
        let one = |count: Option<i64>| matches!(count, None | Some(1));
        let unset = |value: &Option<Value>| match value {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::String(choice)) => choice == "none" || choice == "auto",
            Some(_) => false,
        };
        let text_format = match &self.response_format {
            Some(Value::Object(format)) => format.get("type").is_none_or(|kind| kind == "text"),
            other => unset(other),
        };
        let text_only = self.modalities.iter().flatten().all(|modality| modality == "text");
        let served: [(&str, bool, &str); 14] = [
            ("n", one(self.n), "only 1 choice per request is served; send one request per choice"),
            ("best_of", one(self.best_of), "only best_of 1 is served"),
            ("echo", self.echo != Some(true), "the prompt cannot be echoed; leave it out"),
            ("suffix", self.suffix.as_deref().unwrap_or_default().is_empty(), "insertion is not served"),
            ("logprobs", unset(&self.logprobs), "log probabilities are not served"),
            ("top_logprobs", unset(&self.top_logprobs), "log probabilities are not served"),
            ("logit_bias", unset(&self.logit_bias), "logit bias is not served"),
            ("tools", unset(&self.tools), "tools are not served"),
            ("tool_choice", unset(&self.tool_choice), "tools are not served"),
            ("functions", unset(&self.functions), "functions are not served"),
            ("function_call", unset(&self.function_call), "functions are not served"),
            ("response_format", text_format, "only the response format {\"type\": \"text\"} is served"),
            ("modalities", text_only, "only text is served"),
            ("audio", unset(&self.audio), "only text is served"),
        ];
        match served.iter().find(|(_, good, _)| !good) {
            Some((field, _, why)) => {
                Err(ApiError::new(ErrorCode::Unsupported, format!("{field}: {why}")).param(*field))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_json_is_told_with_its_place() {
        for body in [&b"{"[..], b"", b"{\"model\": }", b"{} x", b"\xff"] {
            let error = parse(body).expect_err("must be refused");
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains("line 1 column") || error.message.contains("EOF"), "{error}");
        }
    }

    #[test]
    fn wrong_types_are_told_with_their_field() {
        let cases = [
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"max_tokens": 1.5}"#, "max_tokens"),
            (r#"{"messages": {}}"#, "messages"),
            (r#"{"messages": [{"role": 1}]}"#, "messages[0].role"),
            (r#"{"messages": [{"role": "user", "content": 1}]}"#, "messages[0].content"),
            (r#"{"prompt": {"a": 1}}"#, "prompt"),
            (r#"{"prompt": [1, "a"]}"#, "prompt"),
            (r#"{"prompt": [-1]}"#, "prompt"),
            (r#"{"stop": 5}"#, "stop"),
            (r#"{"stream": "yes"}"#, "stream"),
            (r#"{"stream_options": {"include_usage": 1}}"#, "stream_options.include_usage"),
        ];
        for (body, field) in cases {
            let error = parse(body.as_bytes()).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(field), "{body}: {error}");
            assert!(error.message.contains(field), "{error}");
        }
        let error = parse(b"[]").expect_err("no object");
        assert!(error.param.is_none() && error.message.contains("a JSON object"), "{error}");
    }

    #[test]
    fn unknown_fields_and_nulls_are_ignored() {
        let body = r#"{"user": "u", "metadata": {"a": 1}, "store": true, "temperature": null, "stop": null,
            "messages": [{"role": "user", "name": "n", "content": [{"type": "text", "text": "hi"}]}]}"#;
        let request = parse(body.as_bytes()).expect("is taken");
        assert!(request.temperature.is_none() && request.refuse_unserved().is_ok());
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let refused = [
            (r#"{"n": 2}"#, "n"),
            (r#"{"n": 0}"#, "n"),
            (r#"{"best_of": 3}"#, "best_of"),
            (r#"{"echo": true}"#, "echo"),
            (r#"{"suffix": "x"}"#, "suffix"),
            (r#"{"logprobs": true}"#, "logprobs"),
            (r#"{"logprobs": 0}"#, "logprobs"),
            (r#"{"top_logprobs": 2}"#, "top_logprobs"),
            (r#"{"logit_bias": {"1": 2}}"#, "logit_bias"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools"),
            (r#"{"tool_choice": "required"}"#, "tool_choice"),
            (r#"{"functions": [{}]}"#, "functions"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
            (r#"{"modalities": ["audio"]}"#, "modalities"),
        ];
        for (body, field) in refused {
            let error = parse(body.as_bytes()).expect(body).refuse_unserved().expect_err(body);
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::Unsupported, Some(field)));
        }
        let taken = r#"{"n": 1, "best_of": 1, "echo": false, "suffix": "", "logprobs": false, "tools": [],
            "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"}}"#;
        assert!(parse(taken.as_bytes()).expect("parses").refuse_unserved().is_ok());
    }
}
