//! For tests, here and in `tests/http`: a text model whose tokens are bytes. What it is made of comes from the module
//! that includes it, which is inside this crate or outside.

use super::{ApiError, ChatMessage, Spelling, TextModel, TextReader, TextStops, Variables};

/// One token per byte; the template is `role:content\n` per turn and `assistant:`.
pub(crate) struct Bytes;

static BYTES: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut at = 0;
    while at < 256 {
        bytes[at] = at as u8;
        at += 1;
    }
    bytes
};

struct ByteReader {
    stops: Vec<String>,
    all: String,
    given: usize,
}

impl TextModel for Bytes {
    fn tokenise_text(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn tokenise_chat(&self, chat: &[ChatMessage<'_>], _: &Variables) -> Result<Vec<u32>, ApiError> {
        let mut text: String = chat.iter().map(|said| format!("{}:{}\n", said.role, said.content)).collect();
        text.push_str("assistant:");
        self.tokenise_text(&text)
    }

    fn reader(&self, stops: &TextStops) -> Box<dyn TextReader> {
        Box::new(ByteReader {
            stops: stops.strings().map(str::to_owned).collect(),
            all: String::new(),
            given: 0,
        })
    }

    fn spelling(&self, token: u32) -> Spelling<'_> {
        match token {
            0 => Spelling::Name("<end>".into()),
            byte => Spelling::Bytes(&BYTES[byte as usize..][..1]),
        }
    }

    fn vocabulary(&self) -> u32 {
        256
    }
}

impl TextReader for ByteReader {
    fn push(&mut self, token: u32, text: &mut String) -> bool {
        self.all.push(char::from(token as u8));
        if let Some(at) = self.stops.iter().filter_map(|stop| self.all.find(stop.as_str())).min() {
            text.push_str(&self.all[self.given..at.max(self.given)]);
            return true;
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0).saturating_sub(1);
        let certain = self.all.len().saturating_sub(longest).max(self.given);
        text.push_str(&self.all[self.given..certain]);
        self.given = certain;
        false
    }

    fn characters(&self) -> u32 {
        self.all.chars().count() as u32
    }

    fn finish(&mut self, text: &mut String) {
        text.push_str(&self.all[self.given..]);
        self.given = self.all.len();
    }
}
