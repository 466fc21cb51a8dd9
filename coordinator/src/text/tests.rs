//! The real model's text side against Hugging Face's tokeniser and template.

use std::{path::PathBuf, time::SystemTime};

use baton_checkpoint::{Around, Checkpoint};
use serde_json::Value;

use super::*;

fn real() -> CheckpointText {
    let path = std::env::var_os("BATON_TEST_MODEL").expect(
        "BATON_TEST_MODEL must be the path of SmolLM2-135M-Instruct.Q4_1.gguf; `deploy/run test` sets it",
    );
    open(PathBuf::from(path))
}

fn open(path: PathBuf) -> CheckpointText {
    let checkpoint = Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}"));
    CheckpointText::open(&checkpoint, || SystemTime::UNIX_EPOCH, &TextCache::new(1 << 20))
        .unwrap_or_else(|error| panic!("{error}"))
}

fn reference() -> Value {
    serde_json::from_str(include_str!("../../tests/reference/tokens.json")).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

fn detokenise(model: &CheckpointText, ids: &[u32]) -> String {
    let (mut detokenizer, mut text) = (model.detokenizer(), String::new());
    ids.iter().for_each(|&id| detokenizer.push(id, &mut text));
    detokenizer.finish(&mut text);
    text
}

#[test]
fn the_real_model_tokenises_as_hugging_face_does() {
    let (model, reference) = (real(), reference());
    assert_eq!(model.vocabulary(), 49152);
    for case in reference["texts"].as_array().expect("texts") {
        let text = text(&case["text"]);
        assert_eq!(model.encode_text(text).expect("encodes"), ids(&case["ids"]), "{text:?}");
    }
    for case in reference["chats"].as_array().expect("chats") {
        let messages = case["messages"].as_array().expect("messages").iter();
        let messages: Vec<ChatMessage<'_>> = messages
            .map(|m| ChatMessage { role: text(&m["role"]), content: text(&m["content"]).into() })
            .collect();
        let template = model.template.as_ref().expect("the model has a template");
        assert_eq!(template.render(&messages, &Variables::new()).expect("renders"), text(&case["prompt"]));
        assert_eq!(model.encode_chat(&messages, &Variables::new()).expect("encodes"), ids(&case["ids"]));
    }
    for case in reference["decoded"].as_array().expect("decoded") {
        assert_eq!(detokenise(&model, &ids(&case["ids"])), text(&case["text"]));
    }
}

#[test]
fn both_formats_of_a_tiny_model_tokenise_alike() {
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../server/runtime/tests/reference/tiny");
    let directory = open(tiny.join("hf-bf16-ratio4-llama3"));
    let file = open(tiny.join("gguf-q4_0/model.gguf"));
    assert_eq!((directory.vocabulary(), file.vocabulary()), (272, 272));
    let whole = "the hen, 2 rats & é☕\n<|im_end|>then";
    for model in [&directory, &file] {
        assert_eq!(
            detokenise(model, &model.encode_text(whole).expect("encodes")),
            whole.replace("<|im_end|>", "")
        );
    }
    let messages = [ChatMessage { role: "user", content: "the one".into() }];
    let prompts =
        [&directory, &file].map(|model| model.encode_chat(&messages, &Variables::new()).expect("encodes"));
    assert_eq!(prompts[0], prompts[1]);
    let texts = [&directory, &file].map(|model| model.encode_text("the one").expect("encodes"));
    assert_eq!(texts[0], texts[1]);
    assert_eq!((prompts[0].first(), prompts[0].contains(&271)), (Some(&270), true));
}

#[test]
fn a_tokeniser_of_another_model_is_refused() {
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../server/runtime/tests/reference/tiny");
    let checkpoint = Checkpoint::open(&tiny.join("gguf-q4_0/model.gguf")).expect("opens");
    let texts = |count| TokenTexts::new(vec![Vec::new(); count]);
    assert!(check_vocabulary(&checkpoint, &texts(272)).is_ok());
    let error = check_vocabulary(&checkpoint, &texts(273)).expect_err("refused").to_string();
    assert!(error.contains("knows 273 tokens, the model 272"), "{error}");
}

#[test]
fn a_model_without_a_template_says_so() {
    let model = CheckpointText { template: None, ..real() };
    assert!(matches!(model.encode_chat(&[], &Variables::new()), Err(TextError::NoTemplate)));
}

/// What `LlamaTokenizerFast` puts before a text is not in DeepSeek's `tokenizer.json`.
#[test]
fn a_text_begins_as_the_class_of_the_tokeniser_has_it() {
    let path =
        std::env::var_os("BATON_TEST_TOKENIZERS").expect("BATON_TEST_TOKENIZERS: `deploy/run test` sets it");
    let path = PathBuf::from(path).join("deepseek_v3/tokenizer.json");
    let json = std::fs::read(&path).expect("is read");
    let cache = TextCache::new(0);
    let encode = |json: &[u8], around: Option<[Option<&str>; 2]>| {
        let around = around.map(|around| around.map(|token| token.map(str::to_owned)));
        let around = around.map(|[before, after]| Around { before, after });
        let (tokenizer, _) = Tokenizer::of_json(json, &path, around.as_ref(), &cache).expect("is taken");
        [true, false].map(|surround| tokenizer.encode("a", surround).expect("encodes"))
    };
    let (bos, eos) = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>");
    let [plain, bare] = encode(&json, None);
    assert_eq!(plain, bare, "the file itself adds nothing");
    // Nor does it matter where it does.
    let mut says: serde_json::Value = serde_json::from_slice(&json).expect("is JSON");
    says["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    });
    let says = says.to_string();
    assert_eq!(encode(says.as_bytes(), None)[0], [&[0], &plain[..]].concat());
    for json in [&json[..], says.as_bytes()] {
        for (around, expected) in [
            ([Some(bos), None], [&[0], &plain[..]].concat()),
            ([Some(bos), Some(eos)], [&[0], &plain[..], &[1]].concat()),
            ([None, None], plain.clone()),
        ] {
            assert_eq!(encode(json, Some(around)), [expected, plain.clone()]);
        }
    }
}
