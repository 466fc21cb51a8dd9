//! OpenAI's two ways to tell log probabilities: a list of tokens for chats, lists side by side for completions.

use std::{borrow::Cow, collections::BTreeMap};

use serde::Serialize;

use crate::{
    prepare::{Endpoint, Spelling, TextModel},
    stream::ScoredToken,
};

/// JSON has no infinity: what is impossible is told as what is very unlikely, as OpenAI and vLLM do.
const LEAST: f32 = -9999.0;

/// The `logprobs` object of one choice, in its endpoint's shape.
pub(super) fn object<'a, 't>(
    endpoint: Endpoint,
    text: &'a dyn TextModel,
    tokens: impl Iterator<Item = &'t ScoredToken> + Clone,
) -> Logprobs<'a> {
    match endpoint {
        Endpoint::Chat => Logprobs::Chat(chat(text, tokens)),
        Endpoint::Text => Logprobs::Text(side_by_side(text, tokens)),
    }
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Logprobs<'a> {
    Chat(OfChat<'a>),
    Text(OfText<'a>),
}

#[derive(Serialize)]
pub(super) struct OfChat<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: (),
}

#[derive(Serialize)]
struct ChatToken<'a> {
    #[serde(flatten)]
    chosen: Likely<'a>,
    top_logprobs: Vec<Likely<'a>>,
}

/// One token: its text, escaped where it is no whole characters, and its bytes; `null` for one that has no text.
#[derive(Serialize)]
struct Likely<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: Option<&'a [u8]>,
}

#[derive(Serialize)]
pub(super) struct OfText<'a> {
    tokens: Vec<Cow<'a, str>>,
    token_logprobs: Vec<f32>,
    /// The likeliest of each, and the chosen one.
    top_logprobs: Vec<BTreeMap<Cow<'a, str>, f32>>,
    text_offset: Vec<u32>,
}

fn chat<'a, 't>(text: &'a dyn TextModel, tokens: impl Iterator<Item = &'t ScoredToken>) -> OfChat<'a> {
    let likely = |token, logprob: f32| {
        let (token, bytes) = match text.spelling(token) {
            Spelling::Bytes(bytes) => (spelt(bytes, ""), Some(bytes)),
            Spelling::Name(name) => (name, None),
        };
        Likely { token, logprob: logprob.max(LEAST), bytes }
    };
    let told = |scored: &ScoredToken| ChatToken {
        chosen: likely(scored.token, scored.logprobs.logprob),
        top_logprobs: scored.logprobs.top.iter().map(|&(token, logprob)| likely(token, logprob)).collect(),
    };
    OfChat { content: tokens.map(told).collect(), refusal: () }
}

fn side_by_side<'a, 't>(
    text: &'a dyn TextModel,
    tokens: impl Iterator<Item = &'t ScoredToken> + Clone,
) -> OfText<'a> {
    let spelt = |token| match text.spelling(token) {
        Spelling::Bytes(bytes) => spelt(bytes, "bytes:"),
        Spelling::Name(name) => name,
    };
    let of_each = |scored: &ScoredToken| {
        let mut map = BTreeMap::from([(spelt(scored.token), scored.logprobs.logprob.max(LEAST))]);
        for &(token, logprob) in &scored.logprobs.top {
            // Two tokens may be spelt alike: the chosen one counts, then the likelier.
            map.entry(spelt(token)).or_insert(logprob.max(LEAST));
        }
        map
    };
    OfText {
        tokens: tokens.clone().map(|scored| spelt(scored.token)).collect(),
        token_logprobs: tokens.clone().map(|scored| scored.logprobs.logprob.max(LEAST)).collect(),
        top_logprobs: tokens.clone().map(of_each).collect(),
        text_offset: tokens.map(|scored| scored.text_offset).collect(),
    }
}

/// The text of a token; one that is no whole characters has its bytes written as `\xe2\x98` after `mark`, as OpenAI has
/// it.
fn spelt<'a>(bytes: &'a [u8], mark: &str) -> Cow<'a, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => {
            let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("{mark}{escaped}").into()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{fleet::TokenLogprobs, prepare::tests::Bytes};

    fn told(endpoint: Endpoint) -> Value {
        let scored = |token, text_offset, logprob, top: &[(u32, f32)]| ScoredToken {
            token,
            text_offset,
            logprobs: TokenLogprobs { logprob, top: top.to_vec() },
        };
        // "a" chosen though "b" is likelier; half a character; a token without text, which is impossible besides.
        let tokens = [
            scored(97, 0, -1.5, &[(98, -0.5), (97, -1.5)]),
            scored(0xe2, 1, -0.25, &[(0xe2, -0.25), (0, -2.0)]),
            scored(0, 1, f32::NEG_INFINITY, &[]),
        ];
        serde_json::to_value(object(endpoint, &Bytes, tokens.iter())).expect("is JSON")
    }

    #[test]
    fn chats_tell_a_list_of_tokens() {
        let expected = json!({"refusal": null, "content": [
            {"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": [
                {"token": "b", "logprob": -0.5, "bytes": [98]}, {"token": "a", "logprob": -1.5, "bytes": [97]}]},
            {"token": "\\xe2", "logprob": -0.25, "bytes": [226], "top_logprobs": [
                {"token": "\\xe2", "logprob": -0.25, "bytes": [226]}, {"token": "<end>", "logprob": -2.0, "bytes": null}]},
            {"token": "<end>", "logprob": -9999.0, "bytes": null, "top_logprobs": []},
        ]});
        assert_eq!(told(Endpoint::Chat), expected);
    }

    #[test]
    fn completions_tell_lists_side_by_side() {
        let expected = json!({
            "tokens": ["a", "bytes:\\xe2", "<end>"],
            "token_logprobs": [-1.5, -0.25, -9999.0],
            "top_logprobs": [{"a": -1.5, "b": -0.5}, {"bytes:\\xe2": -0.25, "<end>": -2.0}, {"<end>": -9999.0}],
            "text_offset": [0, 1, 1],
        });
        assert_eq!(told(Endpoint::Text), expected);
    }
}
