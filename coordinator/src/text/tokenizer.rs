//! The tokeniser of a checkpoint, whatever its source, and the bytes of its tokens.

use std::{path::Path, sync::Arc};

use baton_checkpoint::{Around, Checkpoint, GgmlTokenizer, TokenizerSource};
use serde_json::Value;
use tokenizers::{PostProcessorWrapper, Tokenizer as Tables};

use super::{
    TextError, TokenizerError,
    detokenize::{TokenText, TokenTexts},
    fast::Fast,
    ggml,
    pieces::{Memo, TextCache},
    sentencepiece,
};

/// Text to token ids. Equal to Hugging Face's tokeniser of the same model.
#[derive(Debug)]
pub struct Tokenizer {
    engine: Engine,
    /// What encoding puts around a plain text, where the tables do not say so themselves.
    before: Option<u32>,
    after: Option<u32>,
}

/// Who tokenises.
#[derive(Debug)]
enum Engine {
    Fast(Box<Fast>),
    /// For what the fast one does not know.
    Tables(Box<Tables>),
}

impl Engine {
    fn of(tables: Tables, path: &Path, cache: &Arc<TextCache>) -> Self {
        match Fast::of(&tables, Memo::new(cache.clone())) {
            Ok(fast) => Self::Fast(Box::new(fast)),
            Err(reason) => {
                let path = path.display();
                tracing::warn!(%path, %reason, "this model's prompts are tokenised slowly, some MB a second");
                Self::Tables(Box::new(tables))
            }
        }
    }
}

impl Tokenizer {
    /// Builds the tokeniser, and the table of its tokens' bytes. Pieces of long texts are kept in `cache`.
    pub(super) fn open(
        checkpoint: &Checkpoint,
        cache: &Arc<TextCache>,
    ) -> Result<(Self, TokenTexts), TextError> {
        match checkpoint.tokenizer() {
            TokenizerSource::HuggingFaceJson { file, around } => {
                let json = file.read().map_err(Box::new)?;
                Self::of_json(&json, file.path(), around.as_ref(), cache)
            }
            TokenizerSource::Ggml(source) => Self::of_ggml(source, checkpoint.path(), cache),
        }
    }

    /// From the tables of a GGUF file.
    pub(super) fn of_ggml(
        source: &GgmlTokenizer,
        path: &Path,
        cache: &Arc<TextCache>,
    ) -> Result<(Self, TokenTexts), TextError> {
        let built =
            ggml::build(source).map_err(|source| TextError::Tokenizer { path: path.to_owned(), source })?;
        let engine = Engine::of(built.tables, path, cache);
        Ok((Self { engine, before: built.before, after: built.after }, built.texts))
    }

    /// From a `tokenizer.json`. `path` is for errors to name; `around` is what comes around a text if that is not as the file says.
    pub fn of_json(
        json: &[u8],
        path: &Path,
        around: Option<&Around>,
        cache: &Arc<TextCache>,
    ) -> Result<(Self, TokenTexts), TextError> {
        let failed = |source| TextError::Tokenizer { path: path.to_owned(), source };
        let mut tables = Tables::from_bytes(json).map_err(|error| failed(error.into()))?;
        // Left over from training in some files: a prompt is never cut or filled up here.
        tables.with_padding(None);
        tables.with_truncation(None).map_err(|error| failed(error.into()))?;
        let texts = json_texts(&tables).map_err(failed)?;
        if around.is_some() {
            tables.with_post_processor(None::<PostProcessorWrapper>);
        }
        let id = |token: &Option<String>| tables.token_to_id(token.as_deref()?);
        let (before, after) = around.map_or((None, None), |around| (id(&around.before), id(&around.after)));
        let engine = Engine::of(tables, path, cache);
        Ok((Self { engine, before, after }, texts))
    }

    /// Token ids of `text`, special tokens in it matched whole. `surround` adds what the model wants around a plain
    /// text, such as BOS.
    pub fn encode(&self, text: &str, surround: bool) -> Result<Vec<u32>, TextError> {
        let mut tokens = Vec::with_capacity(text.len() / 4 + 8);
        let around = |id: Option<u32>| id.filter(|_| surround);
        tokens.extend(around(self.before));
        match &self.engine {
            Engine::Fast(fast) => fast.encode(text, surround, &mut tokens),
            Engine::Tables(tables) => {
                let encoding = tables.encode_fast(text, surround).map_err(TextError::Encode)?;
                tokens.extend_from_slice(encoding.get_ids());
            }
        }
        tokens.extend(around(self.after));
        Ok(tokens)
    }

    /// Tokenises a text of which more may come, for the cache alone, up to a place that is told; 0 = nothing.
    pub fn remember(&self, text: &str) -> usize {
        match &self.engine {
            Engine::Fast(fast) => fast.remember(text),
            Engine::Tables(_) => 0,
        }
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
        (Some(token), _) if token.special => TokenText::Hidden(token.content.clone()),
        (Some(token), _) => TokenText::Shown(token.content.clone().into_bytes()),
        (None, None) => TokenText::Hidden(format!("token_id:{id}")),
        (None, Some(token)) => TokenText::Shown(match spelling {
            Spelling::ByteLevel => ggml::byte_level(&token),
            Spelling::Sentencepiece => sentencepiece::bytes(&token),
        }),
    };
    Ok(TokenTexts::new((0..count).map(text)))
}
