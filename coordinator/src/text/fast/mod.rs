//! Text to tokens for the models whose tokeniser is byte-level BPE with one of a few expressions: LLaMA 3, Qwen, DeepSeek
//! V3, GPT-2 and SmolLM. Token for token what `tokenizers` gives, and many times as fast.
//!
//! [`Fast::of`] takes the tables over from a `tokenizers` tokeniser, or says what of it is not known here; then it compares
//! the two on texts of all kinds, and on the vocabulary itself. Whoever calls keeps the slow one for what is refused.
//!
//! `splits` cuts text into words, `words` knows what short ones become, `merges` merges the others. Nothing of it is
//! `unsafe`, and what it remembers of words is bounded by the cores, whatever threads call.

mod added;
mod classes;
mod merges;
mod splits;
#[cfg(test)]
mod tests;
mod words;

use std::{collections::HashMap, num::NonZero};

use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer as Tables};

use self::{
    added::Added,
    classes::{LETTER, UNSTABLE, classes},
    merges::Merges,
    splits::Splits,
    words::{Key, Remembered, Tokens, WORD_BYTES_MOST, WORDS_AT_A_TIME, key, remembered_as, word_of},
};
use super::{
    ggml,
    pieces::{self, Memo},
};

/// Why a tokeniser stays the slow one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Slow {
    #[error("its model is not byte-pair encoding")]
    Model,
    #[error("its model uses `{0}`")]
    Option(&'static str),
    #[error("its normalizer is another than NFC")]
    Normalizer,
    #[error("its pre-tokenizer is another than those of GPT-2, SmolLM, LLaMA 3, Qwen and DeepSeek V3")]
    Splits,
    #[error("its added token {0:?} takes its surroundings with it")]
    Added(String),
    #[error("what it puts around a text cannot be told apart")]
    Around,
    #[error("its tables cannot be read: {0}")]
    Tables(String),
    #[error("it differs from `tokenizers` on {0:?}")]
    Differs(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Fast {
    /// Those that are found in a text as it came, and after it was normalised.
    added: [Added; 2],
    /// In NFC.
    normalizes: bool,
    splits: Splits,
    merges: Merges,
    /// Takes a word that is a token before it merges anything.
    takes_whole: bool,
    tokens: Tokens,
    /// Tokens of more than 15 bytes, for `takes_whole`.
    long: HashMap<Box<[u8]>, u32>,
    /// Ids before and after a text that is to be surrounded.
    around: [Vec<u32>; 2],
    /// One for each that encodes; those beyond the cores are thrown away after.
    remembered: Mutex<Vec<Remembered>>,
    cores: usize,
    memo: Memo,
}

/// Of a token: merging its bytes gives it again.
const MERGES: u32 = 1 << 31;

/// The fields of a BPE model.
#[derive(Deserialize)]
struct Bpe {
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    byte_fallback: bool,
    unk_token: Option<String>,
    ignore_merges: bool,
    merges: Vec<(String, String)>,
}

impl Fast {
    /// Takes over what `tables` hold; the error says why that does not work. `memo` keeps long pieces of text.
    pub(super) fn of(tables: &Tables, memo: Memo) -> Result<Self, Slow> {
        let unread = |error: serde_json::Error| Slow::Tables(error.to_string());
        let ModelWrapper::BPE(model) = tables.get_model() else { return Err(Slow::Model) };
        let bpe: Bpe =
            serde_json::to_vec(model).and_then(|json| serde_json::from_slice(&json)).map_err(unread)?;
        bpe.refuse()?;
        let added = Added::of(tables)?;
        let normalizes = normalizes(&serde_json::to_value(tables.get_normalizer()).map_err(unread)?)?;
        let splits = serde_json::to_value(tables.get_pre_tokenizer()).map_err(unread)?;
        let splits = Splits::of(&splits).ok_or(Slow::Splits)?;

        let vocabulary = model.get_vocab();
        let spelt = |(token, &id): (&String, &u32)| Some((ggml::spelt(token)?, id));
        let spelt: Vec<(Vec<u8>, u32)> = vocabulary.iter().filter_map(spelt).collect();
        let merges = merges(&bpe, &vocabulary, &spelt)?;
        let mut fast = Self {
            memo,
            added,
            normalizes,
            splits,
            takes_whole: bpe.ignore_merges,
            tokens: Tokens::new(spelt.len()),
            long: HashMap::new(),
            around: around(tables)?,
            remembered: Mutex::default(),
            cores: std::thread::available_parallelism().map_or(1, NonZero::get),
            merges,
        };
        let mut merged = Vec::new();
        for (bytes, id) in &spelt {
            merged.clear();
            fast.merges.merge(bytes, &mut merged);
            let merges = if merged[..] == [*id] { MERGES } else { 0 };
            if bytes.len() <= WORD_BYTES_MOST {
                fast.tokens.insert(key(bytes, 0, bytes.len()), id | merges);
            } else if bpe.ignore_merges {
                fast.long.insert(bytes.clone().into(), *id);
            }
        }
        fast.compare(tables, &spelt)?;
        Ok(fast)
    }

    /// Appends the token ids of `text`; `surround` adds what the model wants around a plain text.
    pub(super) fn encode(&self, text: &str, surround: bool, tokens: &mut Vec<u32>) {
        let [before, after] = &self.around;
        tokens.extend(before.iter().filter(|_| surround));
        self.with_words(|words| {
            self.added[0].each(text, |plain, token| {
                self.normalized(plain, words, tokens);
                tokens.extend(token);
            });
        });
        tokens.extend(after.iter().filter(|_| surround));
    }

    /// Tokenises a text of which more may come, up to its last cut or added token, for the cache alone. Tells where
    /// that is; 0 = there is none.
    pub(super) fn remember(&self, text: &str) -> usize {
        if !self.memo.keeps() {
            return 0;
        }
        // Cut as it will be when it is whole: from the last of these tokens on.
        let plain = self.added.iter().map(|added| added.last_end(text)).max().unwrap_or(0);
        let to = plain + pieces::last_cut(&text[plain..]).unwrap_or(0);
        if to > 0 {
            self.encode(&text[..to], false, &mut Vec::with_capacity(to / 4));
        }
        to
    }

    /// What text without added tokens becomes, as it came.
    fn normalized(&self, text: &str, words: &mut Remembered, tokens: &mut Vec<u32>) {
        let composed = (self.normalizes && !is_stable(text)).then(|| composed(text));
        self.added[1].each(composed.as_deref().unwrap_or(text), |plain, token| {
            self.memo.each(plain, tokens, |piece, tokens| self.plain(piece, words, tokens));
            tokens.extend(token);
        });
    }

    /// Words and their merges, and nothing else. Words are split off some at a time and looked up then: what is looked up
    /// for the one does not wait for the other.
    fn plain(&self, text: &str, words: &mut Remembered, tokens: &mut Vec<u32>) {
        let bytes = text.as_bytes();
        let (mut some, mut count) = ([(0, 0); WORDS_AT_A_TIME], 0);
        self.splits.each(text, |start, end| {
            some[count] = (start, end);
            count += 1;
            if count == WORDS_AT_A_TIME {
                self.words(bytes, &some, words, tokens);
                count = 0;
            }
        });
        self.words(bytes, &some[..count], words, tokens);
    }

    fn words(&self, text: &[u8], some: &[(usize, usize)], words: &mut Remembered, tokens: &mut Vec<u32>) {
        let mut keys = [0; WORDS_AT_A_TIME];
        for (remembered, &(start, end)) in keys.iter_mut().zip(some) {
            if end - start <= WORD_BYTES_MOST {
                *remembered = remembered_as(key(text, start, end), self.takes_whole);
            }
        }
        if words.recall_all(&keys, some.len(), tokens) {
            return;
        }
        // Looked up before any is needed: the table is large, and one that lies far away does not keep others waiting.
        let mut ids = [None; WORDS_AT_A_TIME];
        for (id, &key) in ids.iter_mut().zip(&keys[..some.len()]) {
            if key != 0 && !words.knows(key) {
                *id = Some(self.tokens.get(word_of(key)));
            }
        }
        for ((&(start, end), key), id) in some.iter().zip(keys).zip(ids) {
            let word = &text[start..end];
            if key == 0 {
                self.long(word, words, tokens);
            } else if !words.recall(key, tokens) {
                self.unknown((key, word), id, words, tokens);
            }
        }
    }

    /// A part of up to 15 bytes of a word, which is not taken whole.
    #[inline]
    fn part(&self, word: &[u8], (start, end): (usize, usize), words: &mut Remembered, tokens: &mut Vec<u32>) {
        let key = remembered_as(key(word, start, end), false);
        if !words.recall(key, tokens) {
            self.unknown((key, &word[start..end]), None, words, tokens);
        }
    }

    /// A word that is not remembered, or a part of one, and which token it is, if that was looked up. Is remembered from now
    /// on.
    #[inline(never)]
    fn unknown(
        &self,
        (remembered, word): (Key, &[u8]),
        id: Option<Option<u32>>,
        words: &mut Remembered,
        tokens: &mut Vec<u32>,
    ) {
        let key = word_of(remembered);
        let (takes_whole, before) = (remembered != key, tokens.len());
        match id.unwrap_or_else(|| self.tokens.get(key)) {
            Some(id) if takes_whole || id & MERGES != 0 => tokens.push(id & !MERGES),
            _ => words.long(word, takes_whole, tokens, |_, tokens| self.merges.merge(word, tokens)),
        }
        words.keep(remembered, &tokens[before..]);
    }

    /// A word of more than 15 bytes.
    fn long(&self, word: &[u8], words: &mut Remembered, tokens: &mut Vec<u32>) {
        words.long(word, true, tokens, |words, tokens| {
            if let Some(&id) = self.long.get(word) {
                tokens.push(id);
                return;
            }
            self.merges.cuts(word, |start, end| {
                if end - start <= WORD_BYTES_MOST {
                    self.part(word, (start, end), words, tokens);
                } else if (start, end) == (0, word.len()) {
                    self.merges.merge(word, tokens);
                } else {
                    let part = &word[start..end];
                    words.long(part, false, tokens, |_, tokens| self.merges.merge(part, tokens));
                }
            });
        });
    }

    fn with_words<R>(&self, work: impl FnOnce(&mut Remembered) -> R) -> R {
        let kept = self.remembered.lock().pop();
        let mut words = kept.unwrap_or_else(Remembered::new);
        let done = work(&mut words);
        let mut free = self.remembered.lock();
        if free.len() < self.cores {
            free.push(words);
        }
        done
    }

    /// Encodes texts of all kinds, and the vocabulary, in both ways.
    fn compare(&self, tables: &Tables, vocabulary: &[(Vec<u8>, u32)]) -> Result<(), Slow> {
        const EVERY: usize = 61;
        let some: Vec<u8> =
            vocabulary.iter().step_by(EVERY).flat_map(|(bytes, _)| bytes.iter().copied()).collect();
        let some = String::from_utf8_lossy(&some);
        for text in SAMPLES.into_iter().chain([&*some]) {
            for surround in [true, false] {
                let theirs =
                    tables.encode_fast(text, surround).map_err(|error| Slow::Tables(error.to_string()))?;
                let mut ours = Vec::new();
                self.encode(text, surround, &mut ours);
                if ours != theirs.get_ids() {
                    return Err(Slow::Differs(text.chars().take(80).collect()));
                }
            }
        }
        Ok(())
    }
}

impl Bpe {
    fn refuse(&self) -> Result<(), Slow> {
        let set = |option: &Option<String>| option.as_ref().is_some_and(|option| !option.is_empty());
        for (used, name) in [
            (self.dropout.is_some(), "dropout"),
            (set(&self.continuing_subword_prefix), "continuing_subword_prefix"),
            (set(&self.end_of_word_suffix), "end_of_word_suffix"),
            (self.byte_fallback, "byte_fallback"),
        ] {
            if used {
                return Err(Slow::Option(name));
            }
        }
        Ok(())
    }
}

fn merges(bpe: &Bpe, vocabulary: &HashMap<String, u32>, spelt: &[(Vec<u8>, u32)]) -> Result<Merges, Slow> {
    let mut bytes = [None; 256];
    for (token, id) in spelt.iter().filter(|(token, _)| token.len() == 1) {
        bytes[usize::from(token[0])] = Some(*id);
    }
    if bpe.unk_token.is_some() && bytes.contains(&None) {
        return Err(Slow::Option("unk_token"));
    }
    let id = |token: &str| {
        let id = vocabulary.get(token).filter(|id| **id < MERGES);
        id.copied().ok_or_else(|| Slow::Tables(format!("a merge has {token:?}, which is no token")))
    };
    let merge =
        |(left, right): &(String, String)| Ok((id(left)?, id(right)?, id(&format!("{left}{right}"))?));
    let merges: Vec<_> = bpe.merges.iter().map(merge).collect::<Result<_, Slow>>()?;
    Ok(Merges::new(bytes, &merges, spelt.iter().map(|(token, _)| token.as_slice())))
}

/// Whether a text is brought into NFC.
fn normalizes(normalizer: &Value) -> Result<bool, Slow> {
    match normalizer["type"].as_str() {
        None => Ok(false),
        Some("NFC") => Ok(true),
        Some("Sequence") => {
            let steps = normalizer["normalizers"].as_array().ok_or(Slow::Normalizer)?;
            steps.iter().try_fold(false, |any, step| Ok(any | normalizes(step)?))
        }
        Some(_) => Err(Slow::Normalizer),
    }
}

/// Whether NFC leaves it as it is, told by its characters one by one.
fn is_stable(text: &str) -> bool {
    text.is_ascii() || text.chars().all(|character| classes()[character as usize] & UNSTABLE == 0)
}

/// Whether it is one to the expressions, composed or not: of a letter that NFC takes apart a mark may be left at the end.
pub(super) fn is_letter(character: char) -> bool {
    classes()[character as usize] & (LETTER | UNSTABLE) == LETTER
}

fn composed(text: &str) -> String {
    use unicode_normalization_alignments::UnicodeNormalization;
    text.nfc().map(|(character, _)| character).collect()
}

/// What `tables` put around a text, from one whose token is told from the others.
fn around(tables: &Tables) -> Result<[Vec<u32>; 2], Slow> {
    let ids = |surround| {
        let encoding = tables.encode_fast("a", surround).map_err(|error| Slow::Tables(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    };
    let (plain, surrounded): (Vec<u32>, Vec<u32>) = (ids(false)?, ids(true)?);
    let [token] = plain[..] else { return Err(Slow::Around) };
    let mut at = surrounded.iter().enumerate().filter(|(_, id)| **id == token);
    match (at.next(), at.next()) {
        (Some((at, _)), None) => Ok([surrounded[..at].to_vec(), surrounded[at + 1..].to_vec()]),
        _ => Err(Slow::Around),
    }
}

/// Something of all that splits have to do with.
const SAMPLES: [&str; 9] = [
    "",
    " ",
    "The quick brown fox's friend, who'd said \"I'LL be back\", isn't here; they've gone (2,048 m away)!\n\nWell\r\n",
    "fn main() {\n    let x = 0x1F_u32;\t// 12345678.9e-10\n\n\n        println!(\"{x:?}\");   \n}\n \n  ",
    "naïve Ångström A\u{30a}ngstro\u{308}m e\u{301}\u{327} \u{1100}\u{1161}\u{11a8} ½ ² Ⅷ ٣٤٥ १२३ 'ſ'S ʼn",
    "中文分词测试，今天的天气很好。ひらがなとカタカナ・ー漢字！한국어 텍스트도 있습니다? 日本語１２３４",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 €100 ½% «quoted»…—–\u{a0}\u{2003}\u{3000}\u{200b}\u{feff}\u{85}x\u{1}\u{2}y \u{e000}\u{10ffff}",
    "<|im_start|>user\n<think>a</think><|im_end|>\n<｜User｜>hi<｜Assistant｜><|begin_of_text|><|eot_id|><tool_call> </s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ================= ______ العربية हिन्दी ไทย",
];
