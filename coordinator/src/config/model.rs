//! One of the models that are served, as it is configured.

use std::path::PathBuf;

use baton_proto::MODEL_NAMES_MOST;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A [model](../../README.md#models) that is served: its tokenizer, chat template and limits apply to what is asked of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A GGUF file or a Hugging Face directory.
    pub path: PathBuf,
    /// What clients may say in `model`, 1 to 256 bytes each; answers say the first. Empty = the checkpoint's own name.
    #[schemars(length(max = MODEL_NAMES_MOST))]
    pub names: Vec<String>,
    /// Context to offer, in tokens, if less than the model's. 0 = the model's.
    pub max_context_tokens: u32,
    /// Whose `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty` apply where a request does not say. How long an
    /// answer may be is never taken from a checkpoint (`max_new_tokens`).
    pub generation_config: GenerationConfig,
}

/// Where a model's defaults for sampling come from, as it is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GenerationConfig {
    /// What the checkpoint suggests, in `generation_config.json` or as `general.sampling.*` of a GGUF file, and OpenAI's for
    /// the rest.
    #[default]
    Checkpoint,
    /// A temperature of 1 and everything else off, as OpenAI has it, whatever the checkpoint suggests.
    Openai,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sampling_is_the_checkpoints_unless_openais_is_asked_for() {
        let read =
            |config| serde_json::from_value::<ModelConfig>(config).map(|config| config.generation_config);
        assert_eq!(read(json!({"path": "a"})).expect("is taken"), GenerationConfig::Checkpoint);
        for (name, expected) in
            [("checkpoint", GenerationConfig::Checkpoint), ("openai", GenerationConfig::Openai)]
        {
            assert_eq!(read(json!({"path": "a", "generation_config": name})).expect(name), expected);
        }
        assert!(read(json!({"path": "a", "generation_config": "vllm"})).is_err());
    }
}
