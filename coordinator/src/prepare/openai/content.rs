//! What a message says: a text, or a list of parts. Read straight into what it is, so that a long text is copied once and no list
//! of parts takes more than its texts.

use std::{fmt, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

/// Between the texts of two parts, as vLLM has it.
const BETWEEN_PARTS: char = '\n';
/// Of a part's type, so much is told where it is not served.
const KIND_BYTES_MOST: usize = 40;

#[derive(Debug)]
pub enum Content {
    Text(Arc<str>),
    /// The texts of all parts, or the first that is none.
    Parts(Result<String, WrongPart>),
}

/// A part that is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongPart {
    /// Its place in the list.
    pub at: usize,
    pub fault: PartFault,
}

/// What is wrong with a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartFault {
    /// It says of no type.
    NoType,
    /// It is a text, without one.
    NoText,
    /// It is something else: so its type begins.
    Other(String),
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "a part, as in {\"type\": \"text\", \"text\": ...}")]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
}

impl Part {
    fn text(self) -> Result<String, PartFault> {
        match (self.kind.as_deref(), self.text) {
            (Some("text"), Some(text)) => Ok(text),
            (Some("text"), None) => Err(PartFault::NoText),
            (Some(kind), _) => Err(PartFault::Other(kind.chars().take(KIND_BYTES_MOST).collect())),
            (None, _) => Err(PartFault::NoType),
        }
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of {\"type\": \"text\", \"text\": ...} parts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Text(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
        let (mut whole, mut at) = (Ok(String::new()), 0);
        // The rest is read on, as what is wrong with it as JSON is told first.
        while let Some(part) = list.next_element::<Part>()? {
            if let Ok(texts) = &mut whole {
                match part.text() {
                    Ok(text) if at == 0 => *texts = text,
                    Ok(text) => {
                        texts.push(BETWEEN_PARTS);
                        texts.push_str(&text);
                    }
                    Err(fault) => whole = Err(WrongPart { at, fault }),
                }
            }
            at += 1;
        }
        Ok(Content::Parts(whole))
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}
