//! Token for token against `tokenizers`: the real tables of four models, and one vocabulary under the expressions of all.

use std::{path::PathBuf, sync::LazyLock};

use baton_checkpoint::{Checkpoint, GgmlTokenizer, TokenizerSource};
use proptest::{prelude::*, sample::select};

use super::*;

fn smollm() -> GgmlTokenizer {
    let path = std::env::var_os("BATON_TEST_MODEL").expect(
        "BATON_TEST_MODEL must be the path of SmolLM2-135M-Instruct.Q4_1.gguf; `deploy/run test` sets it",
    );
    let checkpoint = Checkpoint::open(&PathBuf::from(path)).expect("the model opens");
    match checkpoint.tokenizer() {
        TokenizerSource::Ggml(source) => (**source).clone(),
        TokenizerSource::HuggingFaceJson { .. } => panic!("it is a GGUF file"),
    }
}

/// SmolLM's vocabulary, split as another family splits.
fn split_as(pre: &str) -> Tables {
    let source = GgmlTokenizer { pre: pre.to_owned(), ..smollm() };
    ggml::build(&source).unwrap_or_else(|error| panic!("{error}")).tables
}

/// The published `tokenizer.json` of a model.
fn published(name: &str) -> Tables {
    let folder = std::env::var_os("BATON_TEST_TOKENIZERS")
        .expect("BATON_TEST_TOKENIZERS must be a folder of tokenizers; `deploy/run test` sets it");
    let path = PathBuf::from(folder).join(name).join("tokenizer.json");
    Tables::from_file(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

struct Both {
    name: &'static str,
    fast: Fast,
    tables: Tables,
}

/// All that are compared.
static ALL: LazyLock<Vec<Both>> = LazyLock::new(|| {
    let split = ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"].map(|name| (name, split_as(name)));
    let published = ["llama3", "qwen3", "deepseek_v3"].map(|name| (name, published(name)));
    let both = |(name, tables): (&'static str, Tables)| {
        let memo = Memo::new(pieces::TextCache::new(1 << 20));
        let fast = Fast::of(&tables, memo).unwrap_or_else(|reason| panic!("{name} is slow: {reason}"));
        Both { name, fast, tables }
    };
    split.into_iter().chain(published).map(both).collect()
});

fn theirs(tables: &Tables, text: &str, surround: bool) -> Vec<u32> {
    tables.encode_fast(text, surround).expect("encodes").get_ids().to_vec()
}

fn ours(fast: &Fast, text: &str, surround: bool) -> Vec<u32> {
    let mut tokens = Vec::new();
    fast.encode(text, surround, &mut tokens);
    tokens
}

/// What makes a difference to one expression or another.
fn fragment() -> impl Strategy<Value = String> {
    let texts = |texts: &'static [&'static str]| select(texts).prop_map(str::to_owned);
    let characters = |characters: &'static str| {
        select(characters.chars().collect::<Vec<_>>()).prop_map(|character| character.to_string())
    };
    let words = &[
        "the",
        "Hello",
        "ing",
        "naïve",
        "STRASSE",
        "中文",
        "测试",
        "ひらがな",
        "カタカナ",
        "한국어",
        "привет",
    ];
    let shortened =
        &["'s", "'S", "'ſ", "'t", "'re", "'RE", "'Ve", "'m", "'ll", "'lL", "'d", "'", "''", "’s", "s'", "'x"];
    let tokens = &[
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<|im_",
        "|>",
        "<",
    ];
    prop_oneof![
        4 => any::<char>().prop_map(|character| character.to_string()),
        4 => texts(words),
        3 => texts(shortened),
        2 => texts(tokens),
        6 => characters(" \n\r\t\u{a0}\u{3000}\u{2003}\u{85}\u{b}\u{c}\u{2028}"),
        4 => "[ \n\r\t]{1,6}",
        3 => "[a-zA-Z]{1,24}",
        3 => "[0-9]{1,8}",
        2 => characters("²½Ⅷ٣१１𝟗一〇㊿"),
        3 => "[!-/:-@\\[-`{-~]{1,4}",
        3 => "\\PC{1,3}",
        2 => characters("\u{301}\u{308}\u{327}\u{93f}\u{1161}\u{11a8}\u{200d}\u{fe0f}ᄀ각Å\u{212b}"),
        2 => characters("，。、・ー゠〜！？「」\u{3040}\u{3099}\u{309b}龥龦豈"),
        2 => characters("😀👩🏽🇩🇪€$+=<>^`|~\u{0}\u{1}\u{7f}\u{ad}\u{e000}\u{fffd}"),
        1 => characters("\u{fb43}\u{fb1d}\u{958}"),
        1 => "[一-龥]{1,12}",
        1 => "\\p{L}{1,8}",
        1 => "a{50,120}",
    ]
}

fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(fragment(), 0..24).prop_map(|fragments| fragments.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300)
    ))]

    #[test]
    fn tokens_are_those_of_tokenizers(text in text(), surround in any::<bool>()) {
        for Both { name, fast, tables } in &*ALL {
            prop_assert_eq!(ours(fast, &text, surround), theirs(tables, &text, surround), "{}", name);
        }
    }

    #[test]
    fn a_text_may_be_cut_at_borders(text in text()) {
        cut_at_borders(&text.replace('<', "("));
    }
}

/// What [`pieces`] rests on: at each border of a text, and to both tokenisers.
fn cut_at_borders(text: &str) {
    for at in (1..text.len()).filter(|&at| text.is_char_boundary(at) && pieces::is_border(text, at)) {
        let (left, right) = text.split_at(at);
        for Both { name, fast, tables } in &*ALL {
            let halves = [ours(fast, left, false), ours(fast, right, false)].concat();
            assert_eq!(halves, ours(fast, text, false), "{name}: {left:?} | {right:?}");
            assert_eq!(halves, theirs(tables, text, false), "{name}: {left:?} | {right:?}");
        }
    }
}

/// Some of them it takes apart into a letter and a mark, which ends no word.
#[test]
fn no_text_is_cut_behind_a_letter_that_nfc_changes() {
    let changed = |character: &char| {
        character.is_alphabetic() && composed(&character.to_string()) != character.to_string()
    };
    let letters: Vec<char> = ('\0'..=char::MAX).filter(changed).collect();
    assert!(letters.contains(&'\u{fb43}') && letters.len() > 1000, "{} letters", letters.len());
    let border_behind = |letter: char| pieces::is_border(&format!("a{letter}\n"), 1 + letter.len_utf8());
    assert!(border_behind('é'));
    for letter in letters {
        assert!(!border_behind(letter), "{letter:?}");
    }
}

#[test]
fn every_character_splits_as_tokenizers_split_it() {
    // All characters of the lower planes, each between others that tell its class; of ideographs and Hangul, that are all
    // alike, some.
    let alike =
        |first: &u32| matches!(first, 0x3440..0x9f80 | 0xac40..0xd780) && !first.is_multiple_of(0x800);
    let blocks: Vec<String> = (0..0x2_0000u32)
        .step_by(64)
        .filter(|first| !alike(first))
        .map(|first| {
            let all = (first..first + 64).filter_map(char::from_u32);
            all.map(|character| format!("a{character}b {character} 1{character}\n'{character}")).collect()
        })
        .collect();
    for Both { name, fast, tables } in &*ALL {
        // Those that split alike need not be looked at twice.
        if name.contains('-') || *name == "smollm" {
            for block in &blocks {
                assert_eq!(ours(fast, block, false), theirs(tables, block, false), "{name}: {block:?}");
            }
        }
    }
}

#[test]
fn what_it_does_not_know_is_refused_with_the_reason() {
    let memo = || Memo::new(pieces::TextCache::new(0));
    let reason = |tables: &Tables| Fast::of(tables, memo()).err();
    let mut other = split_as("qwen2");
    other.with_normalizer(Some(tokenizers::normalizers::unicode::NFKC)).expect("is taken");
    assert_eq!(reason(&other), Some(Slow::Normalizer));
    let mut other = split_as("qwen2");
    other.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::byte_level::ByteLevel::new(true, true, true)));
    assert_eq!(reason(&other), Some(Slow::Splits));
    let mut other = split_as("qwen2");
    other.add_tokens([tokenizers::AddedToken::from("<wide>", true).rstrip(true)]).expect("is taken");
    assert_eq!(reason(&other), Some(Slow::Added("<wide>".to_owned())));
}

#[test]
fn one_that_differs_is_not_taken() {
    let tables = split_as("gpt-2");
    let memo = Memo::new(pieces::TextCache::new(0));
    let fast = Fast::of(&tables, memo).expect("is fast");
    let other = Fast { splits: Splits::Llama3 { digits: 3 }, ..fast };
    assert!(matches!(other.compare(&tables, &[]), Err(Slow::Differs(_))));
}
