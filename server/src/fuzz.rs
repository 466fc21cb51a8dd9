//! What the target `inference` in `integration-tests/fuzz` calls: what coordinators and controllers ask of an instance.

use std::time::Duration;

use baton_proto::{Incarnation, InstanceId, RoleEpoch, v1};
use prost::Message as _;

use crate::{
    engine::{
        sampler::{Sampler, TokenCounts, logprobs::logprobs},
        sequence::Work,
    },
    inference::dispatch::{InstanceFacts, Leg},
    role::{Action, Assignment, Event, Phase, Role, RoleMachine, RoleView},
};

const VOCABULARY: u32 = 64;
const CONTEXT_TOKENS: u32 = 256;
const EVENTS_MOST: usize = 64;

/// A dispatch; or, if the first byte is 0xff, what a controller orders and how far the instance is.
pub fn inference(bytes: &[u8]) {
    match bytes {
        [0xff, rest @ ..] => orders(rest),
        [role, rest @ ..] => dispatch(*role, rest),
        [] => {}
    }
}

fn dispatch(role: u8, bytes: &[u8]) {
    let Ok(wire) = v1::Dispatch::decode(bytes) else { return };
    let asked = wire.sampling.as_ref().map_or(0, |sampling| sampling.choices);
    let leg = match Leg::try_from(wire.clone()) {
        Ok(leg) => leg,
        Err(error) => {
            assert!(error.code.http() == 400 && error.param.is_some(), "{error:?}");
            return;
        }
    };
    assert_eq!(leg.asked.choices, asked.max(1));
    assert!(leg.asked.choices <= 128 && !leg.asked.prompt.is_empty() && leg.asked.tokens_at_a_time > 0);
    assert!(leg.asked.stop.max_tokens as usize > leg.asked.generated.len());
    let facts = InstanceFacts {
        instance_id: InstanceId::new("a").expect("a good id"),
        incarnation: Incarnation(wire.incarnation & !1),
        model: "m".into(),
        vocabulary: VOCABULARY,
        context_tokens: CONTEXT_TOKENS,
    };
    let roles = [Role::Prefill, Role::Decode, Role::Mixed, Role::None];
    let phase = if role & 0x40 != 0 { Phase::Draining } else { Phase::Ready };
    let view =
        RoleView { role: roles[usize::from(role) % 4], epoch: leg.role_epoch, phase, ..RoleView::default() };
    if leg.check(&facts, view).is_err() {
        return;
    }
    assert!(phase == Phase::Ready || leg.asked.work.hands_on());
    assert!(!matches!((&leg.asked.work, view.role), (Work::Decode(_), Role::Prefill | Role::None)));
    let given = leg.asked.prompt.len() + leg.asked.generated.len();
    assert!(given < CONTEXT_TOKENS as usize);
    assert!(leg.asked.prompt.iter().chain(&leg.asked.generated).all(|&token| token < VOCABULARY));
    // Whatever was asked for can be sampled with, of any choice.
    let logits: Vec<f32> = (0..VOCABULARY).map(|token| (token * 37 % 101) as f32 - 50.0).collect();
    let counts = TokenCounts::new(&leg.asked.prompt, &leg.asked.generated);
    for choice in [0, leg.asked.choices - 1] {
        let params = leg.asked.sampling.of_choice(choice);
        let at = leg.asked.generated.len() as u32;
        let mut sampler = Sampler::default();
        if let Ok(token) = sampler.sample(&logits, &params, Some(&counts), at) {
            assert!(token < VOCABULARY);
            assert_eq!(sampler.sample(&logits, &params, Some(&counts), at), Ok(token), "the same each time");
            let told = logprobs(&logits, token, leg.asked.top_logprobs.unwrap_or(0));
            assert!(told.logprob <= 0.0 && told.top.len() <= 20);
        }
    }
}

/// Roles are taken on in the order of their epochs, each in its turn, and nothing is lost of the last.
fn orders(bytes: &[u8]) {
    let mut machine = RoleMachine::default();
    let (mut rest, mut newest, mut stopped) = (bytes, None::<Assignment>, false);
    for _ in 0..EVENTS_MOST {
        let [kind, length, behind @ ..] = rest else { break };
        let (message, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        let event = match kind % 8 {
            0..=3 => {
                let Ok(v1::ControllerOrder { order: Some(v1::controller_order::Order::Assign(order)) }) =
                    v1::ControllerOrder::decode(message)
                else {
                    continue;
                };
                let Ok(role) = Role::from_wire(order.role) else { continue };
                let drain = Duration::from_millis(order.drain_millis.into());
                let (epoch, cordoned) = (RoleEpoch(order.epoch), order.cordoned);
                let assignment = Assignment { role, epoch, drain, cordoned };
                if !stopped && newest.map_or(RoleEpoch(0), |newest| newest.epoch) < epoch {
                    newest = Some(assignment);
                }
                Event::Assigned(assignment)
            }
            4 => Event::Loaded,
            5 => Event::Drained,
            6 => Event::TakenOn,
            _ if *length == 0xff => {
                stopped = true;
                Event::Stop { drain: Duration::ZERO }
            }
            _ => Event::Progress { permille: u32::from(*length) * 8 },
        };
        let before = machine.view();
        let action = machine.on(event);
        let view = machine.view();
        assert!(view.epoch >= before.epoch && view.load_permille <= 1000);
        if let Some(Action::TakeOn(role)) = action {
            assert_eq!((Some(role), view.phase), (newest.map(|newest| newest.role), Phase::Switching));
        }
        if view.phase == Phase::Ready
            && let Some(newest) = newest
        {
            assert_eq!((view.role, view.epoch, view.cordoned), (newest.role, newest.epoch, newest.cordoned));
        }
        assert!(!stopped || matches!(view.phase, Phase::Draining));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_is_taken() {
        baton_fuzz::replay("inference", super::inference);
    }
}
