//! The one model this coordinator serves: its text side and its limits.

use std::sync::Arc;

use baton_proto::ApiError;

use super::sampling::TokenLimits;

/// One turn of a chat, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    pub content: String,
}

/// Text to tokens and back, as far as this crate needs it.
pub trait TextModel: Send + Sync {
    /// Tokens of a plain prompt, with what the model wants before it.
    fn tokenise_text(&self, text: &str) -> Result<Vec<u32>, ApiError>;

    /// Tokens of a chat through the model's template, ready for the assistant's answer.
    fn tokenise_chat(&self, turns: &[Turn]) -> Result<Vec<u32>, ApiError>;

    /// Reads an answer that ends before any of `stops`.
    fn reader(&self, stops: Vec<String>) -> Box<dyn TextReader>;

    /// One more than the highest token id.
    fn vocabulary(&self) -> u32;
}

/// Turns the tokens of one answer into text, holding back what is not certain yet: parts of characters, and what may
/// become a stop string.
pub trait TextReader: Send {
    /// Appends text that has become certain. True: a stop string has matched and the answer ends before it.
    fn push(&mut self, token: u32, text: &mut String) -> bool;

    /// Appends what was held back: no more tokens come.
    fn finish(&mut self, text: &mut String);
}

/// The model as requests meet it.
pub struct Served {
    /// What clients say in `model`.
    pub name: String,
    /// The checkpoint's own name and revision: what instances call it.
    pub checkpoint: String,
    pub revision: String,
    pub limits: TokenLimits,
    /// Tokens that end a sequence.
    pub stop_tokens: Vec<u32>,
    /// Unix seconds from which it is served, for `/v1/models`.
    pub since: u64,
    pub text: Arc<dyn TextModel>,
}

impl Served {
    /// What OpenAI calls the system fingerprint: changes with the weights.
    pub fn fingerprint(&self) -> String {
        format!(
            "fp_{}",
            self.revision.chars().filter(char::is_ascii_alphanumeric).take(12).collect::<String>()
        )
    }
}
