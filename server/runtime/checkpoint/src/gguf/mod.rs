//! GGUF files: one file with configuration, tokeniser and tensors.

mod config;
mod header;
mod metadata;
mod tensors;

use std::path::Path;

use crate::{
    CheckpointError, ModelRoot, SuggestedSampling,
    parts::{Format, Parts},
    sampling,
    source::MappedFile,
};

use header::{Fault, Header, MAGIC};

/// Reads a GGUF file's head.
pub(crate) fn read(root: &ModelRoot, path: &Path) -> Result<Parts, CheckpointError> {
    let file = MappedFile::open(root, path)?;
    if !file.all().starts_with(MAGIC) {
        let reason = "it does not begin with GGUF".to_owned();
        return Err(CheckpointError::NotAModel { path: path.to_owned(), reason });
    }
    let parts = parse(&file, path).map_err(|fault| match fault {
        Fault::Damaged { field, reason } => CheckpointError::Damaged { path: path.to_owned(), field, reason },
        Fault::Unsupported { field, found, supported } => {
            CheckpointError::Unsupported { path: path.to_owned(), field, found, supported }
        }
    })?;
    Ok(Parts { files: vec![file], ..parts })
}

/// Everything but the file itself.
fn parse(file: &MappedFile, path: &Path) -> Result<Parts, Fault> {
    let header = Header::parse(file.all())?;
    let metadata = metadata::Metadata::new(&header.metadata);
    let architecture = config::architecture(&metadata)?;
    let table = tensors::table(&header, file.all().len())?;
    let config = config::read(architecture, &metadata, &table, file)?;
    let tokenizer = metadata.tokenizer()?;
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.tokens.get(id as usize)).cloned();
    Ok(Parts {
        format: Format::Gguf,
        name: model_name(path, metadata.text("general.name")?),
        config,
        tensors: table.tensors,
        files: Vec::new(),
        chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
        bos_token: text_of(tokenizer.bos),
        eos_token: text_of(tokenizer.eos),
        stop_token_ids: metadata.stop_token_ids(&tokenizer)?,
        sampling: SuggestedSampling::read(path, sampling::GGUF, |key| metadata.suggested(key)),
        tokenizer: crate::TokenizerSource::Ggml(Box::new(tokenizer)),
    })
}

/// The file's name without `.gguf` and without what says how it is quantised; what the file itself says if nothing
/// else is left.
fn model_name(path: &Path, general_name: Option<&str>) -> String {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = match stem.rfind(['.', '-']) {
        Some(cut) if is_quantisation(&stem[cut + 1..]) => &stem[..cut],
        _ if is_quantisation(&stem) => "",
        _ => &stem,
    };
    match (name, general_name) {
        ("" | "model" | "ggml-model", Some(general)) if !general.is_empty() => general.replace(' ', "-"),
        ("", _) => "model".to_owned(),
        (name, _) => name.to_owned(),
    }
}

/// `Q4_1`, `q4_k_m`, `IQ2_XS`, `F16`, `bf16`, ...
fn is_quantisation(tag: &str) -> bool {
    let tag = tag.to_ascii_lowercase();
    if ["f32", "f16", "bf16"].contains(&tag.as_str()) {
        return true;
    }
    let number = tag.strip_prefix("iq").or_else(|| tag.strip_prefix('q'));
    number.is_some_and(|rest| rest.as_bytes().first().is_some_and(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_quantisation() {
        let table = [
            ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("Meta-Llama-3-8B-Instruct-Q4_K_M.gguf", "Meta-Llama-3-8B-Instruct"),
            ("tiny.bf16.gguf", "tiny"),
            ("Qwen2.5-7B.gguf", "Qwen2.5-7B"),
            ("model-f16.gguf", "General-Name"),
            ("q8_0.gguf", "General-Name"),
            ("chat-quick.gguf", "chat-quick"),
        ];
        for (file, name) in table {
            assert_eq!(model_name(Path::new(file), Some("General Name")), name, "{file}");
        }
        assert_eq!(model_name(Path::new("f16.gguf"), None), "model");
    }
}
