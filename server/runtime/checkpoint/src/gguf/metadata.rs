//! What the metadata of a GGUF file says, key by key; the tokeniser's tables and the tokens that stop.

use std::{collections::BTreeMap, fmt};

use super::header::{Array, Fault, Value};
use crate::{GgmlTokenizer, Suggested, TokenKind, tokenizer::ENDINGS};

/// Typed access to metadata by key.
pub(crate) struct Metadata<'a> {
    values: &'a BTreeMap<&'a str, Value<'a>>,
}

impl<'a> Metadata<'a> {
    pub(crate) fn new(values: &'a BTreeMap<&'a str, Value<'a>>) -> Self {
        Self { values }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, Fault> {
        self.read(key, "text", |value| match value {
            Value::Text(text) => Some(*text),
            _ => None,
        })
    }

    pub(crate) fn u32(&self, key: &str) -> Result<Option<u32>, Fault> {
        self.read(key, "a 32-bit number", |value| match *value {
            Value::Unsigned(n) => n.try_into().ok(),
            Value::Signed(n) => n.try_into().ok(),
            _ => None,
        })
    }

    pub(crate) fn f32(&self, key: &str) -> Result<Option<f32>, Fault> {
        Ok(self.f64(key)?.map(|number| number as f32))
    }

    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>, Fault> {
        self.read(key, "a number", number)
    }

    /// A number that need not be one.
    pub(crate) fn suggested(&self, key: &str) -> Option<Suggested> {
        self.values.get(key).map(|value| number(value).ok_or_else(|| Shown(value).to_string()))
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, Fault> {
        self.read(key, "true or false", |value| match *value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    pub(crate) fn array(&self, key: &str) -> Result<Option<&'a Array<'a>>, Fault> {
        self.read(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    fn read<T>(
        &self,
        key: &str,
        kind: &str,
        convert: impl Fn(&'a Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let wrong = || Fault::damaged(key, format!("{} is not {kind}", Shown(value)));
        convert(value).ok_or_else(wrong).map(Some)
    }

    pub(crate) fn tokenizer(&self) -> Result<GgmlTokenizer, Fault> {
        let texts = |key| self.array(key)?.map_or(Ok(Vec::new()), |array| array.texts(key));
        let key = "tokenizer.ggml.tokens";
        let tokens = texts(key)?;
        if tokens.is_empty() {
            return Err(missing(key));
        }
        Ok(GgmlTokenizer {
            model: self
                .text("tokenizer.ggml.model")?
                .ok_or_else(|| missing("tokenizer.ggml.model"))?
                .to_owned(),
            pre: self.text("tokenizer.ggml.pre")?.unwrap_or_default().to_owned(),
            kinds: self.token_kinds(tokens.len())?,
            scores: self.scores(tokens.len())?,
            merges: texts("tokenizer.ggml.merges")?,
            bos: self.token_id("bos", tokens.len())?,
            eos: self.token_id("eos", tokens.len())?,
            unknown: self.token_id("unknown", tokens.len())?,
            padding: self.token_id("padding", tokens.len())?,
            add_bos: self.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: self.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: self.bool("tokenizer.ggml.add_space_prefix")?,
            tokens,
        })
    }

    fn token_id(&self, name: &str, tokens: usize) -> Result<Option<u32>, Fault> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = self.u32(&key)?;
        match id {
            Some(id) if id as usize >= tokens => {
                Err(Fault::damaged(key, format!("{id} is not one of the {tokens} tokens")))
            }
            id => Ok(id),
        }
    }

    fn token_kinds(&self, tokens: usize) -> Result<Vec<TokenKind>, Fault> {
        let key = "tokenizer.ggml.token_type";
        let Some(array) = self.array(key)? else { return Ok(vec![TokenKind::Normal; tokens]) };
        same_length(key, array.len(), tokens)?;
        let kind = |number: f64| match number as i64 {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        };
        Ok(array.numbers(key)?.into_iter().map(kind).collect())
    }

    fn scores(&self, tokens: usize) -> Result<Vec<f32>, Fault> {
        let key = "tokenizer.ggml.scores";
        let Some(array) = self.array(key)? else { return Ok(Vec::new()) };
        same_length(key, array.len(), tokens)?;
        Ok(array.numbers(key)?.into_iter().map(|score| score as f32).collect())
    }

    /// EOS, end of turn, end of message, and control tokens that are known to end a turn although files often leave
    /// them unnamed.
    pub(crate) fn stop_token_ids(&self, tokenizer: &GgmlTokenizer) -> Result<Vec<u32>, Fault> {
        let mut ids: Vec<u32> = tokenizer.eos.into_iter().collect();
        for name in ["eot", "eom"] {
            ids.extend(self.token_id(name, tokenizer.tokens.len())?);
        }
        let control = |kind: &TokenKind| *kind == TokenKind::Control;
        let named = tokenizer.tokens.iter().zip(&tokenizer.kinds).enumerate();
        let named = named.filter(|(_, (text, kind))| control(kind) && ENDINGS.contains(&text.as_str()));
        ids.extend(named.map(|(id, _)| id as u32));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

fn number(value: &Value<'_>) -> Option<f64> {
    match *value {
        Value::Float(x) => Some(x),
        Value::Unsigned(n) => Some(n as f64),
        Value::Signed(n) => Some(n as f64),
        _ => None,
    }
}

pub(crate) fn missing(key: &str) -> Fault {
    Fault::damaged(key, "it is not there")
}

fn same_length(key: &str, found: usize, tokens: usize) -> Result<(), Fault> {
    if found == tokens {
        Ok(())
    } else {
        Err(Fault::damaged(key, format!("{found} entries for {tokens} tokens")))
    }
}

/// A value short enough for a message.
struct Shown<'a>(&'a Value<'a>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Value::Unsigned(n) => n.fmt(f),
            Value::Signed(n) => n.fmt(f),
            Value::Float(x) => x.fmt(f),
            Value::Bool(flag) => flag.fmt(f),
            Value::Text(text) => write!(f, "{:?}", text.chars().take(64).collect::<String>()),
            Value::Array(array) => write!(f, "an array of {}", array.len()),
        }
    }
}
