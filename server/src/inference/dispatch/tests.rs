//! What is refused of a dispatch, and by which field.

use baton_proto::Tokens;

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
        prompt_tokens: Tokens::from([1, 2]).to_wire(),
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
        ("prompt_tokens", |w| w.prompt_tokens = Tokens::from([1, 10]).to_wire()),
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
        refusal(|w| w.prompt_tokens = Tokens::from([1; 8]).to_wire()).code,
        ErrorCode::ContextLengthExceeded
    );
    let carried = |w: &mut v1::Dispatch| {
        (w.prompt_tokens, w.generated_tokens) = (Tokens::from([1; 5]).to_wire(), vec![1; 3]);
    };
    assert_eq!(refusal(carried).code, ErrorCode::ContextLengthExceeded);
    let leg = Leg::try_from(wire()).expect("valid");
    for role in [Role::Prefill, Role::None] {
        assert_eq!(leg.check(&facts(), view(role)).expect_err("wrong role").code, ErrorCode::StaleEpoch);
    }
    let mut one_token = leg.clone();
    one_token.asked.stop.max_tokens = 1;
    assert_eq!(one_token.check(&facts(), view(Role::Prefill)), Ok(()));
    assert!(one_token.check(&facts(), view(Role::None)).is_err());
    let mut last_token = leg.clone();
    last_token.asked.generated = vec![1; 3];
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
        Leg::try_from(v1::Dispatch { work: Some(v1::dispatch::Work::Prefill(to)), ..wire() }).expect("valid")
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
    assert_eq!((&leg.asked.stop.stop_tokens[..], leg.asked.sampling.stop_tokens.len()), (&[9][..], 0));
    wire.sampling.as_mut().expect("sampling").min_tokens = 2;
    let leg = Leg::try_from(wire).expect("valid");
    assert_eq!((leg.asked.sampling.min_tokens, leg.asked.sampling.stop_tokens), (2, vec![9]));
}
