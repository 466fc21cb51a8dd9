//! The model whose tokeniser the coordinator uses: a copy that claims a context long enough for every prompt. The
//! coordinator reads a checkpoint's configuration and vocabulary, and nobody here computes with its weights.

use std::{fs, path::Path};

use baton_checkpoint::ModelRoot;
use baton_coordinator::{
    config::ModelConfig,
    prepare::{Served, Spelling},
    text::{ChatMessage, TextCache, Variables},
};
use rustix::time::{ClockId, clock_gettime};

use crate::{
    error::BenchError,
    words::{Word, Words},
};

/// What the copy claims.
const CONTEXT_TOKENS: u32 = 131_072;
/// How GGUF names the length, and a value of 32 bits after it.
const CONTEXT_KEY: &[u8] = b"llama.context_length\x04\x00\x00\x00";
/// Fewer words make text that no tokeniser meets.
const WORDS_LEAST: usize = 1_000;

/// Copies a GGUF file, with [`CONTEXT_TOKENS`] for its context.
pub(crate) fn lengthen(model: &Path, copy: &Path) -> Result<(), BenchError> {
    let mut bytes = fs::read(model).map_err(BenchError::io(format!("read {}", model.display())))?;
    let at = bytes.windows(CONTEXT_KEY.len()).position(|window| window == CONTEXT_KEY);
    let value = at.map(|at| at + CONTEXT_KEY.len()).and_then(|at| bytes.get_mut(at..at + 4));
    value
        .ok_or_else(|| BenchError::Context(model.to_owned()))?
        .copy_from_slice(&CONTEXT_TOKENS.to_le_bytes());
    fs::write(copy, bytes).map_err(BenchError::io(format!("write {}", copy.display())))
}

/// Opens it as a coordinator does.
pub(crate) fn open(path: &Path) -> Result<Served, BenchError> {
    let config = ModelConfig { path: path.to_owned(), ..ModelConfig::default() };
    Ok(Served::open(&config, &ModelRoot::anywhere(), &TextCache::new(0))?)
}

/// Its tokens that are a space and some letters.
pub(crate) fn words(served: &Served) -> Result<Words, BenchError> {
    let vocabulary = served.text.vocabulary();
    let word = |token| match served.text.spelling(token) {
        Spelling::Bytes([b' ', letters @ ..])
            if letters.len() > 1 && letters.iter().all(u8::is_ascii_lowercase) =>
        {
            let text = format!(" {}", String::from_utf8_lossy(letters));
            Some(Word { token, text })
        }
        _ => None,
    };
    let all: Vec<_> = (0..vocabulary).filter_map(word).collect();
    if all.len() < WORDS_LEAST {
        return Err(BenchError::Words { words: all.len() });
    }
    Ok(Words { model: served.name.to_string(), revision: served.revision.clone(), vocabulary, all })
}

/// How many chats of so many words one core tokenises in a second of its time, by the coordinator's own tokeniser and with nothing
/// around it.
pub(crate) fn tokenised_per_second(served: &Served, words: &Words, prompt_words: u32) -> f64 {
    const CHATS: u64 = 20;
    let chat = |seed| {
        let content: String =
            words.prompt(seed, prompt_words).iter().map(|word| word.text.as_str()).collect();
        [ChatMessage { role: "user", content: content.into() }]
    };
    let chats: Vec<_> = (0..CHATS).map(chat).collect();
    let began = cpu_seconds();
    let tokenised =
        chats.iter().filter(|chat| served.text.tokenise_chat(*chat, &Variables::new()).is_ok()).count();
    tokenised as f64 / (cpu_seconds() - began)
}

/// Processor time that this process has had.
fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}
