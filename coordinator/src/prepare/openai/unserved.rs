//! Fields of OpenAI's, of vLLM's and of SGLang's, that would change the answer and are not served: refused by name unless they
//! ask for nothing.

use std::fmt;

use baton_proto::{ApiError, ErrorCode};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{Prompt, Request};

/// Words that are told apart are no longer.
const WORD_BYTES_MOST: usize = 16;

/// What a field asks for, as far as that matters where nothing is done with it: however long it is, none of it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// `null`, `false`, or what is empty.
    Nothing,
    True,
    Number,
    /// A short text, or that of an object's `type`.
    Word(String),
    /// A list of texts that all are `text`.
    TextOnly,
    Something,
}

impl Asked {
    fn word(text: &str) -> Self {
        match text.len() {
            0 => Self::Nothing,
            1..=WORD_BYTES_MOST => Self::Word(text.to_owned()),
            _ => Self::Something,
        }
    }

    fn is(&self, word: &str) -> bool {
        matches!(self, Self::Word(said) if said == word)
    }
}

struct AskedVisitor;

impl<'de> Visitor<'de> for AskedVisitor {
    type Value = Asked;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: Error>(self) -> Result<Asked, E> {
        Ok(Asked::Nothing)
    }

    fn visit_bool<E: Error>(self, on: bool) -> Result<Asked, E> {
        Ok(if on { Asked::True } else { Asked::Nothing })
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Asked, E> {
        Ok(Asked::Number)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Asked, E> {
        Ok(Asked::Number)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Asked, E> {
        Ok(Asked::Number)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Asked, E> {
        Ok(Asked::word(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Asked, A::Error> {
        let mut asked = Asked::Nothing;
        while let Some(item) = list.next_element::<Asked>()? {
            let plain = item.is("text") && asked != Asked::Something;
            asked = if plain { Asked::TextOnly } else { Asked::Something };
        }
        Ok(asked)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Asked, A::Error> {
        let mut asked = Asked::Nothing;
        while let Some(key) = map.next_key::<String>()? {
            if key == "type" {
                asked = match map.next_value()? {
                    Asked::Word(word) => Asked::Word(word),
                    _ => Asked::Something,
                };
            } else {
                map.next_value::<IgnoredAny>()?;
                if asked == Asked::Nothing {
                    asked = Asked::Something;
                }
            }
        }
        Ok(asked)
    }
}

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AskedVisitor)
    }
}

/// Nothing that could be meant by it is asked for.
fn unset(asked: &Option<Asked>) -> bool {
    matches!(asked, None | Some(Asked::Nothing))
}

/// Nothing, or one of these words.
fn unset_or(asked: &Option<Asked>, words: &[&str]) -> bool {
    unset(asked) || asked.as_ref().is_some_and(|asked| words.iter().any(|word| asked.is(word)))
}

/// For what is on by default.
fn not_off(asked: &Option<Asked>) -> bool {
    matches!(asked, None | Some(Asked::True))
}

/// Refuses what is not served, by field.
pub fn refuse(request: &Request) -> Result<(), ApiError> {
    const TOOLS: &str = "tools are not served";
    const FUNCTIONS: &str = "functions are not served";
    const STRUCTURE: &str = "structured output is not served";
    const TEXT: &str = "only text is served";
    const TEMPLATE: &str = "only the model's own chat template is served";
    const THINKING: &str = "not served by itself; see `chat_template_kwargs`";
    const ADAPTERS: &str = "adapters are not served";
    const BIAS: &str = "not served; see `logit_bias`";
    const TOKENS: &str = "tokens are told as text";
    const WEB: &str = "nothing is looked up";
    let of = request;
    let usage = &of.stream_options.as_ref().and_then(|options| options.continuous_usage_stats.clone());
    let by_itself = ["none", "auto"];
    let text_only = unset(&of.modalities) || of.modalities == Some(Asked::TextOnly);
    let served = [
        ("suffix", unset(&of.suffix), "insertion is not served"),
        ("tools", unset(&of.tools), TOOLS),
        ("tool_choice", unset_or(&of.tool_choice, &by_itself), TOOLS),
        ("functions", unset(&of.functions), FUNCTIONS),
        ("function_call", unset_or(&of.function_call, &by_itself), FUNCTIONS),
        (
            "response_format",
            unset_or(&of.response_format, &["text"]),
            "only the response format {\"type\": \"text\"} is served",
        ),
        ("modalities", text_only, TEXT),
        ("audio", unset(&of.audio), TEXT),
        ("use_beam_search", unset(&of.use_beam_search), "beam search is not served"),
        (
            "prompt_logprobs",
            unset(&of.prompt_logprobs),
            "log probabilities of the prompt are not served; `logprobs` gives those of the answer",
        ),
        ("allowed_token_ids", unset(&of.allowed_token_ids), BIAS),
        ("bad_words", unset(&of.bad_words), BIAS),
        ("logits_processors", unset(&of.logits_processors), BIAS),
        ("structured_outputs", unset(&of.structured_outputs), STRUCTURE),
        ("guided_json", unset(&of.guided_json), STRUCTURE),
        ("guided_regex", unset(&of.guided_regex), STRUCTURE),
        ("guided_choice", unset(&of.guided_choice), STRUCTURE),
        ("guided_grammar", unset(&of.guided_grammar), STRUCTURE),
        ("json_schema", unset(&of.json_schema), STRUCTURE),
        ("regex", unset(&of.regex), STRUCTURE),
        ("ebnf", unset(&of.ebnf), STRUCTURE),
        ("structural_tag", unset(&of.structural_tag), STRUCTURE),
        ("truncate_prompt_tokens", unset(&of.truncate_prompt_tokens), "prompts are not cut; shorten it"),
        ("chat_template", unset(&of.chat_template), TEMPLATE),
        ("documents", unset(&of.documents), "documents are not served; write them into a message"),
        ("web_search_options", unset(&of.web_search_options), WEB),
        ("reasoning_effort", unset(&of.reasoning_effort), THINKING),
        (
            "thinking_token_budget",
            unset(&of.thinking_token_budget),
            "not served; see `max_completion_tokens`",
        ),
        ("verbosity", unset_or(&of.verbosity, &["medium"]), "not served; say it in a message"),
        ("lora_path", unset(&of.lora_path), ADAPTERS),
        (
            "continue_final_message",
            unset(&of.continue_final_message),
            "the last message cannot be continued; use /v1/completions",
        ),
        (
            "add_generation_prompt",
            not_off(&of.add_generation_prompt),
            "an answer of the assistant's is always asked for",
        ),
        (
            "add_special_tokens",
            match (&of.messages, &of.prompt) {
                // The template writes them.
                (Some(_), _) => unset(&of.add_special_tokens),
                // Nothing is put around ids.
                (None, Some(Prompt::Tokens(_) | Prompt::TokenLists(_))) => true,
                (None, _) => not_off(&of.add_special_tokens),
            },
            "special tokens are put around a prompt as the model wants it; send token ids to have others",
        ),
        ("stop_regex", unset(&of.stop_regex), "not served; see `stop`"),
        ("no_stop_trim", unset(&of.no_stop_trim), "not served; see `include_stop_str_in_output`"),
        ("return_tokens_as_token_ids", unset(&of.return_tokens_as_token_ids), TOKENS),
        ("return_token_ids", unset(&of.return_token_ids), TOKENS),
        ("return_hidden_states", unset(&of.return_hidden_states), "hidden states are not told"),
        ("prompt_embeds", unset(&of.prompt_embeds), "only text and token ids are taken"),
        ("cache_salt", unset(&of.cache_salt), "all requests share their prefixes; leave it out"),
        ("stream_options.continuous_usage_stats", unset(usage), "usage is told once; see `include_usage`"),
        ("skip_special_tokens", not_off(&of.skip_special_tokens), "special tokens have no text here"),
    ];
    match served.iter().find(|(_, good, _)| !good) {
        Some((field, _, why)) => {
            Err(ApiError::new(ErrorCode::Unsupported, format!("{field}: {why}")).param(*field))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> Result<(), ApiError> {
        refuse(&serde_json::from_str(body).expect(body))
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let cases = [
            (r#"{"suffix": "x"}"#, "suffix"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools"),
            (r#"{"tool_choice": "required"}"#, "tool_choice"),
            (r#"{"tool_choice": {"type": "function", "function": {"name": "f"}}}"#, "tool_choice"),
            (r#"{"functions": [{}]}"#, "functions"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
            (r#"{"response_format": {"json_schema": {}, "type": "json_schema"}}"#, "response_format"),
            (r#"{"response_format": {"json_schema": {}, "type": null}}"#, "response_format"),
            (r#"{"response_format": {"type": ""}}"#, "response_format"),
            (r#"{"guided_json": {"properties": {}, "type": []}}"#, "guided_json"),
            (r#"{"modalities": ["audio"]}"#, "modalities"),
            (r#"{"modalities": ["text", "audio"]}"#, "modalities"),
            (r#"{"modalities": ["audio", "text"]}"#, "modalities"),
            (r#"{"use_beam_search": true}"#, "use_beam_search"),
            (r#"{"prompt_logprobs": 0}"#, "prompt_logprobs"),
            (r#"{"allowed_token_ids": [1]}"#, "allowed_token_ids"),
            (r#"{"bad_words": ["x"]}"#, "bad_words"),
            (r#"{"guided_choice": ["a", "b"]}"#, "guided_choice"),
            (r#"{"regex": "a+"}"#, "regex"),
            (r#"{"json_schema": "{\"type\": \"object\"}"}"#, "json_schema"),
            (r#"{"chat_template": "{{ messages }}"}"#, "chat_template"),
            (r#"{"documents": [{"text": "x"}]}"#, "documents"),
            (r#"{"reasoning_effort": "low"}"#, "reasoning_effort"),
            (r#"{"verbosity": "low"}"#, "verbosity"),
            (r#"{"web_search_options": {"search_context_size": "low"}}"#, "web_search_options"),
            (r#"{"lora_path": "adapter"}"#, "lora_path"),
            (r#"{"skip_special_tokens": false}"#, "skip_special_tokens"),
            (r#"{"add_generation_prompt": false}"#, "add_generation_prompt"),
            (r#"{"prompt": "x", "add_special_tokens": false}"#, "add_special_tokens"),
            (r#"{"messages": [], "add_special_tokens": true}"#, "add_special_tokens"),
            (r#"{"stop_regex": "a+"}"#, "stop_regex"),
            (r#"{"no_stop_trim": true}"#, "no_stop_trim"),
            (r#"{"return_tokens_as_token_ids": true}"#, "return_tokens_as_token_ids"),
            (r#"{"return_token_ids": true}"#, "return_token_ids"),
            (r#"{"cache_salt": "mine"}"#, "cache_salt"),
            (r#"{"prompt_embeds": ["x"]}"#, "prompt_embeds"),
            (r#"{"return_hidden_states": true}"#, "return_hidden_states"),
            (
                r#"{"stream_options": {"continuous_usage_stats": true}}"#,
                "stream_options.continuous_usage_stats",
            ),
        ];
        for (body, field) in cases {
            let error = refused(body).expect_err(body);
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::Unsupported, Some(field)));
            assert!(error.message.starts_with(field), "{error}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_taken() {
        let taken = r#"{"suffix": "", "tools": [], "tool_choice": "none", "function_call": "auto", "bad_words": [],
            "response_format": {"type": "text"}, "modalities": ["text"], "use_beam_search": false, "audio": null,
            "skip_special_tokens": true, "verbosity": "medium", "web_search_options": {}, "user": "u"}"#;
        assert!(refused(taken).is_ok());
        for taken in [
            r#"{"messages": [], "add_special_tokens": false}"#,
            r#"{"prompt": "x", "add_special_tokens": true}"#,
            r#"{"prompt": [1, 2], "add_special_tokens": false}"#,
            r#"{"prompt": "x", "add_special_tokens": null}"#,
        ] {
            assert!(refused(taken).is_ok(), "{taken}");
        }
    }
}
