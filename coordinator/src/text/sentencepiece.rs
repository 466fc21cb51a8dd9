//! LLaMA 2's kind of tokeniser: SentencePiece BPE with bytes for what has no piece, from a GGUF file's tables.
//!
//! SentencePiece joins, again and again, the two neighbours whose joint piece has the best score. The tables hold pieces
//! and scores only; the merges that the tokeniser wants follow from them: every way to cut a piece into two others, in
//! the order of the piece's score.

use std::cmp::Ordering;

use baton_checkpoint::{GgmlTokenizer, TokenKind};
use tokenizers::{
    NormalizerWrapper, Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::{Prepend, Replace, Sequence},
};

use super::{
    TokenizerError,
    detokenize::{TokenText, TokenTexts},
    ggml::{Built, added_tokens, vocabulary},
};

/// How SentencePiece writes a space.
const SPACE: &str = "▁";

pub(super) fn build(source: &GgmlTokenizer) -> Result<Built, TokenizerError> {
    if source.scores.len() != source.tokens.len() {
        return Err(TokenizerError::NoScores);
    }
    let vocabulary = vocabulary(source);
    let merges = merges(source, &vocabulary);
    let mut bpe = BPE::builder().vocab_and_merges(vocabulary, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = source.unknown.and_then(|id| source.tokens.get(id as usize)) {
        bpe = bpe.unk_token(unknown.clone());
    }
    let mut tables = Tokenizer::new(bpe.build()?);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if source.add_space_prefix != Some(false) {
        steps.push(Prepend::new(SPACE.to_owned()).into());
    }
    steps.push(Replace::new(" ", SPACE)?.into());
    tables.with_normalizer(Some(Sequence::new(steps)))?;
    tables.add_tokens(added_tokens(source))?;
    let shown = source.tokens.iter().zip(&source.kinds).map(|(token, &kind)| match kind {
        TokenKind::Control | TokenKind::Unknown | TokenKind::Unused => TokenText::Hidden(token.clone()),
        TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte => TokenText::Shown(bytes(token)),
    });
    Ok(Built {
        tables,
        texts: TokenTexts::new(shown),
        before: source.bos.filter(|_| source.add_bos != Some(false)),
        after: source.eos.filter(|_| source.add_eos == Some(true)),
    })
}

/// One way to join two pieces.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    score: f32,
}

/// The merges that the pieces and their scores imply, best first.
fn merges(source: &GgmlTokenizer, vocabulary: &Vocab) -> Vec<(String, String)> {
    let joins = |kind: TokenKind| matches!(kind, TokenKind::Normal | TokenKind::UserDefined);
    let piece = |text: &str| vocabulary.get(text).filter(|&&id| joins(source.kinds[id as usize]));
    let mut merges = Vec::new();
    for ((token, &kind), &score) in source.tokens.iter().zip(&source.kinds).zip(&source.scores) {
        if !joins(kind) {
            continue;
        }
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut of_token: Vec<_> = cuts
            .filter_map(|(left, right)| Some((piece(left)?, piece(right)?, Merge { left, right, score })))
            .collect();
        of_token.sort_by_key(|(left, right, _)| (**left, **right));
        merges.extend(of_token.into_iter().map(|(.., merge)| merge));
    }
    // Of equal scores, the cut with the longer left piece first, as Hugging Face's conversion has it.
    let length = |text: &str| text.chars().count();
    let order = |a: &Merge<'_>, b: &Merge<'_>| -> Ordering {
        let lengths = |merge: &Merge<'_>| (length(merge.left), length(merge.right));
        b.score.total_cmp(&a.score).then_with(|| lengths(b).cmp(&lengths(a)))
    };
    merges.sort_by(order);
    merges.into_iter().map(|merge| (merge.left.to_owned(), merge.right.to_owned())).collect()
}

/// The bytes of a token in SentencePiece's spelling: `▁` is a space, `<0xNN>` a byte.
pub(super) fn bytes(token: &str) -> Vec<u8> {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace(SPACE, " ").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn reference() -> (GgmlTokenizer, Value) {
        let file: Value =
            serde_json::from_str(include_str!("../../tests/reference/tokens.json")).expect("JSON");
        let spm = file["spm"].clone();
        let list = |field: &str| spm[field].as_array().expect("a list").clone();
        let kinds = list("kinds").into_iter().map(|kind| match kind.as_u64() {
            Some(2) => TokenKind::Unknown,
            Some(3) => TokenKind::Control,
            Some(6) => TokenKind::Byte,
            _ => TokenKind::Normal,
        });
        let source = GgmlTokenizer {
            model: "llama".to_owned(),
            pre: "default".to_owned(),
            tokens: list("tokens").iter().map(|token| token.as_str().expect("text").to_owned()).collect(),
            kinds: kinds.collect(),
            merges: Vec::new(),
            scores: list("scores").iter().map(|score| score.as_f64().expect("a number") as f32).collect(),
            bos: Some(1),
            eos: Some(2),
            unknown: Some(0),
            padding: None,
            add_bos: None,
            add_eos: None,
            add_space_prefix: None,
        };
        (source, spm["texts"].clone())
    }

    #[test]
    fn ids_are_those_of_sentencepiece() {
        let (source, texts) = reference();
        let built = build(&source).unwrap_or_else(|reason| panic!("{reason}"));
        for case in texts.as_array().expect("texts") {
            let text = case["text"].as_str().expect("text");
            let ids = built.tables.encode_fast(text, false).expect("encodes").get_ids().to_vec();
            assert_eq!(serde_json::json!(ids), case["ids"], "{text:?}");
            let shown: Vec<u8> = ids.iter().flat_map(|&id| built.texts.get(id).to_vec()).collect();
            let prefixed = if text.is_empty() { String::new() } else { format!(" {text}") };
            assert_eq!(String::from_utf8_lossy(&shown), prefixed);
        }
        assert_eq!((built.before, built.after), (Some(1), None));
    }

    #[test]
    fn special_tokens_are_matched_whole() {
        let (source, _) = reference();
        let built = build(&source).unwrap_or_else(|reason| panic!("{reason}"));
        let ids = built.tables.encode_fast("<s>the</s>", false).expect("encodes").get_ids().to_vec();
        assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&2)));
        assert!(built.texts.get(1).is_empty());
    }

    #[test]
    fn tables_without_scores_are_refused() {
        let source = GgmlTokenizer { scores: Vec::new(), ..reference().0 };
        assert!(build(&source).err().expect("refused").to_string().contains("tokenizer.ggml.scores"));
    }

    #[test]
    fn its_spelling_is_read() {
        assert_eq!(bytes("▁a▁"), b" a ");
        assert_eq!(bytes("<0xE2>"), [0xe2]);
        assert_eq!(bytes("<0xE>"), b"<0xE>");
    }
}
