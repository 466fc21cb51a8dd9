//! How tokens are chosen, checked and with every default filled in.

use std::sync::Arc;

use baton_proto::{ApiError, ErrorCode};

use super::{
    Endpoint, Served,
    defaults::{self, Bounds},
    ends, invalid, logits,
    openai::{Integer, Number, Request},
};

/// Sampling as instances are told it. Randomness is a pure function of (seed, position).
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 = greedy.
    pub temperature: f32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// 0 = off.
    pub min_p: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    /// 1 = off.
    pub repetition_penalty: f32,
    /// Of choice 0; choice i has this + i.
    pub seed: u64,
    /// Answers to the prompt; at least 1.
    pub choices: u32,
    /// At least 1.
    pub max_tokens: u32,
    /// All tokens that end this sequence, ascending; shared by the prompts of a request.
    pub stop_token_ids: Arc<[u32]>,
    /// Tokens before any of `stop_token_ids` can be chosen; within `max_tokens`.
    pub min_tokens: u32,
    /// Added to the logits of single tokens; ascending by token, each once; shared by the prompts of a request. `None`: nothing
    /// is added.
    pub logit_bias: Option<Arc<[(u32, f32)]>>,
    /// Log probabilities are wanted, with as many of the likeliest tokens.
    pub top_logprobs: Option<u32>,
}

impl Sampling {
    /// What log probabilities of all answers may take while nobody has read them, in bytes. Those of an answer that is not
    /// streamed are all there while they are written.
    pub(super) fn scored_bytes(&self, streamed: bool) -> usize {
        /// A token with its own, in a list that doubles, and each of its alternatives.
        const TOKEN: usize = 96;
        const ALTERNATIVE: usize = 8;
        /// The token and each of its alternatives as JSON has them: with the text, the bytes as numbers, and the names of fields.
        const WRITTEN: usize = 100;
        let Some(top) = self.top_logprobs else { return 0 };
        let top = top as usize;
        let written = if streamed { 0 } else { WRITTEN * (1 + top) };
        let each = TOKEN + ALTERNATIVE * top + written;
        each.saturating_mul(self.max_tokens as usize).saturating_mul(self.choices as usize)
    }
}

/// Of a completion that does not say how long it may be, as OpenAI's and vLLM's have it. A chat's may take the context's rest.
const TEXT_TOKENS: u32 = 16;

/// What bounds the number of tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenLimits {
    pub context_tokens: u32,
    /// 0 = the context's rest.
    pub max_completion_tokens: u32,
}

/// Of frequency and presence.
const PENALTY: Bounds = -2.0..=2.0;

fn within(field: &str, value: Option<Number>, default: f32, bounds: Bounds) -> Result<f32, ApiError> {
    match value.map(|number| number.0) {
        None => Ok(default),
        Some(value) if bounds.contains(&value) => Ok(value as f32),
        Some(value) => Err(invalid(field, &format!("must be {}, got {value}", defaults::said(&bounds)))),
    }
}

/// What a request says of sampling, of which its lists are checked: each of its prompts is given them.
pub(super) struct Asking<'a> {
    served: &'a Served,
    endpoint: Endpoint,
    request: &'a Request,
    seed: u64,
    choices: u32,
    stop_token_ids: Arc<[u32]>,
    logit_bias: Option<Arc<[(u32, f32)]>>,
}

impl<'a> Asking<'a> {
    /// `seed` is taken if the request names none.
    pub(super) fn new(
        served: &'a Served,
        endpoint: Endpoint,
        request: &'a Request,
        seed: u64,
        choices: u32,
    ) -> Result<Self, ApiError> {
        let vocabulary = served.text.vocabulary();
        let stop_token_ids = ends::stop_tokens(request, &served.stop_tokens, vocabulary)?.into();
        let biases = logits::logit_bias(request, vocabulary)?;
        let logit_bias = (!biases.is_empty()).then(|| biases.into());
        let seed = request.seed.map_or(seed, |seed| seed.0.cast_unsigned());
        Ok(Self { served, endpoint, request, seed, choices, stop_token_ids, logit_bias })
    }

    /// Checks the rest, and fills in every default, for a prompt of so many tokens.
    pub(super) fn of_prompt(&self, prompt_tokens: u32, limits: TokenLimits) -> Result<Sampling, ApiError> {
        let (request, unsaid) = (self.request, &self.served.sampling);
        let top_p = within("top_p", request.top_p, unsaid.top_p, defaults::TOP_P)?;
        let temperature =
            within("temperature", request.temperature, unsaid.temperature, defaults::TEMPERATURE)?;
        let top_k = match request.top_k {
            None => unsaid.top_k,
            Some(Integer(k)) => defaults::top_k(k)
                .ok_or_else(|| invalid("top_k", &format!("must be 0 (off) to {}, got {k}", u32::MAX)))?,
        };
        let max_tokens = max_tokens(self.endpoint, request, prompt_tokens, limits)?;
        Ok(Sampling {
            // An empty nucleus leaves the likeliest token only.
            temperature: if top_p == 0.0 { 0.0 } else { temperature },
            top_p: if top_p == 0.0 { 1.0 } else { top_p },
            top_k,
            min_p: within("min_p", request.min_p, unsaid.min_p, defaults::MIN_P)?,
            frequency_penalty: within("frequency_penalty", request.frequency_penalty, 0.0, PENALTY)?,
            presence_penalty: within("presence_penalty", request.presence_penalty, 0.0, PENALTY)?,
            repetition_penalty: within(
                "repetition_penalty",
                request.repetition_penalty,
                unsaid.repetition_penalty,
                defaults::REPETITION_PENALTY,
            )?,
            seed: self.seed,
            choices: self.choices,
            max_tokens,
            stop_token_ids: self.stop_token_ids.clone(),
            min_tokens: ends::min_tokens(request, max_tokens)?,
            logit_bias: self.logit_bias.clone(),
            top_logprobs: logits::top_logprobs(self.endpoint, request)?,
        })
    }
}

fn max_tokens(
    endpoint: Endpoint,
    request: &Request,
    prompt_tokens: u32,
    limits: TokenLimits,
) -> Result<u32, ApiError> {
    let context = limits.context_tokens;
    let too_long =
        |message: String, field: &str| ApiError::new(ErrorCode::ContextLengthExceeded, message).param(field);
    let prompt_field = if request.messages.is_some() { "messages" } else { "prompt" };
    let Some(rest) = context.checked_sub(prompt_tokens).filter(|&rest| rest > 0) else {
        let message = format!(
            "the model's context is {context} tokens and the prompt has {prompt_tokens}; at least 1 must be left for the answer: shorten the prompt"
        );
        return Err(too_long(message, prompt_field));
    };
    let (field, asked) = match (request.max_completion_tokens, request.max_tokens) {
        (Some(Integer(asked)), _) => ("max_completion_tokens", asked),
        (None, Some(Integer(asked))) => ("max_tokens", asked),
        (None, None) => {
            let wanted = if endpoint == Endpoint::Text { TEXT_TOKENS } else { rest };
            let most = limits.max_completion_tokens;
            return Ok(if most == 0 { wanted.min(rest) } else { wanted.min(rest).min(most) });
        }
    };
    if asked < 1 {
        return Err(invalid(field, &format!("must be at least 1, got {asked}")));
    }
    let Some(asked) = u32::try_from(asked).ok().filter(|&asked| asked <= rest) else {
        let message = format!(
            "the model's context is {context} tokens, but {} were asked for: {prompt_tokens} in the prompt and {asked} in the answer ({field}); lessen one of them",
            i64::from(prompt_tokens).saturating_add(asked),
        );
        return Err(too_long(message, field));
    };
    match limits.max_completion_tokens {
        most if most > 0 && asked > most => {
            Err(invalid(field, &format!("must be 1 to {most} here, got {asked}")))
        }
        _ => Ok(asked),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{SamplingDefaults, openai::parse, tests::served},
        *,
    };

    const LIMITS: TokenLimits = TokenLimits { context_tokens: 100, max_completion_tokens: 0 };

    /// `prompt_tokens` 10, seed 7 and the stop token 0 unless the request says otherwise.
    fn check(body: &str) -> Result<Sampling, ApiError> {
        let request = parse(body.as_bytes()).expect(body);
        Asking::new(&served(), Endpoint::Chat, &request, 7, 1)?.of_prompt(10, LIMITS)
    }

    #[test]
    fn defaults_are_those_of_openai() {
        let sampling = check("{}").expect("is taken");
        let expected = Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 7,
            choices: 1,
            max_tokens: 90,
            stop_token_ids: [0].into(),
            min_tokens: 0,
            logit_bias: None,
            top_logprobs: None,
        };
        assert_eq!(sampling, expected);
    }

    #[test]
    fn a_models_own_defaults_apply_where_a_request_does_not_say() {
        let unsaid = SamplingDefaults {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
            min_p: 0.05,
            repetition_penalty: 1.1,
        };
        let served = Served { sampling: unsaid, ..served() };
        let check = |body: &str| {
            let request = parse(body.as_bytes()).expect(body);
            let asking = Asking::new(&served, Endpoint::Chat, &request, 7, 1).expect(body);
            let sampling = asking.of_prompt(10, LIMITS).expect(body);
            let Sampling { temperature, top_p, top_k, min_p, repetition_penalty, .. } = sampling;
            SamplingDefaults { temperature, top_p, top_k, min_p, repetition_penalty }
        };
        assert_eq!(check("{}"), unsaid);
        assert_eq!(check(r#"{"temperature": 0}"#), SamplingDefaults { temperature: 0.0, ..unsaid });
        let all = r#"{"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}"#;
        assert_eq!(check(all), SamplingDefaults::default());
    }

    #[test]
    fn values_out_of_range_are_refused_by_name_and_range() {
        let cases = [
            (r#"{"temperature": 2.1}"#, "temperature", "0 to 2"),
            (r#"{"temperature": -0.1}"#, "temperature", "0 to 2"),
            (r#"{"top_p": 1.01}"#, "top_p", "0 to 1"),
            (r#"{"top_k": -2}"#, "top_k", "0 (off) to"),
            (r#"{"min_p": 2}"#, "min_p", "0 to 1"),
            (r#"{"frequency_penalty": 3}"#, "frequency_penalty", "-2 to 2"),
            (r#"{"presence_penalty": -3}"#, "presence_penalty", "-2 to 2"),
            (r#"{"repetition_penalty": 1e-40}"#, "repetition_penalty", "0.01 to 10"),
            (r#"{"max_tokens": 0}"#, "max_tokens", "at least 1"),
            (r#"{"max_tokens": -5}"#, "max_tokens", "at least 1"),
            (r#"{"max_completion_tokens": 0}"#, "max_completion_tokens", "at least 1"),
            (r#"{"min_tokens": 6, "max_tokens": 5}"#, "min_tokens", "0 to the 5"),
            (r#"{"logit_bias": {"256": 1}}"#, "logit_bias", "0 to 255"),
            (r#"{"stop_token_ids": [256]}"#, "stop_token_ids", "0 to 255"),
            (r#"{"logprobs": true, "top_logprobs": 21}"#, "top_logprobs", "0 to 20"),
        ];
        for (body, field, range) in cases {
            let error = check(body).expect_err(body);
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidArgument, Some(field)));
            assert!(error.message.contains(range) && error.message.contains(field), "{error}");
        }
    }

    #[test]
    fn the_context_bounds_the_answer_and_errors_count() {
        assert_eq!(check(r#"{"max_tokens": 90}"#).expect("fits").max_tokens, 90);
        let error = check(r#"{"max_tokens": 91, "prompt": "x"}"#).expect_err("too long");
        assert_eq!(error.code, ErrorCode::ContextLengthExceeded);
        for count in ["100", "101", "10 in the prompt", "91 in the answer"] {
            assert!(error.message.contains(count), "{error}");
        }
        let error = check(r#"{"max_tokens": 1000000000000}"#).expect_err("far too long");
        assert_eq!(error.code, ErrorCode::ContextLengthExceeded);
        let request = parse(br#"{"prompt": "x"}"#).expect("parses");
        let sampling = |request: &Request, prompt_tokens, limits| {
            Asking::new(&served(), Endpoint::Text, request, 0, 1)?.of_prompt(prompt_tokens, limits)
        };
        let error = sampling(&request, 100, LIMITS).expect_err("no room for an answer");
        assert_eq!((error.code, error.param.as_deref()), (ErrorCode::ContextLengthExceeded, Some("prompt")));
        let tight = TokenLimits { max_completion_tokens: 5, ..LIMITS };
        assert_eq!(sampling(&request, 1, tight).expect("fits").max_tokens, 5);
        let request = parse(br#"{"max_tokens": 6}"#).expect("parses");
        assert!(sampling(&request, 1, tight).is_err());
    }

    #[test]
    fn the_newer_name_wins_and_an_empty_nucleus_is_greedy() {
        let both = check(r#"{"max_tokens": 5, "max_completion_tokens": 6}"#).expect("is taken");
        assert_eq!(both.max_tokens, 6);
        let greedy = check(r#"{"top_p": 0, "temperature": 1.5, "seed": -1, "top_k": -1}"#).expect("is taken");
        assert_eq!((greedy.temperature, greedy.top_p, greedy.seed), (0.0, 1.0, u64::MAX));
    }
}
