//! From a `Dispatch` on the wire to a sequence the engine takes: every field is checked here, once.
//!
//! Two steps: what can be said of the message alone ([`Leg::try_from`]), then what depends on this instance and its
//! present role ([`Leg::check`]).

use std::time::Duration;

use baton_kvtransfer::FirstTokens;
use baton_process::telemetry::TraceContext;
use baton_proto::{
    ApiError, ErrorCode, Incarnation, InstanceId, LegId, RequestId, RoleEpoch, TransferId, tokens, v1,
};

use crate::{
    engine::{
        sampler::SamplingParams,
        sequence::{Asked, Inbound, Outbound, StopRule, Work},
    },
    role::{Phase, Role, RoleView},
};

/// A message is to stay small, log probabilities included: one stream carries everybody's.
const TOKENS_AT_A_TIME_MOST: u32 = 256;
/// Nobody stands behind those who come later for longer.
const FIRST_TOKEN_WITHIN_MOST: Duration = Duration::from_secs(3600);
/// Stop tokens of one request; more are refused.
const STOP_TOKENS_MOST: usize = 1024;
/// Biases of one request; more are refused.
const LOGIT_BIASES_MOST: usize = 1024;
/// Likeliest tokens told beside each; more are refused.
const TOP_LOGPROBS_MOST: u32 = 20;

/// A well-formed leg.
#[derive(Debug, Clone, PartialEq)]
pub struct Leg {
    pub leg: LegId,
    pub trace: TraceContext,
    pub incarnation: Incarnation,
    pub role_epoch: RoleEpoch,
    pub model: String,
    /// What the message alone says of it is checked; [`Leg::check`] has the rest of what the engine counts on.
    pub asked: Asked,
    /// From receipt to the first token, as it is wanted: of one priority who is wanted sooner is served first.
    pub first_token_within: Duration,
    /// From receipt to the last token.
    pub timeout: Option<Duration>,
}

/// What a leg must fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceFacts {
    pub instance_id: InstanceId,
    pub incarnation: Incarnation,
    pub model: String,
    pub vocabulary: u32,
    pub context_tokens: u32,
}

fn invalid(field: &str, message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, message).param(field)
}

impl TryFrom<v1::Dispatch> for Leg {
    type Error = ApiError;

    fn try_from(wire: v1::Dispatch) -> Result<Self, ApiError> {
        let sampling = wire.sampling.ok_or_else(|| invalid("sampling", "sampling is missing"))?;
        let top_logprobs = top_logprobs(sampling.top_logprobs)?;
        let choices = sampling.choices.max(1);
        if choices as usize > FirstTokens::MOST {
            return Err(invalid("n", format!("n is {choices}, must be at most {}", FirstTokens::MOST)));
        }
        let (sampling, stop) = sampling_params(sampling)?;
        let prompt = tokens::from_wire(&wire.prompt_tokens)
            .map_err(|error| invalid("prompt_tokens", error.to_string()))?;
        if prompt.is_empty() {
            return Err(invalid("prompt_tokens", "the prompt has no tokens"));
        }
        let generated = wire.generated_tokens;
        if !generated.is_empty() && (choices > 1 || generated.len() >= stop.max_tokens as usize) {
            let message = "a leg goes on from the tokens of one choice, and is to add at least one to them";
            return Err(invalid("generated_tokens", message));
        }
        let work = wire.work.ok_or_else(|| invalid("work", "the work to do is missing"))?;
        let asked = Asked {
            request: RequestId::adopt(&wire.request_id),
            choices,
            prompt,
            generated,
            sampling,
            stop,
            top_logprobs,
            priority: wire.priority,
            work: self::work(work)?,
            tokens_at_a_time: wire.tokens_at_a_time.clamp(1, TOKENS_AT_A_TIME_MOST),
        };
        Ok(Self {
            leg: LegId(wire.leg),
            trace: TraceContext::new(&wire.traceparent, &wire.tracestate),
            incarnation: Incarnation(wire.incarnation),
            role_epoch: RoleEpoch(wire.role_epoch),
            model: wire.model,
            asked,
            first_token_within: Duration::from_millis(wire.first_token_within_millis)
                .min(FIRST_TOKEN_WITHIN_MOST),
            timeout: (wire.timeout_millis > 0).then(|| Duration::from_millis(wire.timeout_millis)),
        })
    }
}

fn work(wire: v1::dispatch::Work) -> Result<Work, ApiError> {
    let transfer =
        |id: &[u8]| TransferId::try_from(id).map_err(|error| invalid("transfer_id", error.to_string()));
    match wire {
        v1::dispatch::Work::Whole(_) => Ok(Work::Whole),
        v1::dispatch::Work::Prefill(prefill) => {
            if prefill.decode_handoff_endpoint.is_empty() {
                return Err(invalid("decode_handoff_endpoint", "the decode instance's endpoint is missing"));
            }
            Ok(Work::Prefill(Outbound {
                transfer: transfer(&prefill.transfer_id)?,
                receiver: InstanceId::new(prefill.decode_instance)
                    .map_err(|error| invalid("decode_instance", error.to_string()))?,
                receiver_incarnation: Incarnation(prefill.decode_incarnation),
                endpoint: prefill.decode_handoff_endpoint,
                hand_on: prefill.hand_on,
            }))
        }
        v1::dispatch::Work::Decode(decode) => Ok(Work::Decode(Inbound {
            transfer: transfer(&decode.transfer_id)?,
            sender: InstanceId::new(decode.prefill_instance)
                .map_err(|error| invalid("prefill_instance", error.to_string()))?,
            sender_incarnation: Incarnation(decode.prefill_incarnation),
        })),
    }
}

fn top_logprobs(wire: Option<u32>) -> Result<Option<u32>, ApiError> {
    match wire {
        Some(top) if top > TOP_LOGPROBS_MOST => Err(invalid(
            "top_logprobs",
            format!("top_logprobs is {top}, must be at most {TOP_LOGPROBS_MOST}"),
        )),
        other => Ok(other),
    }
}

fn logit_bias(wire: Vec<v1::LogitBias>) -> Result<Vec<(u32, f32)>, ApiError> {
    if wire.len() > LOGIT_BIASES_MOST {
        return Err(invalid("logit_bias", format!("at most {LOGIT_BIASES_MOST} biases are taken")));
    }
    let checked = |bias: v1::LogitBias| match bias.bias {
        value if value.abs() <= 100.0 => Ok((bias.token, value)),
        value => Err(invalid(
            "logit_bias",
            format!("the bias of token {} is {value}, must be -100 to 100", bias.token),
        )),
    };
    wire.into_iter().map(checked).collect()
}

fn sampling_params(wire: v1::Sampling) -> Result<(SamplingParams, StopRule), ApiError> {
    let in_range = |field: &str, value: f32, low: f32, high: f32| {
        let fits = value >= low && value <= high;
        if fits {
            Ok(value)
        } else {
            Err(invalid(field, format!("{field} is {value}, must be {low} to {high}")))
        }
    };
    if wire.top_p <= 0.0 {
        return Err(invalid("top_p", format!("top_p is {}, must be above 0", wire.top_p)));
    }
    if wire.repetition_penalty <= 0.0 {
        let message = format!("repetition_penalty is {}, must be above 0", wire.repetition_penalty);
        return Err(invalid("repetition_penalty", message));
    }
    if wire.max_tokens == 0 {
        return Err(invalid("max_tokens", "max_tokens must be at least 1"));
    }
    if wire.stop_token_ids.len() > STOP_TOKENS_MOST {
        return Err(invalid("stop_token_ids", format!("at most {STOP_TOKENS_MOST} stop tokens are taken")));
    }
    let params = SamplingParams {
        temperature: in_range("temperature", wire.temperature, 0.0, 100.0)?,
        top_p: in_range("top_p", wire.top_p, 0.0, 1.0)?,
        top_k: wire.top_k,
        min_p: in_range("min_p", wire.min_p, 0.0, 1.0)?,
        frequency_penalty: in_range("frequency_penalty", wire.frequency_penalty, -100.0, 100.0)?,
        presence_penalty: in_range("presence_penalty", wire.presence_penalty, -100.0, 100.0)?,
        repetition_penalty: in_range("repetition_penalty", wire.repetition_penalty, 0.0, 100.0)?,
        seed: wire.seed,
        logit_bias: logit_bias(wire.logit_bias)?,
        min_tokens: wire.min_tokens,
        stop_tokens: if wire.min_tokens > 0 { wire.stop_token_ids.clone() } else { Vec::new() },
    };
    Ok((params, StopRule { max_tokens: wire.max_tokens, stop_tokens: wire.stop_token_ids }))
}

impl Leg {
    /// Whether this instance, in its present role, does this work for this model.
    pub fn check(&self, facts: &InstanceFacts, role: RoleView) -> Result<(), ApiError> {
        let stale = |message: String| Err(ApiError::new(ErrorCode::StaleEpoch, message));
        if self.incarnation != facts.incarnation {
            return stale(format!(
                "instance {} is incarnation {}, not {}: it has restarted",
                facts.instance_id, facts.incarnation, self.incarnation
            ));
        }
        // What is here already is handed on as part of the drain, which waits for it, and by whoever has it.
        let hands_on = self.asked.work.hands_on();
        if role.phase != Phase::Ready && !(hands_on && role.phase == Phase::Draining) {
            let message =
                format!("instance {} takes no requests now: {}", facts.instance_id, describe(role.phase));
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
        if self.role_epoch != role.epoch {
            return stale(format!(
                "the role's epoch is {}, not {}: it was assigned anew",
                role.epoch, self.role_epoch
            ));
        }
        let suits = match self.asked.work {
            // One token is all prefill's work: there is nothing to hand over.
            Work::Whole if self.asked.stop.max_tokens as usize == self.asked.generated.len() + 1 => {
                role.role != Role::None
            }
            // Decode can do all of a request, too, whether or not a coordinator asks it to.
            Work::Whole | Work::Decode(_) => matches!(role.role, Role::Decode | Role::Mixed),
            Work::Prefill(_) if hands_on => role.role != Role::None,
            Work::Prefill(_) => matches!(role.role, Role::Prefill | Role::Mixed),
        };
        if !suits {
            return stale(format!(
                "instance {} has the role {:?}, which does not do this work",
                facts.instance_id, role.role
            ));
        }
        self.check_model(facts)
    }

    fn check_model(&self, facts: &InstanceFacts) -> Result<(), ApiError> {
        if self.model != facts.model {
            let message = format!("the model {:?} is not served here; this is {:?}", self.model, facts.model);
            return Err(ApiError::new(ErrorCode::ModelNotFound, message).param("model"));
        }
        let Asked { prompt, generated, .. } = &self.asked;
        for (field, tokens) in [("prompt_tokens", prompt), ("generated_tokens", generated)] {
            if let Some(token) = tokens.iter().find(|token| **token >= facts.vocabulary) {
                let message = format!("token {token} is outside the vocabulary of {}", facts.vocabulary);
                return Err(invalid(field, message));
            }
        }
        let given = prompt.len() + generated.len();
        if given >= facts.context_tokens as usize {
            let (prompt, context) = (given, facts.context_tokens);
            let message = format!("the prompt has {prompt} tokens; with a completion at most {context} fit");
            return Err(ApiError::new(ErrorCode::ContextLengthExceeded, message).param("prompt_tokens"));
        }
        Ok(())
    }
}

fn describe(phase: Phase) -> &'static str {
    match phase {
        Phase::Loading => "it is loading its model",
        Phase::Waiting => "it has no role yet",
        Phase::Switching => "it is switching its role",
        Phase::Draining => "it is draining",
        Phase::Ready => "it is ready",
    }
}

#[cfg(test)]
mod tests;
