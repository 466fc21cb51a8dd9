//! The models of scripted clusters: their tokens are bytes.

use std::sync::Arc;

use baton_coordinator::{
    prepare::{SamplingDefaults, Served, Spelling, TextModel, TextReader},
    text::{ChatMessage, TextStops, Variables},
};
use baton_proto::ApiError;

#[path = "../../../src/prepare/tests/bytes.rs"]
mod bytes;
use bytes::Bytes;

/// Byte 0 ends a sequence; the context is 1,000 tokens.
pub(crate) fn served() -> Served {
    Served {
        name: "tiny".into(),
        aliases: Vec::new(),
        revision: "r1".into(),
        context_tokens: 1000,
        stop_tokens: vec![0],
        sampling: SamplingDefaults::default(),
        since: 1,
        text: Arc::new(Bytes),
    }
}

/// Another model: twice the context, and an alias.
pub(crate) fn other() -> Served {
    Served {
        name: "other".into(),
        aliases: vec!["alias".into()],
        revision: "r2".into(),
        context_tokens: 2000,
        ..served()
    }
}

/// Bytes for tokens, too, and a test is told what is to be tokenised, now or ahead.
pub(crate) struct Watched<T, A> {
    pub(crate) tokenises: T,
    pub(crate) ahead: A,
}

impl<T: Fn(&str) + Send + Sync, A: Fn(&str) + Send + Sync> TextModel for Watched<T, A> {
    fn remember(&self, text: &str) -> usize {
        (self.ahead)(text);
        text.len()
    }

    fn tokenise_text(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        (self.tokenises)(text);
        Bytes.tokenise_text(text)
    }

    fn tokenise_chat(&self, chat: &[ChatMessage<'_>], variables: &Variables) -> Result<Vec<u32>, ApiError> {
        Bytes.tokenise_chat(chat, variables)
    }

    fn reader(&self, stops: &TextStops) -> Box<dyn TextReader> {
        Bytes.reader(stops)
    }

    fn spelling(&self, token: u32) -> Spelling<'_> {
        Bytes.spelling(token)
    }

    fn vocabulary(&self) -> u32 {
        Bytes.vocabulary()
    }
}
