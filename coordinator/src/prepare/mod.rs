//! From a request's body to what instances understand: validated, through the chat template, tokenised once.
//!
//! Called by [`crate::serve`], which looks up the model in between [`parse`] and [`prepare`]. Pure but for the model's
//! tables: randomness comes in as an argument. From here on only token ids travel.

mod begun;
mod choices;
mod defaults;
mod ends;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod incremental;
mod logits;
pub mod openai;
mod sampling;
pub mod served;

use std::{borrow::Cow, sync::Arc};

use baton_proto::{ApiError, ErrorCode, Tokens};
use baton_schedule::chains::Chains;

pub use begun::asked_model;
pub use defaults::SamplingDefaults;
pub use incremental::{AHEAD_FROM_BYTES, Ahead};
pub use sampling::Sampling;
use sampling::{Asking, TokenLimits};
pub use served::{Served, Spelling, TextModel, TextReader};

use crate::text::{ChatMessage, TextStops, Variables};
use openai::{Content, Message, OnePrompt, PartFault, SmallObject, WrongPart};
pub use openai::{Request, parse};

/// Which of OpenAI's two endpoints was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    Text,
}

impl Endpoint {
    /// Its path.
    pub fn route(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Text => "/v1/completions",
        }
    }
}

/// How the answer is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub endpoint: Endpoint,
    pub stream: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// With the log probabilities of each token.
    pub logprobs: bool,
}

/// A request that is valid and tokenised.
#[derive(Debug)]
pub struct Prepared {
    pub shape: Shape,
    /// At least one; of chats exactly one.
    pub prompts: Vec<PreparedPrompt>,
    pub stops: TextStops,
    /// Among the requests of an instance: lower is served first and preempted last.
    pub priority: i32,
}

/// One prompt of a request.
#[derive(Debug, Clone)]
pub struct PreparedPrompt {
    pub tokens: Tokens,
    /// What its KV blocks are called.
    pub chains: Arc<Chains>,
    pub sampling: Sampling,
    /// What its answers' text begins with: the prompt, if it is to be echoed.
    pub echo: Arc<str>,
}

impl PreparedPrompt {
    /// Its length; fits, as it is within the context.
    pub fn prompt_tokens(&self) -> u32 {
        self.tokens.len() as u32
    }
}

impl Prepared {
    /// What is kept of its prompts, biases and stop strings until it is answered, and may be of echoes and log probabilities
    /// before they are written, in bytes.
    pub fn held_bytes(&self) -> usize {
        let of = |prompt: &PreparedPrompt| {
            let own = size_of_val(&*prompt.tokens) + prompt.chains.held_bytes() + prompt.echo.len();
            // Each choice begins with the echo, and is written from that.
            let echoed = prompt.echo.len().saturating_add(written_bytes(&prompt.echo));
            let echoed = echoed.saturating_mul(prompt.sampling.choices as usize);
            own.saturating_add(prompt.sampling.scored_bytes(self.shape.stream)).saturating_add(echoed)
        };
        let answers = self.prompts.iter().map(|prompt| prompt.sampling.choices as usize).sum();
        // All prompts have the first one's.
        let biases = self.prompts.first().and_then(|prompt| prompt.sampling.logit_bias.as_deref());
        let shared = self.stops.held_bytes(answers) + biases.map_or(0, size_of_val);
        self.prompts.iter().map(of).fold(shared, usize::saturating_add)
    }

    /// Of all prompts.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompts.iter().map(PreparedPrompt::prompt_tokens).fold(0, u32::saturating_add)
    }
}

/// How long a text is as JSON has it, without the quotes.
fn written_bytes(text: &str) -> usize {
    let written = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
        ..0x20 => "\\u0000".len(),
        _ => 1,
    };
    text.bytes().map(written).sum()
}

/// What bounds a request beside the model.
#[derive(Debug, Clone, Copy)]
pub struct RequestLimits {
    /// Tokens of one answer; also what is taken of a chat that does not say. 0 = the context's rest.
    pub max_completion_tokens: u32,
    /// Answers to all prompts together.
    pub max_choices: u32,
}

fn invalid(field: impl Into<String>, message: &str) -> ApiError {
    let field = field.into();
    ApiError::new(ErrorCode::InvalidArgument, format!("{field}: {message}")).param(field)
}

/// Checks and tokenises one request for this model. `seed` is used if the request names none.
pub fn prepare(
    served: &Served,
    endpoint: Endpoint,
    request: &Request,
    limits: RequestLimits,
    seed: u64,
) -> Result<Prepared, ApiError> {
    openai::refuse(request)?;
    let mut shape = shape(endpoint, request)?;
    let prompts = match endpoint {
        Endpoint::Chat => None,
        Endpoint::Text => {
            let missing =
                || invalid("prompt", "must be given: a string, a list of token ids, or a list of either");
            if request.chat_template_kwargs.as_ref().is_some_and(|variables| !variables.0.is_empty()) {
                let message = "chat_template_kwargs: a completion has no template; see /v1/chat/completions";
                let error = ApiError::new(ErrorCode::Unsupported, message);
                return Err(error.param("chat_template_kwargs"));
            }
            Some(request.prompt.as_ref().ok_or_else(missing)?.each())
        }
    };
    let choices = choices::choices(request, prompts.as_ref().map_or(1, Vec::len), limits.max_choices)?;
    let asking = Asking::new(served, endpoint, request, seed, choices)?;
    let echoes = echoes(endpoint, request)?;
    let prompt = |tokens: Vec<u32>, echo: String| {
        if tokens.is_empty() {
            let field = if endpoint == Endpoint::Chat { "messages" } else { "prompt" };
            return Err(invalid(field, "must not be empty"));
        }
        let prompt_tokens = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        let limits = TokenLimits {
            context_tokens: served.context_tokens,
            max_completion_tokens: limits.max_completion_tokens,
        };
        let sampling = asking.of_prompt(prompt_tokens, limits)?;
        let tokens = Tokens::from(tokens);
        let chains = Chains::new(tokens.clone());
        Ok(PreparedPrompt { tokens, chains, sampling, echo: echo.into() })
    };
    let prompts = match prompts {
        None => {
            let chat = chat(request.messages.as_deref())?;
            let variables = template_variables(request)?;
            let tokens = served.text.tokenise_chat(&chat, &variables)?;
            vec![prompt(tokens, String::new())?]
        }
        Some(prompts) => {
            let each = |one: OnePrompt<'_>| prompt(tokenised(served, one)?, shown(served, one, echoes));
            prompts.into_iter().map(each).collect::<Result<_, _>>()?
        }
    };
    let sampling = prompts.first().map(|prompt: &PreparedPrompt| &prompt.sampling);
    shape.logprobs = sampling.is_some_and(|sampling| sampling.top_logprobs.is_some());
    let stops = ends::text_stops(request, sampling.map_or(0, |sampling| sampling.min_tokens))?;
    Ok(Prepared { shape, prompts, stops, priority: asked_priority(request)? })
}

/// As vLLM's: 0 unless the request says otherwise.
pub fn asked_priority(request: &Request) -> Result<i32, ApiError> {
    let asked = request.priority.map_or(0, |asked| asked.0);
    i32::try_from(asked).map_err(|_| {
        invalid("priority", &format!("must be {} (first) to {} (last), got {asked}", i32::MIN, i32::MAX))
    })
}

/// Whether the answer is to begin with the prompt.
fn echoes(endpoint: Endpoint, request: &Request) -> Result<bool, ApiError> {
    let unserved =
        |message: &str| ApiError::new(ErrorCode::Unsupported, format!("echo: {message}")).param("echo");
    match (request.echo, endpoint) {
        (None | Some(false), _) => Ok(false),
        (Some(true), Endpoint::Chat) => Err(unserved("is for /v1/completions")),
        (Some(true), Endpoint::Text) if request.logprobs.as_ref().is_some_and(|asked| asked.0 != false) => {
            Err(unserved("log probabilities of the prompt are not served; leave out `echo` or `logprobs`"))
        }
        (Some(true), Endpoint::Text) => Ok(true),
    }
}

/// The text of a prompt, if it is to be echoed: as it came, or as its tokens read.
fn shown(served: &Served, prompt: OnePrompt<'_>, echoes: bool) -> String {
    match prompt {
        _ if !echoes => String::new(),
        OnePrompt::Text(text) => text.to_owned(),
        OnePrompt::Tokens(tokens) => {
            let (mut reader, mut text) = (served.text.reader(&TextStops::default()), String::new());
            tokens.iter().for_each(|&token| _ = reader.push(token, &mut text));
            reader.finish(&mut text);
            text
        }
    }
}

fn shape(endpoint: Endpoint, request: &Request) -> Result<Shape, ApiError> {
    let stream = request.stream.unwrap_or(false);
    if request.stream_options.is_some() && !stream {
        return Err(invalid("stream_options", "is allowed only with `stream`: true"));
    }
    let include_usage = request.stream_options.as_ref().and_then(|options| options.include_usage);
    Ok(Shape { endpoint, stream, include_usage: include_usage.unwrap_or(false), logprobs: false })
}

fn chat(messages: Option<&[Message]>) -> Result<Vec<ChatMessage<'static>>, ApiError> {
    let messages = messages.ok_or_else(|| invalid("messages", "must be given: a list of messages"))?;
    if messages.is_empty() {
        return Err(invalid("messages", "must hold at least one message"));
    }
    messages.iter().enumerate().map(|(index, message)| checked(index, message)).collect()
}

/// What the request tells the template beside its messages.
fn template_variables(request: &Request) -> Result<Cow<'_, Variables>, ApiError> {
    /// What every template is told by others, or how it is rendered.
    const TAKEN: [&str; 9] = [
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "documents",
        "eos_token",
        "messages",
        "tokenize",
        "tools",
    ];
    let Some(SmallObject(variables)) = &request.chat_template_kwargs else { return Ok(Cow::default()) };
    match TAKEN.into_iter().find(|name| variables.contains_key(*name)) {
        Some(name) => {
            let field = format!("chat_template_kwargs.{name}");
            let message = format!("{field}: the template is told that by others");
            Err(ApiError::new(ErrorCode::Unsupported, message).param(field))
        }
        None => Ok(Cow::Borrowed(variables)),
    }
}

fn checked(index: usize, message: &Message) -> Result<ChatMessage<'static>, ApiError> {
    let field = |name: &str| format!("messages[{index}].{name}");
    let unserved = |name: &str, why: &str| {
        ApiError::new(ErrorCode::Unsupported, format!("{}: {why}", field(name))).param(field(name))
    };
    let role = match message.role.as_deref() {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => return Err(unserved("role", "tools are not served")),
        Some(other) => {
            let message = format!("must be `system`, `user` or `assistant`, got `{other}`");
            return Err(invalid(field("role"), &message));
        }
        None => return Err(invalid(field("role"), "must be given: `system`, `user` or `assistant`")),
    };
    if message.tool_calls.as_ref().is_some_and(|calls| *calls != openai::Asked::Nothing) {
        return Err(unserved("tool_calls", "tools are not served"));
    }
    if message.function_call.as_ref().is_some_and(|call| *call != openai::Asked::Nothing) {
        return Err(unserved("function_call", "functions are not served"));
    }
    let content = match &message.content {
        Some(Content::Text(text)) => text.clone(),
        Some(Content::Parts(Ok(texts))) => texts.as_str().into(),
        Some(Content::Parts(Err(WrongPart { at, fault }))) => {
            return Err(match fault {
                PartFault::NoText => invalid(field(&format!("content[{at}].text")), "must be given"),
                PartFault::NoType => invalid(field(&format!("content[{at}].type")), "must be given"),
                PartFault::Other(kind) => {
                    let why = format!("only parts of type `text` are served, got `{kind}`");
                    unserved(&format!("content[{at}].type"), &why)
                }
            });
        }
        // An assistant's turn without words is what clients send back after tool calls.
        None if role == "assistant" => Arc::default(),
        None => return Err(invalid(field("content"), "must be given: a string or a list of text parts")),
    };
    Ok(ChatMessage { role, content })
}

fn tokenised(served: &Served, prompt: OnePrompt<'_>) -> Result<Vec<u32>, ApiError> {
    match prompt {
        OnePrompt::Text(text) => served.text.tokenise_text(text),
        OnePrompt::Tokens(ids) => {
            let vocabulary = served.text.vocabulary();
            match ids.iter().find(|&&id| id >= vocabulary) {
                Some(&id) => Err(ends::no_token("prompt", id.into(), vocabulary)),
                None => Ok(ids.to_vec()),
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
