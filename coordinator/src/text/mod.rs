//! A model's text side: chat template, tokeniser, and back from tokens to text.
//!
//! Opened once from the checkpoint when the coordinator starts; then shared by all requests, which never change it.
//! `tokenizer`, `ggml` and `sentencepiece` build the
//! tokeniser, `fast` takes it over if it is of a kind that it knows, `pieces` keeps what long texts became, `template`
//! renders chats, `detokenize` turns an answer's tokens into
//! text as they come, `stop` ends it at stop strings. Which tokens end a sequence is not decided here.

mod detokenize;
mod error;
mod fast;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod ggml;
mod pieces;
mod reader;
mod sentencepiece;
mod stop;
mod template;
mod tokenizer;

use std::sync::Arc;

use baton_checkpoint::Checkpoint;

pub use detokenize::{Detokenizer, TokenTexts};
pub use error::{TextError, TokenizerError};
pub use pieces::TextCache;
pub use reader::Reader;
pub use stop::{STOP_BYTES_MOST, StopMatcher, TextStops};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use template::says_what_is_written;
pub use template::{ChatMessage, ChatTemplate, Clock, Variables};
pub use tokenizer::Tokenizer;

/// The text side of one model.
#[derive(Debug)]
pub struct CheckpointText {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    texts: Arc<TokenTexts>,
}

impl CheckpointText {
    /// Builds tokeniser and template from what the checkpoint holds. `clock` is what `strftime_now` in a template
    /// tells, `cache` keeps pieces of long prompts. Takes some 100 ms.
    pub fn open(checkpoint: &Checkpoint, clock: Clock, cache: &Arc<TextCache>) -> Result<Self, TextError> {
        let (tokenizer, texts) = Tokenizer::open(checkpoint, cache)?;
        check_vocabulary(checkpoint, &texts)?;
        let template = checkpoint.chat_template().map(|source| {
            ChatTemplate::new(source, checkpoint.bos_token(), checkpoint.eos_token(), clock)
                .map_err(|source| TextError::Template { path: checkpoint.path().to_owned(), source })
        });
        Ok(Self { tokenizer, template: template.transpose()?, texts: Arc::new(texts) })
    }

    /// Tokens of a chat, ready for the assistant's answer. The template, which is told `variables`, too, writes every special
    /// token itself.
    pub fn encode_chat(
        &self,
        messages: &[ChatMessage<'_>],
        variables: &Variables,
    ) -> Result<Vec<u32>, TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoTemplate)?;
        self.tokenizer.encode(&template.render(messages, variables)?, false)
    }

    /// Tokens of a plain prompt, with those that the model wants around it, such as BOS.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.tokenizer.encode(text, true)
    }

    /// Tokenises a text of which more may come, for the cache alone, up to a place that is told; 0 = nothing.
    pub fn remember(&self, text: &str) -> usize {
        self.tokenizer.remember(text)
    }

    /// Turns the tokens of one answer into text.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.texts.clone())
    }

    /// Turns the tokens of one answer into text that ends at any of `stops`.
    pub fn reader(&self, stops: &TextStops) -> Reader {
        Reader::new(self.detokenizer(), stops)
    }

    /// All tokens.
    pub fn tokens(&self) -> &TokenTexts {
        &self.texts
    }

    /// One more than the highest token id that has a text.
    pub fn vocabulary(&self) -> u32 {
        self.texts.len()
    }
}

/// Refuses a tokeniser that makes ids for which the model has no embedding.
fn check_vocabulary(checkpoint: &Checkpoint, texts: &TokenTexts) -> Result<(), TextError> {
    let rows = checkpoint.config().vocabulary;
    if texts.len() > rows {
        let source = TokenizerError::OtherModel { knows: texts.len(), rows };
        return Err(TextError::Tokenizer { path: checkpoint.path().to_owned(), source });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
