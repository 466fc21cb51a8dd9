//! Fields of OpenAI's, and of vLLM's beside them, that would change the answer and are not served: refused by name
//! unless they ask for nothing.

use baton_proto::{ApiError, ErrorCode};
use serde::Deserialize;
use serde_json::Value;

/// They are read as what they are, since nothing is done with them.
#[derive(Debug, Default, Deserialize)]
pub struct Unserved {
    suffix: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    function_call: Option<Value>,
    response_format: Option<Value>,
    modalities: Option<Value>,
    audio: Option<Value>,
    use_beam_search: Option<Value>,
    prompt_logprobs: Option<Value>,
    allowed_token_ids: Option<Value>,
    bad_words: Option<Value>,
    structured_outputs: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
    truncate_prompt_tokens: Option<Value>,
    chat_template: Option<Value>,
    continue_final_message: Option<Value>,
    add_generation_prompt: Option<Value>,
    skip_special_tokens: Option<Value>,
}

/// Nothing that could be meant by it is asked for.
fn unset(value: &Option<Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Bool(true) | Value::Number(_)) => false,
    }
}

/// For what is on by default.
fn not_off(value: &Option<Value>) -> bool {
    matches!(value, None | Some(Value::Null | Value::Bool(true)))
}

impl Unserved {
    /// Refuses what is not served, by field.
    pub fn refuse(&self) -> Result<(), ApiError> {
        const TOOLS: &str = "tools are not served";
        const FUNCTIONS: &str = "functions are not served";
        const STRUCTURE: &str = "structured output is not served";
        const TEXT: &str = "only text is served";
        const TEMPLATE: &str = "only the model's own chat template is served";
        let by_itself = |value: &Option<Value>| matches!(value, Some(Value::String(choice)) if choice == "none" || choice == "auto");
        let text_format = match &self.response_format {
            Some(Value::Object(format)) => format.get("type").is_none_or(|kind| kind == "text"),
            other => unset(other),
        };
        let text_only = match &self.modalities {
            Some(Value::Array(list)) => list.iter().all(|modality| modality == "text"),
            other => unset(other),
        };
        let served = [
            ("suffix", unset(&self.suffix), "insertion is not served"),
            ("tools", unset(&self.tools), TOOLS),
            ("tool_choice", unset(&self.tool_choice) || by_itself(&self.tool_choice), TOOLS),
            ("functions", unset(&self.functions), FUNCTIONS),
            ("function_call", unset(&self.function_call) || by_itself(&self.function_call), FUNCTIONS),
            ("response_format", text_format, "only the response format {\"type\": \"text\"} is served"),
            ("modalities", text_only, TEXT),
            ("audio", unset(&self.audio), TEXT),
            ("use_beam_search", unset(&self.use_beam_search), "beam search is not served"),
            (
                "prompt_logprobs",
                unset(&self.prompt_logprobs),
                "log probabilities of the prompt are not served; `logprobs` gives those of the answer",
            ),
            ("allowed_token_ids", unset(&self.allowed_token_ids), "not served; see `logit_bias`"),
            ("bad_words", unset(&self.bad_words), "not served; see `logit_bias`"),
            ("structured_outputs", unset(&self.structured_outputs), STRUCTURE),
            ("guided_json", unset(&self.guided_json), STRUCTURE),
            ("guided_regex", unset(&self.guided_regex), STRUCTURE),
            ("guided_choice", unset(&self.guided_choice), STRUCTURE),
            ("guided_grammar", unset(&self.guided_grammar), STRUCTURE),
            (
                "truncate_prompt_tokens",
                unset(&self.truncate_prompt_tokens),
                "prompts are not cut; shorten it",
            ),
            ("chat_template", unset(&self.chat_template), TEMPLATE),
            (
                "continue_final_message",
                unset(&self.continue_final_message),
                "the last message cannot be continued; use /v1/completions",
            ),
            (
                "add_generation_prompt",
                not_off(&self.add_generation_prompt),
                "an answer of the assistant's is always asked for",
            ),
            ("skip_special_tokens", not_off(&self.skip_special_tokens), "special tokens have no text here"),
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

    fn refuse(body: &str) -> Result<(), ApiError> {
        serde_json::from_str::<Unserved>(body).expect(body).refuse()
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let refused = [
            (r#"{"suffix": "x"}"#, "suffix"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools"),
            (r#"{"tool_choice": "required"}"#, "tool_choice"),
            (r#"{"functions": [{}]}"#, "functions"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
            (r#"{"modalities": ["audio"]}"#, "modalities"),
            (r#"{"use_beam_search": true}"#, "use_beam_search"),
            (r#"{"prompt_logprobs": 0}"#, "prompt_logprobs"),
            (r#"{"allowed_token_ids": [1]}"#, "allowed_token_ids"),
            (r#"{"bad_words": ["x"]}"#, "bad_words"),
            (r#"{"guided_choice": ["a", "b"]}"#, "guided_choice"),
            (r#"{"chat_template": "{{ messages }}"}"#, "chat_template"),
            (r#"{"skip_special_tokens": false}"#, "skip_special_tokens"),
            (r#"{"add_generation_prompt": false}"#, "add_generation_prompt"),
        ];
        for (body, field) in refused {
            let error = refuse(body).expect_err(body);
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::Unsupported, Some(field)));
            assert!(error.message.starts_with(field), "{error}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_taken() {
        let taken = r#"{"suffix": "", "tools": [], "tool_choice": "none", "function_call": "auto", "bad_words": [],
            "response_format": {"type": "text"}, "modalities": ["text"], "use_beam_search": false, "audio": null,
            "skip_special_tokens": true, "user": "u"}"#;
        assert!(refuse(taken).is_ok());
    }
}
