//! llama.cpp in a Python child: one line of JSON asks for a measurement, one answers. The script is part of this
//! program; the package llama-cpp-python is the child's.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::{EngineError, Rates, Work};
use crate::{run_file::cache_directory, up::UpError};

const SCRIPT: &str = include_str!("yardstick.py");

/// A loaded model.
pub(super) struct LlamaCpp {
    python: PathBuf,
    child: Child,
    ask: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    version: String,
}

#[derive(Deserialize)]
struct Ready {
    version: String,
}

#[derive(Deserialize)]
struct Seconds {
    prefill_seconds: f64,
    decode_seconds: f64,
}

impl LlamaCpp {
    pub(super) async fn start(
        python: &Path,
        model: &Path,
        threads: u16,
        works: &[Work],
    ) -> Result<Self, EngineError> {
        let room = works.iter().map(|work| work.prompt_tokens + work.decode_tokens).max().unwrap_or(0);
        let model = model.display().to_string();
        // Whole pages of its cache.
        let room = room.next_multiple_of(256).to_string();
        let mut child = spawn(python, &["serve", &model, &threads.to_string(), &room])?;
        let gone = || EngineError::LlamaCpp { program: python.to_owned(), words: String::new() };
        let (ask, answers) = (child.stdin.take().ok_or_else(gone)?, child.stdout.take().ok_or_else(gone)?);
        let answers = BufReader::new(answers).lines();
        let mut this = Self { python: python.to_owned(), child, ask, answers, version: String::new() };
        this.version = this.answer::<Ready>().await?.version;
        Ok(this)
    }

    /// Of the package.
    pub(super) fn version(&self) -> String {
        self.version.clone()
    }

    pub(super) async fn measure(&mut self, work: Work, seed: u32) -> Result<Rates, EngineError> {
        let Work { sequences, prompt_tokens, decode_tokens } = work;
        let line =
            json!({"sequences": sequences, "prompt": prompt_tokens, "tokens": decode_tokens, "seed": seed});
        // What went wrong is in what the child says as it ends.
        let _ = self.ask.write_all(format!("{line}\n").as_bytes()).await;
        let seconds: Seconds = self.answer().await?;
        Ok(Rates {
            prefill: f64::from(sequences * prompt_tokens) / seconds.prefill_seconds,
            decode: f64::from(sequences * decode_tokens) / seconds.decode_seconds,
        })
    }

    async fn answer<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T, EngineError> {
        let line = self.answers.next_line().await.ok().flatten();
        if let Some(answer) = line.and_then(|line| serde_json::from_str(&line).ok()) {
            return Ok(answer);
        }
        let mut words = String::new();
        if let Some(mut errors) = self.child.stderr.take() {
            // Nothing more can be said if even this fails.
            let _ = errors.read_to_string(&mut words).await;
        }
        let last = words.trim().lines().last().unwrap_or_default().to_owned();
        Err(EngineError::LlamaCpp { program: self.python.clone(), words: last })
    }
}

/// The model with weights of another type, made unless it is there already.
pub(super) async fn of_type(python: &Path, model: &Path, kind: &str) -> Result<PathBuf, EngineError> {
    let directory =
        cache_directory().ok_or(EngineError::Model(UpError::NoHome("XDG_CACHE_HOME")))?.join("bench");
    let unwritable = |source| EngineError::Write { path: directory.clone(), source };
    std::fs::create_dir_all(&directory).map_err(unwritable)?;
    let stem = model.file_stem().unwrap_or_default().to_string_lossy();
    let base = stem.rsplit_once('.').map_or(&*stem, |(base, _)| base);
    let target = directory.join(format!("{base}.{kind}.gguf"));
    if target.is_file() {
        return Ok(target);
    }
    let part = directory.join(format!("{base}.{kind}.{}.part", std::process::id()));
    let child =
        spawn(python, &["quantize", &model.display().to_string(), &part.display().to_string(), kind])?;
    let output = child.wait_with_output().await;
    let output = output.map_err(|source| EngineError::Spawn { program: python.to_owned(), source })?;
    if !output.status.success() {
        let words =
            String::from_utf8_lossy(&output.stderr).trim().lines().last().unwrap_or_default().to_owned();
        return Err(EngineError::LlamaCpp { program: python.to_owned(), words });
    }
    std::fs::rename(&part, &target).map_err(|source| EngineError::Write { path: target.clone(), source })?;
    Ok(target)
}

fn spawn(python: &Path, arguments: &[&str]) -> Result<Child, EngineError> {
    Command::new(python)
        .args(["-c", SCRIPT])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| EngineError::Spawn { program: python.to_owned(), source })
}
