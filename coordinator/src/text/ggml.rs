//! Builds a tokeniser from the tables of a GGUF file.
//!
//! The tables do not say how text is split before merging, only a name for it; the splits here are those of the
//! `tokenizer.json` files that Hugging Face publishes for the models the names stand for.

use std::sync::LazyLock;

use baton_checkpoint::{GgmlTokenizer, TokenKind};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::unicode::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel, digits::Digits, sequence::Sequence, split::Split, split::SplitPattern,
    },
};

use super::{
    TokenizerError,
    detokenize::{TokenText, TokenTexts},
    sentencepiece,
};

/// What [`build`] makes.
pub(super) struct Built {
    pub(super) tables: Tokenizer,
    pub(super) texts: TokenTexts,
    /// BOS and EOS, where encoding adds them.
    pub(super) before: Option<u32>,
    pub(super) after: Option<u32>,
}

/// What a name in `tokenizer.ggml.pre` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pre {
    Gpt2,
    /// Every digit on its own, then as GPT-2.
    Smollm,
    Llama3,
    Qwen2,
    DeepseekV3,
}

const SUPPORTED: &str = "gpt-2, smollm, llama-bpe (llama3, llama-v3), qwen2 (deepseek-r1-qwen), deepseek-v3";

pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

impl Pre {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "gpt-2" => Self::Gpt2,
            "smollm" => Self::Smollm,
            "llama-bpe" | "llama3" | "llama-v3" => Self::Llama3,
            "qwen2" | "deepseek-r1-qwen" => Self::Qwen2,
            "deepseek-v3" => Self::DeepseekV3,
            _ => return None,
        })
    }

    fn normalizer(self) -> Option<NormalizerWrapper> {
        (self == Self::Qwen2).then(|| NFC.into())
    }

    fn splits(self) -> Result<PreTokenizerWrapper, TokenizerError> {
        let split = |pattern: &str| {
            Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::from)
        };
        let bytes = |also_split| PreTokenizerWrapper::from(ByteLevel::new(false, true, also_split));
        let mut steps: Vec<PreTokenizerWrapper> = match self {
            Self::Gpt2 => Vec::new(),
            Self::Smollm => vec![Digits::new(true).into()],
            Self::Llama3 => vec![split(LLAMA3)?],
            Self::Qwen2 => vec![split(QWEN2)?],
            Self::DeepseekV3 => DEEPSEEK_V3.into_iter().map(split).collect::<Result<_, _>>()?,
        };
        steps.push(bytes(matches!(self, Self::Gpt2 | Self::Smollm)));
        Ok(Sequence::new(steps).into())
    }
}

/// Builds the tokeniser; the error says what is wrong or not supported.
pub(super) fn build(source: &GgmlTokenizer) -> Result<Built, TokenizerError> {
    match source.model.as_str() {
        "gpt2" => byte_level_bpe(source),
        "llama" => sentencepiece::build(source),
        other => Err(TokenizerError::UnknownModel(other.to_owned())),
    }
}

fn byte_level_bpe(source: &GgmlTokenizer) -> Result<Built, TokenizerError> {
    let pre = Pre::parse(&source.pre)
        .ok_or_else(|| TokenizerError::UnknownSplits { found: source.pre.clone(), supported: SUPPORTED })?;
    let merges = source.merges.iter().enumerate().map(|(at, merge)| {
        let pair = merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
        pair.ok_or_else(|| TokenizerError::BadMerge { at, merge: merge.clone() })
    });
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary(source), merges.collect::<Result<_, TokenizerError>>()?)
        // LLaMA 3's tokeniser takes a whole word that is a token before it merges.
        .ignore_merges(pre == Pre::Llama3)
        .build()?;
    let mut tables = Tokenizer::new(bpe);
    tables.with_normalizer(pre.normalizer())?;
    tables.with_pre_tokenizer(Some(pre.splits()?));
    tables.add_tokens(added_tokens(source))?;
    let adds_bos = source.add_bos.unwrap_or(pre == Pre::Llama3);
    Ok(Built {
        tables,
        texts: TokenTexts::new(
            source.tokens.iter().zip(&source.kinds).map(|(token, &kind)| text(token, kind)),
        ),
        before: source.bos.filter(|_| adds_bos),
        after: source.eos.filter(|_| source.add_eos == Some(true)),
    })
}

/// Ids by token.
pub(super) fn vocabulary(source: &GgmlTokenizer) -> Vocab {
    source.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
}

/// Tokens that are matched whole in a prompt.
pub(super) fn added_tokens(source: &GgmlTokenizer) -> Vec<AddedToken> {
    let added = |(token, kind): (&String, &TokenKind)| match kind {
        TokenKind::Control | TokenKind::Unknown => Some(AddedToken::from(token.clone(), true)),
        TokenKind::UserDefined => Some(AddedToken::from(token.clone(), false).normalized(false)),
        TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => None,
    };
    let tokens = source.tokens.iter().zip(&source.kinds).filter_map(added);
    tokens.filter(|token| !token.content.is_empty()).collect()
}

/// What a token shows.
fn text(token: &str, kind: TokenKind) -> TokenText {
    match kind {
        TokenKind::Control | TokenKind::Unknown | TokenKind::Unused => TokenText::Hidden(token.to_owned()),
        TokenKind::UserDefined => TokenText::Shown(token.as_bytes().to_vec()),
        TokenKind::Normal | TokenKind::Byte => TokenText::Shown(byte_level(token)),
    }
}

/// The bytes of a token that is written in GPT-2's characters for bytes. One that is not stands for itself.
pub(super) fn byte_level(token: &str) -> Vec<u8> {
    spelt(token).unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The bytes of a token that is written in GPT-2's characters for bytes.
pub(super) fn spelt(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

/// GPT-2's table of bytes: those that are printable in Latin-1 are written as themselves, the others, in order, as the
/// characters from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    static MOVED: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..=u8::MAX).filter(|&byte| !is_printable(byte)).collect());
    match u32::from(character) {
        code @ 0..=0xff => Some(code as u8).filter(|&byte| is_printable(byte)),
        code => MOVED.get((code - 0x100) as usize).copied(),
    }
}

const fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    /// A byte-level tokeniser of single bytes, one merge, one control and one user-defined token.
    fn tables(pre: &str) -> GgmlTokenizer {
        let bytes = (0..=u8::MAX).map(|byte| {
            let moved = || (0..byte).filter(|&byte| !is_printable(byte)).count() as u32 + 0x100;
            let code = if is_printable(byte) { u32::from(byte) } else { moved() };
            char::from_u32(code).expect("a character of the table").to_string()
        });
        let extra = ["ab", "<|end|>", "<tool call>"].map(str::to_owned);
        let mut kinds = vec![TokenKind::Normal; 257];
        kinds.extend([TokenKind::Control, TokenKind::UserDefined]);
        GgmlTokenizer {
            model: "gpt2".to_owned(),
            pre: pre.to_owned(),
            tokens: bytes.chain(extra).collect(),
            kinds,
            merges: vec!["a b".to_owned()],
            scores: Vec::new(),
            bos: Some(257),
            eos: Some(257),
            unknown: None,
            padding: None,
            add_bos: None,
            add_eos: None,
            add_space_prefix: None,
        }
    }

    fn message(result: Result<Built, TokenizerError>) -> String {
        result.err().expect("it is refused").to_string()
    }

    #[test]
    fn text_is_split_as_hugging_face_splits_it() {
        let file: Value =
            serde_json::from_str(include_str!("../../tests/reference/tokens.json")).expect("JSON");
        let texts = file["texts"].as_array().expect("texts");
        for (name, wanted) in file["splits"].as_object().expect("splits") {
            let built = build(&tables(name)).unwrap_or_else(|reason| panic!("{reason}"));
            for (text, wanted) in texts.iter().zip(wanted.as_array().expect("a list")) {
                let text = text["text"].as_str().expect("text");
                let mut pieces = PreTokenizedString::from(text);
                if let Some(normalizer) = built.tables.get_normalizer() {
                    pieces
                        .normalize(|part| tokenizers::Normalizer::normalize(normalizer, part))
                        .expect("normalises");
                }
                let splits = built.tables.get_pre_tokenizer().expect("there is one");
                splits.pre_tokenize(&mut pieces).expect("splits");
                let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
                let pieces: Vec<&str> =
                    pieces.iter().map(|(piece, ..)| *piece).filter(|p| !p.is_empty()).collect();
                assert_eq!(serde_json::json!(pieces), *wanted, "{name}: {text:?}");
            }
        }
    }

    #[test]
    fn merges_special_tokens_and_bytes_come_together() {
        let built = build(&tables("gpt-2")).unwrap_or_else(|reason| panic!("{reason}"));
        let ids =
            built.tables.encode_fast("ab<|end|>c<tool call>", false).expect("encodes").get_ids().to_vec();
        assert_eq!(ids, [256, 257, u32::from(b'c'), 258]);
        let shown: Vec<&[u8]> = ids.iter().map(|&id| built.texts.get(id)).collect();
        assert_eq!(shown, [b"ab".as_slice(), b"", b"c", b"<tool call>"]);
        for byte in 0..=u8::MAX {
            assert_eq!(built.texts.get(u32::from(byte)), [byte]);
        }
        assert_eq!((built.before, built.after), (None, None));
        assert_eq!(build(&tables("llama-bpe")).map(|built| built.before).ok(), Some(Some(257)));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert!(message(build(&tables("chatglm-bpe"))).contains("chatglm-bpe"));
        assert!(message(build(&tables(""))).contains("supported: gpt-2"));
        let wordpiece = GgmlTokenizer { model: "bert".to_owned(), ..tables("default") };
        assert!(message(build(&wordpiece)).contains("\"bert\""));
        let broken = GgmlTokenizer { merges: vec!["ab".to_owned()], ..tables("gpt-2") };
        assert!(message(build(&broken)).contains("merges[0]"));
        let unknown = GgmlTokenizer { merges: vec!["a xyz".to_owned()], ..tables("gpt-2") };
        assert!(message(build(&unknown)).contains("xyz"));
    }
}
