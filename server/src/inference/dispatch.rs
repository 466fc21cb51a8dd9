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
        sequence::{Inbound, Outbound, StopRule, Work},
    },
    role::{Phase, Role, RoleView},
};

/// A well-formed leg.
#[derive(Debug, Clone, PartialEq)]
pub struct Leg {
    pub leg: LegId,
    pub request: RequestId,
    pub trace: TraceContext,
    pub incarnation: Incarnation,
    pub role_epoch: RoleEpoch,
    pub model: String,
    pub prompt: Vec<u32>,
    /// Tokens of the completion that there are already; none of a leg of several choices.
    pub generated: Vec<u32>,
    /// At least 1.
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stop: StopRule,
    /// Log probabilities are wanted, with as many of the likeliest tokens.
    pub top_logprobs: Option<u32>,
    /// Lower is served first.
    pub priority: i32,
    /// From receipt to the first token, as it is wanted: of one priority who is wanted sooner is served first.
    pub first_token_within: Duration,
    /// From receipt to the last token.
    pub timeout: Option<Duration>,
    pub work: Work,
    /// How many tokens behind the first may be told at a time; at least 1.
    pub tokens_at_a_time: u32,
}

/// A message is to stay small, log probabilities included: one stream carries everybody's.
const TOKENS_AT_A_TIME_MOST: u32 = 256;

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
        Ok(Self {
            leg: LegId(wire.leg),
            request: RequestId::adopt(&wire.request_id),
            trace: TraceContext::new(&wire.traceparent, &wire.tracestate),
            incarnation: Incarnation(wire.incarnation),
            role_epoch: RoleEpoch(wire.role_epoch),
            model: wire.model,
            prompt,
            generated,
            choices,
            sampling,
            stop,
            top_logprobs,
            priority: wire.priority,
            first_token_within: Duration::from_millis(wire.first_token_within_millis)
                .min(FIRST_TOKEN_WITHIN_MOST),
            timeout: (wire.timeout_millis > 0).then(|| Duration::from_millis(wire.timeout_millis)),
            work: self::work(work)?,
            tokens_at_a_time: wire.tokens_at_a_time.clamp(1, TOKENS_AT_A_TIME_MOST),
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

/// Nobody stands behind those who come later for longer.
const FIRST_TOKEN_WITHIN_MOST: Duration = Duration::from_secs(3600);
/// Stop tokens of one request; more are refused.
const MAX_STOP_TOKENS: usize = 1024;
/// Biases of one request; more are refused.
const MAX_LOGIT_BIASES: usize = 1024;
/// Likeliest tokens told beside each; more are refused.
const MAX_TOP_LOGPROBS: u32 = 20;

fn top_logprobs(wire: Option<u32>) -> Result<Option<u32>, ApiError> {
    match wire {
        Some(top) if top > MAX_TOP_LOGPROBS => {
            Err(invalid("top_logprobs", format!("top_logprobs is {top}, must be at most {MAX_TOP_LOGPROBS}")))
        }
        other => Ok(other),
    }
}

fn logit_bias(wire: Vec<v1::LogitBias>) -> Result<Vec<(u32, f32)>, ApiError> {
    if wire.len() > MAX_LOGIT_BIASES {
        return Err(invalid("logit_bias", format!("at most {MAX_LOGIT_BIASES} biases are taken")));
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
    if wire.stop_token_ids.len() > MAX_STOP_TOKENS {
        return Err(invalid("stop_token_ids", format!("at most {MAX_STOP_TOKENS} stop tokens are taken")));
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
        let hands_on = self.work.hands_on();
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
        let suits = match self.work {
            // One token is all prefill's work: there is nothing to hand over.
            Work::Whole if self.stop.max_tokens as usize == self.generated.len() + 1 => {
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
        for (field, tokens) in [("prompt_tokens", &self.prompt), ("generated_tokens", &self.generated)] {
            if let Some(token) = tokens.iter().find(|token| **token >= facts.vocabulary) {
                let message = format!("token {token} is outside the vocabulary of {}", facts.vocabulary);
                return Err(invalid(field, message));
            }
        }
        let given = self.prompt.len() + self.generated.len();
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
mod tests {
    use super::*;

    fn facts() -> InstanceFacts {
        InstanceFacts {
            instance_id: InstanceId::new("s").expect("a name"),
            incarnation: Incarnation(5),
            model: "m".into(),
            vocabulary: 10,
            context_tokens: 8,
        }
    }

    fn view(role: Role) -> RoleView {
        RoleView { role, epoch: RoleEpoch(3), phase: Phase::Ready, load_permille: 1000, cordoned: false }
    }

    fn wire() -> v1::Dispatch {
        v1::Dispatch {
            leg: 1,
            request_id: "r".into(),
            incarnation: 5,
            role_epoch: 3,
            model: "m".into(),
            prompt_tokens: tokens::to_wire(&[1, 2]),
            sampling: Some(v1::Sampling {
                top_p: 1.0,
                repetition_penalty: 1.0,
                max_tokens: 4,
                stop_token_ids: vec![9],
                ..Default::default()
            }),
            work: Some(v1::dispatch::Work::Whole(v1::dispatch::Whole {})),
            ..Default::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut v1::Dispatch)) -> ApiError {
        let mut wire = wire();
        change(&mut wire);
        let checked = Leg::try_from(wire).and_then(|leg| leg.check(&facts(), view(Role::Mixed)));
        checked.expect_err("it was taken")
    }

    #[test]
    fn each_bad_field_is_named() {
        fn sampling(wire: &mut v1::Dispatch) -> &mut v1::Sampling {
            wire.sampling.as_mut().expect("sampling")
        }
        type Change = fn(&mut v1::Dispatch);
        let cases: [(&str, Change); 23] = [
            ("sampling", |w| w.sampling = None),
            ("work", |w| w.work = None),
            ("prompt_tokens", |w| w.prompt_tokens.clear()),
            ("prompt_tokens", |w| w.prompt_tokens = tokens::to_wire(&[1, 10])),
            ("prompt_tokens", |w| w.prompt_tokens.truncate(7)),
            ("generated_tokens", |w| w.generated_tokens = vec![10]),
            ("generated_tokens", |w| w.generated_tokens = vec![1; 4]),
            ("generated_tokens", |w| (w.generated_tokens, sampling(w).choices) = (vec![1], 2)),
            ("temperature", |w| sampling(w).temperature = -0.1),
            ("temperature", |w| sampling(w).temperature = f32::NAN),
            ("top_p", |w| sampling(w).top_p = 0.0),
            ("top_p", |w| sampling(w).top_p = f32::NAN),
            ("min_p", |w| sampling(w).min_p = 1.1),
            ("repetition_penalty", |w| sampling(w).repetition_penalty = 0.0),
            ("frequency_penalty", |w| sampling(w).frequency_penalty = f32::INFINITY),
            ("max_tokens", |w| sampling(w).max_tokens = 0),
            ("n", |w| sampling(w).choices = 129),
            ("top_logprobs", |w| sampling(w).top_logprobs = Some(21)),
            ("logit_bias", |w| sampling(w).logit_bias = vec![v1::LogitBias { token: 1, bias: 100.5 }]),
            ("logit_bias", |w| sampling(w).logit_bias = vec![v1::LogitBias { token: 1, bias: f32::NAN }]),
            ("logit_bias", |w| sampling(w).logit_bias = vec![v1::LogitBias::default(); 1025]),
            ("transfer_id", |w| w.work = Some(v1::dispatch::Work::Decode(v1::dispatch::Decode::default()))),
            ("decode_handoff_endpoint", |w| {
                w.work = Some(v1::dispatch::Work::Prefill(v1::dispatch::Prefill::default()));
            }),
        ];
        for (field, change) in cases {
            let error = refusal(change);
            assert_eq!(
                (error.code, error.param.as_deref()),
                (ErrorCode::InvalidArgument, Some(field)),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_out_of_date_or_does_not_fit_is_refused() {
        assert_eq!(refusal(|w| w.incarnation = 4).code, ErrorCode::StaleEpoch);
        assert_eq!(refusal(|w| w.role_epoch = 2).code, ErrorCode::StaleEpoch);
        assert_eq!(refusal(|w| w.model = "x".into()).code, ErrorCode::ModelNotFound);
        assert_eq!(
            refusal(|w| w.prompt_tokens = tokens::to_wire(&[1; 8])).code,
            ErrorCode::ContextLengthExceeded
        );
        let carried = |w: &mut v1::Dispatch| {
            (w.prompt_tokens, w.generated_tokens) = (tokens::to_wire(&[1; 5]), vec![1; 3]);
        };
        assert_eq!(refusal(carried).code, ErrorCode::ContextLengthExceeded);
        let leg = Leg::try_from(wire()).expect("valid");
        for role in [Role::Prefill, Role::None] {
            assert_eq!(leg.check(&facts(), view(role)).expect_err("wrong role").code, ErrorCode::StaleEpoch);
        }
        let mut one_token = leg.clone();
        one_token.stop.max_tokens = 1;
        assert_eq!(one_token.check(&facts(), view(Role::Prefill)), Ok(()));
        assert!(one_token.check(&facts(), view(Role::None)).is_err());
        let last_token = Leg { generated: vec![1; 3], ..leg.clone() };
        assert_eq!(last_token.check(&facts(), view(Role::Prefill)), Ok(()));
        for phase in [Phase::Loading, Phase::Waiting, Phase::Switching, Phase::Draining] {
            let error = leg.check(&facts(), RoleView { phase, ..view(Role::Mixed) }).expect_err("not ready");
            assert_eq!(error.code, ErrorCode::Unavailable);
        }
        assert_eq!(leg.check(&facts(), view(Role::Decode)), Ok(()));
    }

    #[test]
    fn what_is_to_be_handed_on_is_taken_whatever_the_role_and_while_it_drains() {
        let work = |hand_on| {
            let to = v1::dispatch::Prefill {
                transfer_id: vec![7; 16].into(),
                decode_instance: "d".into(),
                decode_handoff_endpoint: "d:1".into(),
                hand_on,
                ..Default::default()
            };
            Leg::try_from(v1::Dispatch { work: Some(v1::dispatch::Work::Prefill(to)), ..wire() })
                .expect("valid")
        };
        let code = |hand_on, view| work(hand_on).check(&facts(), view).err().map(|error| error.code);
        let (stale, unavailable) = (Some(ErrorCode::StaleEpoch), Some(ErrorCode::Unavailable));
        for role in [Role::Decode, Role::Mixed, Role::Prefill] {
            let draining = RoleView { phase: Phase::Draining, ..view(role) };
            assert_eq!([code(true, view(role)), code(true, draining)], [None, None], "{role:?}");
            assert_eq!(code(false, draining), unavailable, "{role:?}");
            assert_eq!(code(true, RoleView { epoch: RoleEpoch(4), ..draining }), stale, "{role:?}");
            for phase in [Phase::Loading, Phase::Waiting, Phase::Switching] {
                assert_eq!(code(true, RoleView { phase, ..view(role) }), unavailable, "{role:?}");
            }
        }
        assert_eq!(code(true, view(Role::None)), stale);
        assert_eq!(code(false, view(Role::Decode)), stale);
    }

    #[test]
    fn stop_tokens_are_ruled_out_only_as_long_as_min_tokens_says() {
        let mut wire = wire();
        let leg = Leg::try_from(wire.clone()).expect("valid");
        assert_eq!((&leg.stop.stop_tokens[..], leg.sampling.stop_tokens.len()), (&[9][..], 0));
        wire.sampling.as_mut().expect("sampling").min_tokens = 2;
        let leg = Leg::try_from(wire).expect("valid");
        assert_eq!((leg.sampling.min_tokens, leg.sampling.stop_tokens), (2, vec![9]));
    }
}
