//! Hugging Face directories: `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja`, `model.safetensors` or its shards.

mod config;
mod fields;
mod latent;
mod mixture;
mod rope;
mod tokens;
mod weights;

use std::path::Path;

use crate::{
    CheckpointError, ModelRoot, SuggestedSampling, TokenizerSource,
    parts::{Format, Parts},
    root::RootedFile,
    sampling,
};
use fields::JsonFile;

/// Reads a directory's JSON files and the heads of its safetensors files.
pub(crate) fn read(root: &ModelRoot, directory: &Path) -> Result<Parts, CheckpointError> {
    let config =
        JsonFile::open(root, directory, "config.json")?.ok_or_else(|| lacks(directory, "config.json"))?;
    let tokenizer = directory.join("tokenizer.json");
    if !tokenizer.is_file() {
        return Err(lacks(directory, "tokenizer.json"));
    }
    let (model, tied) = config::model(&config)?;
    let (files, mut tensors) = weights::read((root, directory), &model, config::scaled_blocks(&config)?)?;
    if tied {
        tensors.remove(&crate::Weight::Output);
    }
    let generation = JsonFile::open(root, directory, "generation_config.json")?;
    let tokens = tokens::read((root, directory), (&config, generation.as_ref()), &tokenizer)?;
    Ok(Parts {
        format: Format::HuggingFace,
        name: directory_name(directory),
        config: model,
        tensors,
        files,
        tokenizer: TokenizerSource::HuggingFaceJson {
            file: RootedFile::new(root, tokenizer),
            around: tokens.around,
        },
        chat_template: tokens.chat_template,
        bos_token: tokens.bos,
        eos_token: tokens.eos,
        stop_token_ids: tokens.stop_ids,
        sampling: generation.as_ref().map(suggested).unwrap_or_default(),
    })
}

fn suggested(generation: &JsonFile) -> SuggestedSampling {
    SuggestedSampling::read(generation.path(), sampling::HUGGING_FACE, |field| generation.suggested(field))
}

fn lacks(directory: &Path, file: &str) -> CheckpointError {
    let is_gguf =
        |name: &std::ffi::OsString| Path::new(name).extension().is_some_and(|ending| ending == "gguf");
    if directory.join("adapter_config.json").is_file() {
        let reason =
            "it is a LoRA adapter (adapter_config.json), and none are served: merge it into its model"
                .to_owned();
        return CheckpointError::NotAModel { path: directory.to_owned(), reason };
    }
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let reason = match entries.map(|entry| entry.file_name()).find(is_gguf) {
        Some(name) => format!("it has no {file}, though it holds {}", name.display()),
        None => format!("it has no {file}"),
    };
    CheckpointError::NotAModel { path: directory.to_owned(), reason }
}

/// The last part of the path, also of `.` and `models/..`.
fn directory_name(directory: &Path) -> String {
    let whole = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
