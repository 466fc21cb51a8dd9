//! A model as requests meet it: its text side and its limits.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use baton_checkpoint::{Checkpoint, ModelRoot};
use baton_proto::{ApiError, ErrorCode, ServedModel};

use super::SamplingDefaults;
use crate::{
    ModelError,
    config::{GenerationConfig, ModelConfig},
    text::{ChatMessage, CheckpointText, Reader, TextCache, TextError, TextStops, Variables},
};

/// Text to tokens and back, as far as this crate needs it.
pub trait TextModel: Send + Sync {
    /// Tokens of a plain prompt, with what the model wants before it.
    fn tokenise_text(&self, text: &str) -> Result<Vec<u32>, ApiError>;

    /// Tokens of a chat through the model's template, which is told `variables`, too, ready for the assistant's answer.
    fn tokenise_chat(&self, chat: &[ChatMessage<'_>], variables: &Variables) -> Result<Vec<u32>, ApiError>;

    /// Tokenises the beginning of a long text, of which more is to come, so that it is found when the whole is tokenised.
    /// Tells how many bytes of it are done with; 0 = none, as for models that cannot do it.
    fn remember(&self, _text: &str) -> usize {
        0
    }

    /// Reads an answer that ends at any of `stops`.
    fn reader(&self, stops: &TextStops) -> Box<dyn TextReader>;

    /// How a token is told of by itself.
    fn spelling(&self, token: u32) -> Spelling<'_>;

    /// One more than the highest token id.
    fn vocabulary(&self) -> u32;
}

/// One token on paper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spelling<'a> {
    /// The bytes of text it stands for, which need not be whole characters.
    Bytes(&'a [u8]),
    /// It has no text, only a name.
    Name(Cow<'a, str>),
}

/// Turns the tokens of one answer into text, holding back what is not certain yet: parts of characters, and what may
/// become a stop string.
pub trait TextReader: Send {
    /// Has the processor fetch what is read of a token, which comes next.
    fn prefetch(&self, _token: u32) {}

    /// Appends text that has become certain. True: a stop string has matched and the answer ends there.
    fn push(&mut self, token: u32, text: &mut String) -> bool;

    /// Characters that the tokens so far stand for, appended or held back; those that are not whole yet not counted.
    fn characters(&self) -> u32;

    /// Appends what was held back: no more tokens come.
    fn finish(&mut self, text: &mut String);
}

/// See the module.
pub struct Served {
    /// What clients say in `model`, and answers too.
    pub name: Arc<str>,
    /// What clients may say instead.
    pub aliases: Vec<Arc<str>>,
    /// The checkpoint's revision, a digest of what it holds: instances that have another run another model, whatever it is
    /// called.
    pub revision: String,
    pub context_tokens: u32,
    /// Tokens that end a sequence.
    pub stop_tokens: Vec<u32>,
    /// Where a request does not say.
    pub sampling: SamplingDefaults,
    /// Unix seconds from which it is served, for `/v1/models`.
    pub since: u64,
    pub text: Arc<dyn TextModel>,
}

impl Served {
    /// All that it is called, its name first.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        std::iter::once(&self.name).chain(&self.aliases)
    }

    /// As operators are told of it.
    pub fn to_served_model(&self) -> ServedModel {
        let names = self.names().map(|name| name.to_string()).collect();
        ServedModel { names, revision: self.revision.clone() }
    }

    /// What OpenAI calls the system fingerprint: changes with the weights.
    pub fn fingerprint(&self) -> String {
        format!(
            "fp_{}",
            self.revision.chars().filter(char::is_ascii_alphanumeric).take(12).collect::<String>()
        )
    }
}

impl Served {
    /// Opens the model of a configuration, whose files have to lie under `root`. Pieces of long prompts are kept in `cache`.
    pub fn open(config: &ModelConfig, root: &ModelRoot, cache: &Arc<TextCache>) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::open_under(root, &config.path).map_err(Box::new)?;
        let sampling = match config.generation_config {
            GenerationConfig::Checkpoint => SamplingDefaults::of(checkpoint.sampling())?,
            GenerationConfig::Openai => SamplingDefaults::default(),
        };
        let text = CheckpointText::open(&checkpoint, SystemTime::now, cache)?;
        let context = checkpoint.config().context_tokens;
        let context_tokens = match config.max_context_tokens {
            0 => context,
            most => context.min(most),
        };
        let mut names = config.names.iter().map(|name| Arc::from(name.as_str()));
        Ok(Self {
            name: names.next().unwrap_or_else(|| checkpoint.name().into()),
            aliases: names.collect(),
            revision: checkpoint.revision().map_err(Box::new)?,
            context_tokens,
            stop_tokens: checkpoint.stop_token_ids().to_vec(),
            sampling,
            since: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            text: Arc::new(text),
        })
    }
}

impl TextModel for CheckpointText {
    fn tokenise_text(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        self.encode_text(text).map_err(|error| refused(&error, "prompt"))
    }

    fn tokenise_chat(&self, chat: &[ChatMessage<'_>], variables: &Variables) -> Result<Vec<u32>, ApiError> {
        self.encode_chat(chat, variables).map_err(|error| refused(&error, "messages"))
    }

    fn remember(&self, text: &str) -> usize {
        CheckpointText::remember(self, text)
    }

    fn reader(&self, stops: &TextStops) -> Box<dyn TextReader> {
        Box::new(CheckpointText::reader(self, stops))
    }

    fn spelling(&self, token: u32) -> Spelling<'_> {
        match self.tokens().name(token) {
            Some(name) => Spelling::Name(name),
            None => Spelling::Bytes(self.tokens().get(token)),
        }
    }

    fn vocabulary(&self) -> u32 {
        CheckpointText::vocabulary(self)
    }
}

impl TextReader for Reader {
    fn prefetch(&self, token: u32) {
        Reader::prefetch(self, token);
    }

    fn push(&mut self, token: u32, text: &mut String) -> bool {
        Reader::push(self, token, text)
    }

    fn characters(&self) -> u32 {
        Reader::characters(self)
    }

    fn finish(&mut self, text: &mut String) {
        Reader::finish(self, text);
    }
}

/// What of a text's failure is the client's to mend.
fn refused(error: &TextError, field: &str) -> ApiError {
    let code = match error {
        TextError::Refused { .. } | TextError::Render(_) => ErrorCode::InvalidArgument,
        TextError::NoTemplate => ErrorCode::Unsupported,
        TextError::Checkpoint(_)
        | TextError::Tokenizer { .. }
        | TextError::Template { .. }
        | TextError::Encode(_) => ErrorCode::Internal,
    };
    let error = ApiError::new(code, format!("{field}: {error}"));
    if code == ErrorCode::Internal { error } else { error.param(field) }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn sampling_is_as_the_checkpoint_suggests_unless_openais_is_asked_for() {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../server/runtime/tests/reference/tiny/hf-bf16-mistral");
        let folder = tempfile::tempdir().expect("a folder");
        for file in fs::read_dir(tiny).expect("is there").map(|entry| entry.expect("is listed")) {
            fs::copy(file.path(), folder.path().join(file.file_name())).expect("is copied");
        }
        let suggest = |text: &str| {
            fs::write(folder.path().join("generation_config.json"), text).expect("is written");
        };
        let open = |generation_config| {
            let path = folder.path().to_owned();
            let config = ModelConfig { path, generation_config, ..ModelConfig::default() };
            Served::open(&config, &ModelRoot::anywhere(), &TextCache::new(0)).map(|served| served.sampling)
        };
        let openai = SamplingDefaults::default();
        suggest(r#"{"do_sample": false, "temperature": 0.5, "max_new_tokens": 7, "eos_token_id": 1}"#);
        let suggested = SamplingDefaults { temperature: 0.5, ..openai };
        assert_eq!(open(GenerationConfig::Checkpoint).expect("opens"), suggested);
        assert_eq!(open(GenerationConfig::Openai).expect("opens"), openai);
        suggest(r#"{"top_k": -5}"#);
        let error = open(GenerationConfig::Checkpoint).expect_err("is refused").to_string();
        assert!(error.contains("generation_config.json: top_k must be a whole number"), "{error}");
        assert_eq!(open(GenerationConfig::Openai).expect("opens"), openai);
    }
}
