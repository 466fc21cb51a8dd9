//! What whole files say.

use std::{fs, path::Path};

use baton_checkpoint::{Checkpoint, CheckpointError, LayerWeight, Suggested, Weight};

use crate::{
    place::{Place, use_it},
    small::{config, gguf_model},
};

#[test]
fn whole_files_open_in_both_versions_and_formats() {
    let place = Place::new();
    for version in [2, 3] {
        let mut bytes = gguf_model().finish();
        bytes[4] = version;
        let checkpoint = Checkpoint::open(&place.gguf(&bytes)).expect("the tiny GGUF opens");
        assert_eq!((checkpoint.name(), checkpoint.stop_token_ids()), ("tiny", [3].as_slice()));
        use_it(&checkpoint);
    }
    let checkpoint = Checkpoint::open(place.hugging_face()).expect("the tiny directory opens");
    assert_eq!((checkpoint.eos_token(), checkpoint.stop_token_ids()), (Some("<|end|>"), [3].as_slice()));
    assert!(matches!(
        checkpoint.tensor(Weight::Layer(1, LayerWeight::Query)),
        Err(CheckpointError::NoTensor { .. })
    ));
    use_it(&checkpoint);
}

#[test]
fn known_endings_count_where_nothing_says_what_ends_a_turn() {
    let place = Place::new();
    let directory = place.hugging_face();
    let mut config = config();
    config["eos_token_id"] = serde_json::Value::Null;
    fs::write(directory.join("config.json"), config.to_string()).expect("written");
    assert_eq!(Checkpoint::open(directory).expect("opens").stop_token_ids(), [3]);
    fs::write(directory.join("generation_config.json"), r#"{"eos_token_id": [1, 2]}"#).expect("written");
    assert_eq!(Checkpoint::open(directory).expect("opens").stop_token_ids(), [1, 2]);
}

#[test]
fn what_a_model_suggests_for_sampling_is_told_as_its_file_has_it() {
    let place = Place::new();
    let told = |path: &Path| {
        let checkpoint = Checkpoint::open(path).expect("opens");
        let sampling = checkpoint.sampling().clone();
        let all = [
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
        ];
        let name = sampling.path.file_name().map(|name| name.to_string_lossy().into_owned());
        let number = |value: Suggested| value.expect("is a number");
        (name, all.map(|one| one.map(|one| (one.field, number(one.value)))))
    };
    let directory = place.hugging_face();
    assert_eq!(told(directory), (None, [None; 5]));
    let write = |text: &str| fs::write(directory.join("generation_config.json"), text).expect("written");
    // As Qwen3's, with a value that no request may have: whoever uses it says what it may be.
    write(r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": null, "repetition_penalty": 11}"#);
    let expected =
        [Some(("temperature", 0.6)), None, Some(("top_k", 20.0)), None, Some(("repetition_penalty", 11.0))];
    assert_eq!(told(directory), (Some("generation_config.json".to_owned()), expected));
    let gguf = gguf_model()
        .f32("general.sampling.temp", 0.5)
        .u32("general.sampling.top_k", 20)
        .f32("general.sampling.top_p", 0.75)
        .f32("general.sampling.min_p", 0.25)
        .f32("general.sampling.penalty_repeat", 1.5);
    let expected = [
        Some(("general.sampling.temp", 0.5)),
        Some(("general.sampling.top_p", 0.75)),
        Some(("general.sampling.top_k", 20.0)),
        Some(("general.sampling.min_p", 0.25)),
        Some(("general.sampling.penalty_repeat", 1.5)),
    ];
    assert_eq!(told(&place.gguf(&gguf.finish())), (Some("tiny.gguf".to_owned()), expected));
}

/// Servers open it: they do not use it.
#[test]
fn what_is_suggested_need_not_be_a_number() {
    let place = Place::new();
    let temperature = |path: &Path| {
        let checkpoint = Checkpoint::open(path).expect("opens");
        checkpoint.sampling().temperature.clone().expect("is suggested").value
    };
    let directory = place.hugging_face();
    for value in [r#""hot""#, "[0.6]", "true"] {
        let text = format!(r#"{{"temperature": {value}}}"#);
        fs::write(directory.join("generation_config.json"), text).expect("written");
        assert_eq!(temperature(directory), Err(value.to_owned()));
    }
    let gguf = gguf_model().text("general.sampling.temp", "warm");
    assert_eq!(temperature(&place.gguf(&gguf.finish())), Err("\"warm\"".to_owned()));
}
