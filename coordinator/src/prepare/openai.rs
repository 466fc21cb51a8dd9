//! What OpenAI clients send, as it is on the wire: one type for both endpoints, every field optional.
//!
//! Read by [`super::prepare`], which checks it and hands nothing of it on. Fields that are not here are passed over, as
//! clients send many (`user`, `metadata`, `store`, ...), without being kept. Those that would change the answer and are not
//! served are [`Asked`], to be refused by name.

use std::fmt;

use baton_proto::{ApiError, ErrorCode};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

mod content;
mod ids;
mod prompt;
mod unserved;
mod values;

pub use content::{Content, PartFault, WrongPart};
pub use prompt::{OnePrompt, Prompt};
pub use unserved::{Asked, refuse};
pub use values::{Integer, List, Number, Small, SmallObject};

/// Messages of a chat: more than anybody's, and few enough for what each takes in a template.
const MESSAGES_MOST: usize = 1 << 14;
/// Entries of lists that are checked, and bounded, later.
const ENTRIES_MOST: usize = 1024;

/// Body of `POST /v1/chat/completions` and `POST /v1/completions`.
#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "a JSON object")]
pub struct Request {
    pub model: Option<String>,
    pub messages: Option<List<Message, MESSAGES_MOST>>,
    pub prompt: Option<Prompt>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub echo: Option<bool>,
    pub n: Option<Integer>,
    pub best_of: Option<Integer>,
    pub priority: Option<Integer>,
    /// A switch for chats, a number for completions.
    pub logprobs: Option<Small>,
    pub top_logprobs: Option<Integer>,

    pub temperature: Option<Number>,
    pub top_p: Option<Number>,
    pub top_k: Option<Integer>,
    pub min_p: Option<Number>,
    pub frequency_penalty: Option<Number>,
    pub presence_penalty: Option<Number>,
    pub repetition_penalty: Option<Number>,
    pub logit_bias: Option<Small>,
    pub seed: Option<Integer>,
    pub max_tokens: Option<Integer>,
    pub max_completion_tokens: Option<Integer>,
    pub min_tokens: Option<Integer>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<List<Integer, ENTRIES_MOST>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,

    /// For the model's template.
    pub chat_template_kwargs: Option<SmallObject>,

    // What is not served: see `unserved`.
    pub add_generation_prompt: Option<Asked>,
    pub add_special_tokens: Option<Asked>,
    pub allowed_token_ids: Option<Asked>,
    pub audio: Option<Asked>,
    pub bad_words: Option<Asked>,
    pub cache_salt: Option<Asked>,
    pub chat_template: Option<Asked>,
    pub continue_final_message: Option<Asked>,
    pub documents: Option<Asked>,
    pub ebnf: Option<Asked>,
    pub function_call: Option<Asked>,
    pub functions: Option<Asked>,
    pub guided_choice: Option<Asked>,
    pub guided_grammar: Option<Asked>,
    pub guided_json: Option<Asked>,
    pub guided_regex: Option<Asked>,
    pub json_schema: Option<Asked>,
    pub logits_processors: Option<Asked>,
    pub lora_path: Option<Asked>,
    pub modalities: Option<Asked>,
    pub no_stop_trim: Option<Asked>,
    pub prompt_embeds: Option<Asked>,
    pub prompt_logprobs: Option<Asked>,
    pub reasoning_effort: Option<Asked>,
    pub regex: Option<Asked>,
    pub response_format: Option<Asked>,
    pub return_hidden_states: Option<Asked>,
    pub return_token_ids: Option<Asked>,
    pub return_tokens_as_token_ids: Option<Asked>,
    pub skip_special_tokens: Option<Asked>,
    pub stop_regex: Option<Asked>,
    pub structural_tag: Option<Asked>,
    pub structured_outputs: Option<Asked>,
    pub suffix: Option<Asked>,
    pub thinking_token_budget: Option<Asked>,
    pub tool_choice: Option<Asked>,
    pub tools: Option<Asked>,
    pub truncate_prompt_tokens: Option<Asked>,
    pub use_beam_search: Option<Asked>,
    pub verbosity: Option<Asked>,
    pub web_search_options: Option<Asked>,
}

/// One turn of a chat.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a message, as in {\"role\": \"user\", \"content\": ...}")]
pub struct Message {
    pub role: Option<String>,
    pub content: Option<Content>,
    pub tool_calls: Option<Asked>,
    pub function_call: Option<Asked>,
}

#[derive(Debug)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

struct StopVisitor;

impl<'de> Visitor<'de> for StopVisitor {
    type Value = Stop;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
        Ok(Stop::One(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
        let mut strings = Vec::new();
        values::extend(&mut strings, list, ENTRIES_MOST)?;
        Ok(Stop::Many(strings))
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StopVisitor)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object, as in {\"include_usage\": true}")]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
    pub continuous_usage_stats: Option<Asked>,
}

/// Reads a body; errors say where and, where one is at fault, which field. To know the field takes as long as all else of
/// a long list, so it is looked for once something is known to be wrong.
pub fn parse(body: &[u8]) -> Result<Request, ApiError> {
    parse_fast(body).map_or_else(|| parse_by_field(body), Ok)
}

/// `None`: something is wrong, whatever it is.
fn parse_fast(body: &[u8]) -> Option<Request> {
    let Some((list, ids)) = ids::plain_ids(body) else { return serde_json::from_slice(body).ok() };
    // Without the list; a prompt that comes twice is refused all the same.
    let rest = [&body[..list.start], b"null", &body[list.end..]].concat();
    let request = serde_json::from_slice(&rest).ok()?;
    Some(Request { prompt: Some(Prompt::Tokens(ids)), ..request })
}

pub(super) fn parse_by_field(body: &[u8]) -> Result<Request, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let request: Request = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            // An object that is none at all has no path.
            let field = if path == "." { None } else { Some(path) };
            let subject = field.as_deref().unwrap_or("the request body");
            let message = format!("{subject}: {}", in_words_of_json(&inner.to_string()));
            let error = ApiError::new(ErrorCode::InvalidArgument, message);
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

/// The parser calls what it met by names of its own.
fn in_words_of_json(message: &str) -> String {
    const NAMES: [(&str, &str); 4] = [
        ("invalid type: map,", "invalid type: object,"),
        ("invalid type: sequence,", "invalid type: list,"),
        ("invalid type: floating point ", "invalid type: number "),
        ("invalid type: integer ", "invalid type: number "),
    ];
    let named =
        NAMES.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", message.strip_prefix(theirs)?)));
    named.unwrap_or_else(|| message.to_owned())
}

fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, format!("the request body is not valid JSON: {error}"))
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
            (r#"{"max_tokens": "1"}"#, "max_tokens"),
            (r#"{"seed": 18446744073709551615}"#, "seed"),
            (r#"{"stop_token_ids": 5}"#, "stop_token_ids"),
            (r#"{"stop_token_ids": [1, "x"]}"#, "stop_token_ids[1]"),
            (r#"{"messages": {}}"#, "messages"),
            (r#"{"messages": [{"role": 1}]}"#, "messages[0].role"),
            (r#"{"messages": [{"role": "user", "content": 1}]}"#, "messages[0].content"),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}"#,
                "messages[0].content[0].text",
            ),
            (r#"{"prompt": {"a": 1}}"#, "prompt"),
            (r#"{"prompt": [1, "a"]}"#, "prompt[1]"),
            (r#"{"prompt": [-1]}"#, "prompt[0]"),
            (r#"{"prompt": [[1], [2, 1.5]]}"#, "prompt[1][1]"),
            (r#"{"stop": 5}"#, "stop"),
            (r#"{"stream": "yes"}"#, "stream"),
            (r#"{"stream_options": {"include_usage": 1}}"#, "stream_options.include_usage"),
        ];
        for (body, field) in cases {
            let error = parse(body.as_bytes()).expect_err(body);
            assert_eq!(error.param.as_deref(), Some(field), "{body}: {error}");
            assert!(error.message.contains(field), "{error}");
        }
        let message = |body: &str| parse(body.as_bytes()).expect_err(body).message;
        let hot = "temperature: invalid type: string \"hot\", expected a number";
        assert!(message(r#"{"temperature": "hot"}"#).starts_with(hot));
        let half = "max_tokens: invalid type: number `1.5`, expected a whole number";
        assert!(message(r#"{"max_tokens": 1.5}"#).starts_with(half));
        let object = "messages: invalid type: object, expected a list";
        assert!(message(r#"{"messages": {}}"#).starts_with(object));
        let error = parse(b"[]").expect_err("no object");
        assert!(error.param.is_none() && error.message.contains("a JSON object"), "{error}");
    }

    #[test]
    fn ids_are_the_same_however_they_are_read() {
        for body in [
            r#"{"model": "m", "prompt": [1, 20, 300], "n": 2}"#,
            r#"{"model": "m", "prompt": [1, 20, 300], "n": true}"#,
            r#"{"model": "m", "prompt": [1], "prompt": [2]}"#,
            r#"{"model": "m", "prompt": [1]} x"#,
            r#"{"model": m, "prompt": [1]}"#,
            r#"{"a" 1, "prompt": [1]}"#,
            r#"{"a": 1 "prompt": [1]}"#,
            r#"{"a": tru, "prompt": [1]}"#,
            r#"{"a": "", "prompt": [1]}"#,
            "{\"a\": \"\u{1}\", \"prompt\": [1]}",
            r#"{"prompt": [1] "a": 1}"#,
            r#"{"prompt": [1],}"#,
            r#"{"prompt": [01]}"#,
        ] {
            let slow = parse_by_field(body.as_bytes());
            let same = format!("{:?}", parse(body.as_bytes())) == format!("{slow:?}");
            assert!(same, "{body}: {slow:?}");
        }
        let both =
            [&b"{\"model\": \"\xff\", \"prompt\": [1]}"[..], b"{\"prompt\": [1], \"model\": \"\xff\"}"];
        both.iter().for_each(|body| assert!(parse(body).is_err()));
    }

    #[test]
    fn whole_numbers_may_be_written_with_a_point() {
        let request =
            parse(br#"{"max_tokens": 2.0, "n": 1e0, "seed": -3, "temperature": 1}"#).expect("is taken");
        assert_eq!((request.max_tokens, request.n), (Some(Integer(2)), Some(Integer(1))));
        assert_eq!((request.seed, request.temperature), (Some(Integer(-3)), Some(Number(1.0))));
    }

    #[test]
    fn unknown_fields_and_nulls_are_ignored() {
        let body = r#"{"user": "u", "metadata": {"a": 1}, "store": true, "temperature": null, "stop": null,
            "messages": [{"role": "user", "name": "n", "content": [{"type": "text", "text": "hi"}]}]}"#;
        let request = parse(body.as_bytes()).expect("is taken");
        assert!(request.temperature.is_none() && refuse(&request).is_ok());
    }
}
