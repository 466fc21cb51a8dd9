//! Where a model's tokeniser comes from. Building and running it is the coordinator's.

use crate::RootedFile;

/// The tokeniser as the checkpoint holds it.
#[derive(Debug, Clone)]
pub enum TokenizerSource {
    /// A `tokenizer.json` of Hugging Face's tokenizers. `around`: what the class that `tokenizer_config.json` names puts around a
    /// text, whatever the file says of that; `None`: it is as the file says.
    HuggingFaceJson { file: RootedFile, around: Option<Around> },
    /// The tables that GGUF files carry under `tokenizer.ggml`.
    Ggml(Box<GgmlTokenizer>),
}

/// The names of the tokens before and behind a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Around {
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Special tokens that are known to end a turn, for files that leave unsaid which do.
pub(crate) const ENDINGS: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>"];

/// `tokenizer.ggml.*` of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgmlTokenizer {
    /// `"gpt2"` (byte-level BPE), `"llama"` (SentencePiece), ...
    pub model: String,
    /// Which pre-tokeniser splits text before BPE: `"smollm"`, `"llama-bpe"`, `"qwen2"`, ...; empty if unsaid.
    pub pre: String,
    /// Token text by id. In a byte-level BPE, bytes are written as the characters of GPT-2's table.
    pub tokens: Vec<String>,
    /// One for each token; all `Normal` if the file has none.
    pub kinds: Vec<TokenKind>,
    /// Pairs `"left right"`, best first; empty for SentencePiece.
    pub merges: Vec<String>,
    /// Log probability by id for SentencePiece; empty otherwise.
    pub scores: Vec<f32>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    /// Whether encoding starts with BOS or ends with EOS; `None` if unsaid.
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    /// Whether SentencePiece puts a space before the text; `None` if unsaid.
    pub add_space_prefix: Option<bool>,
}

/// What a token is, `llama_token_type` in ggml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    Normal,
    Unknown,
    /// Special: matched whole in a prompt, not shown in output.
    Control,
    /// Matched whole in a prompt, shown in output.
    UserDefined,
    Unused,
    /// One byte, written `<0xNN>`.
    Byte,
}
