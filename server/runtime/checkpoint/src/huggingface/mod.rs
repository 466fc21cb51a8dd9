//! Hugging Face directories: `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja`, `model.safetensors` or its shards.

mod config;
mod latent;
mod mixture;
mod rope;
mod tokens;
mod weights;

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    CheckpointError, ModelRoot, TokenizerSource,
    checkpoint::{Format, Parts},
    root::RootedFile,
};

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
    let tokens = tokens::read((root, directory), &config, &tokenizer)?;
    Ok(Parts {
        format: Format::HuggingFace,
        name: directory_name(directory),
        config: model,
        tensors,
        files,
        tokenizer: TokenizerSource::HuggingFaceJson(RootedFile::new(root, tokenizer)),
        chat_template: tokens.chat_template,
        bos_token: tokens.bos,
        eos_token: tokens.eos,
        stop_token_ids: tokens.stop_ids,
    })
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

/// The text of a file, if it is there.
fn read_text(root: &ModelRoot, path: &Path) -> Result<Option<String>, CheckpointError> {
    let content = match root.read(path) {
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        content => content?,
    };
    String::from_utf8(content).map(Some).map_err(|_| CheckpointError::Damaged {
        path: path.to_owned(),
        field: "its content".to_owned(),
        reason: "it is not UTF-8".to_owned(),
    })
}

/// A JSON object and the file it came from, for typed access with good errors.
pub(crate) struct JsonFile {
    path: PathBuf,
    value: Value,
}

impl JsonFile {
    /// `None` if the directory has no such file.
    fn open(root: &ModelRoot, directory: &Path, name: &str) -> Result<Option<Self>, CheckpointError> {
        let path = directory.join(name);
        let Some(text) = read_text(root, &path)? else { return Ok(None) };
        let reason = match serde_json::from_str::<Value>(&text) {
            Ok(value @ Value::Object(_)) => return Ok(Some(Self { path, value })),
            Ok(_) => "it is not a JSON object".to_owned(),
            Err(error) => format!("it is not JSON: {error}"),
        };
        Err(CheckpointError::Damaged { path, field: "its content".to_owned(), reason })
    }

    /// The value at `field`, where `a.b` is `b` within `a`; null counts as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        let value = field.split('.').try_fold(&self.value, |value, key| value.get(key))?;
        (!value.is_null()).then_some(value)
    }

    pub(crate) fn u32(&self, field: &str) -> Result<Option<u32>, CheckpointError> {
        self.read(field, "a 32-bit number", |value| value.as_u64().and_then(|n| n.try_into().ok()))
    }

    pub(crate) fn f32(&self, field: &str) -> Result<Option<f32>, CheckpointError> {
        self.read(field, "a number", |value| value.as_f64().map(|x| x as f32))
    }

    pub(crate) fn bool(&self, field: &str) -> Result<Option<bool>, CheckpointError> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&str>, CheckpointError> {
        self.read(field, "text", Value::as_str)
    }

    fn read<'a, T>(
        &'a self,
        field: &str,
        kind: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let wrong = || {
            let shown: String = value.to_string().chars().take(64).collect();
            self.damaged(field, format!("{shown} is not {kind}"))
        };
        convert(value).ok_or_else(wrong).map(Some)
    }

    pub(crate) fn damaged(&self, field: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Damaged { path: self.path.clone(), field: field.to_owned(), reason: reason.into() }
    }

    pub(crate) fn unsupported(
        &self,
        field: &str,
        found: impl Into<String>,
        supported: &str,
    ) -> CheckpointError {
        CheckpointError::Unsupported {
            path: self.path.clone(),
            field: field.to_owned(),
            found: found.into(),
            supported: supported.to_owned(),
        }
    }
}
