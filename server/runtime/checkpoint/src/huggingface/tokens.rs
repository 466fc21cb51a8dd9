//! Chat template, names of the special tokens and the tokens that stop, out of the directory's small files.

use std::{collections::BTreeSet, path::Path};

use serde::Deserialize;
use serde_json::Value;

use super::fields::{JsonFile, read_text};
use crate::{
    CheckpointError, ModelRoot,
    tokenizer::{Around, ENDINGS},
};

pub(super) struct Tokens {
    pub(super) chat_template: Option<String>,
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    /// By the tokeniser's class.
    pub(super) around: Option<Around>,
    /// Ascending.
    pub(super) stop_ids: Vec<u32>,
}

pub(super) fn read(
    (root, directory): (&ModelRoot, &Path),
    (config, generation): (&JsonFile, Option<&JsonFile>),
    tokenizer: &Path,
) -> Result<Tokens, CheckpointError> {
    let settings = JsonFile::open(root, directory, "tokenizer_config.json")?;
    let added = added_tokens(root, tokenizer)?;
    let mut stop_ids = BTreeSet::new();
    for file in generation.into_iter().chain([config]) {
        stop_ids.extend(token_ids(file, "eos_token_id")?);
    }
    let name = |field: &str| settings.as_ref().and_then(|settings| token_name(settings.get(field)?));
    // A file without tokenizer_config.json still says which id it is.
    let by_id = |field: &str| -> Result<Option<String>, CheckpointError> {
        let ids = token_ids(config, field)?;
        Ok(added.iter().find(|token| ids.first() == Some(&token.id)).map(|token| token.content.clone()))
    };
    let bos = name("bos_token").map_or_else(|| by_id("bos_token_id"), |name| Ok(Some(name)))?;
    let eos = name("eos_token").map_or_else(|| by_id("eos_token_id"), |name| Ok(Some(name)))?;
    stop_ids.extend(added.iter().filter(|token| Some(&token.content) == eos.as_ref()).map(|token| token.id));
    if generation.is_none() {
        let ends = |token: &&AddedToken| token.special && ENDINGS.contains(&token.content.as_str());
        stop_ids.extend(added.iter().filter(ends).map(|token| token.id));
    }
    let chat_template = match read_text(root, &directory.join("chat_template.jinja"))? {
        Some(template) => Some(template),
        None => settings.as_ref().and_then(|settings| template(settings.get("chat_template")?)),
    };
    let around = settings.as_ref().and_then(|settings| around(settings, bos.as_deref(), eos.as_deref()));
    Ok(Tokens { chat_template, bos, eos, around, stop_ids: stop_ids.into_iter().collect() })
}

/// LLaMA's class of tokenisers writes anew what comes around a text; with others it is as the file says.
fn around(settings: &JsonFile, bos: Option<&str>, eos: Option<&str>) -> Option<Around> {
    const CLASSES: [&str; 2] = ["LlamaTokenizer", "LlamaTokenizerFast"];
    let class = settings.get("tokenizer_class")?.as_str()?;
    let adds = |field, default| settings.get(field).and_then(Value::as_bool).unwrap_or(default);
    let named = |token: Option<&str>, adds: bool| token.filter(|_| adds).map(str::to_owned);
    CLASSES.contains(&class).then(|| Around {
        before: named(bos, adds("add_bos_token", true)),
        after: named(eos, adds("add_eos_token", false)),
    })
}

/// A number or a list of numbers.
fn token_ids(file: &JsonFile, field: &str) -> Result<Vec<u32>, CheckpointError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match file.get(field) {
        None => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| file.damaged(field, "it is neither a token id nor a list of them"))
}

/// `"<s>"` or `{"content": "<s>", ...}`.
fn token_name(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// The template's text; of several named ones the default.
fn template(value: &Value) -> Option<String> {
    let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
    let entry = || value.as_array()?.iter().find(named)?.get("template")?.as_str();
    value.as_str().or_else(entry).map(str::to_owned)
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// The list that `tokenizer.json` has beside its large tables.
fn added_tokens(root: &ModelRoot, path: &Path) -> Result<Vec<AddedToken>, CheckpointError> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<AddedToken>,
    }
    let text = read_text(root, path)?.unwrap_or_default();
    let file: File = serde_json::from_str(&text).map_err(|error| CheckpointError::Damaged {
        path: path.to_owned(),
        field: "added_tokens".to_owned(),
        reason: error.to_string(),
    })?;
    Ok(file.added_tokens)
}
