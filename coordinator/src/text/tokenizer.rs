//! The tokeniser of a checkpoint, whatever its source, and the bytes of its tokens.

use std::path::Path;

use baton_checkpoint::{Checkpoint, TokenizerSource};
use serde_json::Value;
use tokenizers::Tokenizer as Tables;

use super::{
    TextError, TokenizerError,
    detokenize::{Piece, TokenTexts},
    ggml, sentencepiece,
};

/// Text to token ids. Equal to Hugging Face's tokeniser of the same model.
#[derive(Debug)]
pub struct Tokenizer {
    tables: Tables,
    /// What encoding puts around a plain text, where the tables do not say so themselves.
    before: Option<u32>,
    after: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokeniser, and the table of its tokens' bytes.
    pub(super) fn open(checkpoint: &Checkpoint) -> Result<(Self, TokenTexts), TextError> {
        let failed = |path: &Path, source| TextError::Tokenizer { path: path.to_owned(), source };
        match checkpoint.tokenizer() {
            TokenizerSource::HuggingFaceJson(path) => {
                let mut tables = Tables::from_file(path).map_err(|error| failed(path, error.into()))?;
                // Left over from training in some files: a prompt is never cut or filled up here.
                tables.with_padding(None);
                tables.with_truncation(None).map_err(|error| failed(path, error.into()))?;
                let texts = json_texts(&tables).map_err(|source| failed(path, source))?;
                Ok((Self { tables, before: None, after: None }, texts))
            }
            TokenizerSource::Ggml(source) => {
                let built = ggml::build(source).map_err(|source| failed(checkpoint.path(), source))?;
                Ok((Self { tables: built.tables, before: built.before, after: built.after }, built.texts))
            }
        }
    }

    /// Token ids of `text`, special tokens in it matched whole. `surround` adds what the model wants around a plain
    /// text, such as BOS.
    pub fn encode(&self, text: &str, surround: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.tables.encode_fast(text, surround).map_err(TextError::Encode)?;
        let around = |id: Option<u32>| id.filter(|_| surround);
        Ok(around(self.before)
            .into_iter()
            .chain(encoding.get_ids().iter().copied())
            .chain(around(self.after))
            .collect())
    }
}

/// How a `tokenizer.json` writes bytes in its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's characters for bytes.
    ByteLevel,
    /// `▁` for a space, `<0xNN>` for a byte.
    Sentencepiece,
}

impl Spelling {
    /// From the decoder of a `tokenizer.json`.
    fn of(decoder: &Value) -> Option<Self> {
        match decoder["type"].as_str()? {
            "ByteLevel" => Some(Self::ByteLevel),
            "ByteFallback" | "Metaspace" => Some(Self::Sentencepiece),
            "Sequence" => decoder["decoders"].as_array()?.iter().find_map(Self::of),
            _ => None,
        }
    }
}

/// Every token of a `tokenizer.json`; special ones have no text.
fn json_texts(tables: &Tables) -> Result<TokenTexts, TokenizerError> {
    let decoder = serde_json::to_value(tables.get_decoder())?;
    let spelling = Spelling::of(&decoder).ok_or(TokenizerError::UnknownDecoder)?;
    let count = tables.get_vocab(true).into_values().max().map_or(0, |highest| highest + 1);
    let added = tables.get_added_tokens_decoder();
    let text = |id| match (added.get(&id), tables.id_to_token(id)) {
        (Some(token), _) if token.special => Piece::Hidden(token.content.clone()),
        (Some(token), _) => Piece::Shown(token.content.clone().into_bytes()),
        (None, None) => Piece::Hidden(format!("token_id:{id}")),
        (None, Some(token)) => Piece::Shown(match spelling {
            Spelling::ByteLevel => ggml::byte_level(&token),
            Spelling::Sentencepiece => sentencepiece::bytes(&token),
        }),
    };
    Ok(TokenTexts::new((0..count).map(text)))
}
