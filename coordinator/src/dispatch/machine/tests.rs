//! Tables over the orders in which two streams may speak, and a property over all of them.

use proptest::prelude::*;
use smallvec::smallvec;

use super::*;

fn out(first_position: u32, tokens: &[u32]) -> Output {
    Output {
        choice: 0,
        first_position,
        tokens: tokens.into(),
        logprobs: vec![],
        cached_tokens: None,
        end: None,
    }
}

fn end(end: LegEnd) -> Output {
    Output {
        choice: 0,
        first_position: 0,
        tokens: smallvec![],
        logprobs: vec![],
        cached_tokens: None,
        end: Some(end),
    }
}

fn handed(cached_tokens: u32) -> Output {
    end(LegEnd::HandedOff { cached_tokens })
}

fn complete(reason: StopReason) -> Output {
    end(LegEnd::Complete { reason, cached_tokens: 0 })
}

fn lost() -> ApiError {
    ApiError::new(ErrorCode::InstanceLost, "gone")
}

fn ok(reason: StopReason, cached_tokens: u32) -> Command {
    Command::End(Ok(Completed { reason, cached_tokens, outgrown: None }))
}

#[test]
fn tokens_of_two_legs_come_in_order() {
    let mut machine = Machine::apart(4);
    assert!(machine.output(Side::Decode, out(1, &[11, 12])).is_empty());
    assert!(machine.take_fresh().tokens.is_empty(), "token 0 is missing");
    assert!(machine.output(Side::Prefill, out(0, &[10])).is_empty());
    assert_eq!(machine.take_fresh().tokens, [10, 11, 12]);
    assert!(machine.take_fresh().tokens.is_empty());
    machine.output(Side::Prefill, handed(4));
    machine.output(Side::Decode, out(3, &[13]));
    assert_eq!(machine.take_fresh().tokens, [13]);
    assert_eq!(machine.output(Side::Decode, complete(StopReason::Length)), [ok(StopReason::Length, 4)]);
}

#[test]
fn what_was_cached_is_known_from_the_first_token_on_and_not_from_decode() {
    for (mut machine, side) in [(Machine::whole(4), Side::Whole), (Machine::apart(4), Side::Prefill)] {
        machine.output(Side::Decode, Output { cached_tokens: Some(9), ..out(1, &[11]) });
        machine.output(side, Output { cached_tokens: Some(6), ..out(0, &[10]) });
        assert_eq!(machine.cached_tokens(), Some(6));
        assert_eq!(machine.stop().pop(), Some(ok(StopReason::Stop, 6)));
    }
}

#[test]
fn repeated_tokens_are_dropped_and_contradictions_fail() {
    let mut machine = Machine::apart(10);
    machine.output(Side::Prefill, out(0, &[10]));
    machine.output(Side::Decode, out(0, &[10, 11]));
    machine.output(Side::Decode, out(1, &[11, 12]));
    assert_eq!(machine.take_fresh().tokens, [10, 11, 12]);
    let commands = machine.output(Side::Decode, out(2, &[99]));
    assert_eq!(commands[..2], [Command::Cancel(Side::Prefill), Command::Cancel(Side::Decode)]);
    assert!(matches!(&commands[2], Command::End(Err(error)) if error.code == ErrorCode::Internal));
    assert!(machine.output(Side::Decode, out(3, &[13])).is_empty(), "over is over");
}

#[test]
fn an_attempt_goes_on_from_the_tokens_there_are() {
    let mut machine = Machine::apart(5).after(&[10, 11]);
    assert!(!machine.has_begun() && machine.take_fresh().tokens.is_empty(), "they have been given out");
    machine.output(Side::Decode, out(3, &[13]));
    machine.output(Side::Prefill, out(2, &[12]));
    assert!(machine.has_begun());
    machine.output(Side::Prefill, handed(4));
    assert_eq!(machine.take_fresh().tokens, [12, 13]);
    let last = Output { end: complete(StopReason::Length).end, ..out(4, &[14]) };
    assert_eq!(machine.output(Side::Decode, last), [ok(StopReason::Length, 4)]);
    assert_eq!(machine.take_fresh().tokens, [14]);
    // Repeated, they must be the same; prefill's token is the next one; a handover without it brings nothing.
    let failed = |side, output| {
        let mut machine = Machine::apart(5).after(&[10, 11]);
        matches!(machine.output(side, output).last(), Some(Command::End(Err(_))))
    };
    assert!(!failed(Side::Decode, out(0, &[10, 11])));
    assert!(failed(Side::Decode, out(0, &[10, 99])));
    assert!(failed(Side::Prefill, out(3, &[13])));
    assert!(failed(Side::Prefill, handed(0)));
    assert!(failed(Side::Decode, out(5, &[15])), "more than were asked for");
}

#[test]
fn what_ends_short_of_what_was_asked_for_has_outgrown_its_instance() {
    let ends = |mut machine: Machine, side, last: Output| match machine.output(side, last).last() {
        Some(Command::End(Ok(completed))) => completed.outgrown,
        other => panic!("{other:?}"),
    };
    let last = |reason, from, tokens: &[u32]| Output { end: complete(reason).end, ..out(from, tokens) };
    let (whole, length) = (Side::Whole, StopReason::Length);
    assert_eq!(ends(Machine::whole(3), whole, last(length, 0, &[10, 11])), Some(whole));
    assert_eq!(ends(Machine::whole(3).after(&[10]), whole, last(length, 1, &[11])), Some(whole));
    assert_eq!(ends(Machine::apart(3), Side::Prefill, last(length, 0, &[10])), Some(Side::Prefill));
    assert_eq!(
        ends(Machine::whole(2), whole, last(length, 0, &[10, 11])),
        None,
        "it is as long as asked for"
    );
    assert_eq!(ends(Machine::whole(3), whole, last(StopReason::Stop, 0, &[10, 11])), None);
    // Prefill says its own later.
    let mut machine = Machine::apart(9);
    machine.output(Side::Decode, last(length, 1, &[11, 12]));
    assert_eq!(machine.output(Side::Prefill, out(0, &[10])), [Command::Linger]);
    assert_eq!(ends(machine, Side::Prefill, handed(7)), Some(Side::Decode));
}

#[test]
fn log_probabilities_stay_with_their_tokens() {
    let scored = |first_position, tokens: &[u32]| Output {
        logprobs: tokens
            .iter()
            .map(|&token| TokenLogprobs { logprob: -(token as f32), top: vec![] })
            .collect(),
        ..out(first_position, tokens)
    };
    let mut machine = Machine::apart(10).with_logprobs(true);
    machine.output(Side::Decode, scored(1, &[11, 12]));
    assert!(machine.take_fresh().logprobs.is_empty());
    machine.output(Side::Prefill, scored(0, &[10]));
    machine.output(Side::Decode, scored(2, &[12, 13]));
    let fresh = machine.take_fresh();
    assert_eq!(fresh.tokens, [10, 11, 12, 13]);
    assert_eq!(fresh.logprobs, scored(0, &[10, 11, 12, 13]).logprobs);
    assert!(machine.take_fresh().logprobs.is_empty());
    let commands = machine.output(Side::Decode, out(4, &[14]));
    assert!(matches!(commands.last(), Some(Command::End(Err(_)))), "a token without is a broken contract");
}

#[test]
fn prefill_that_ends_the_sequence_cancels_decode() {
    for (reason, most) in [(StopReason::Stop, 10), (StopReason::Length, 1)] {
        let mut machine = Machine::apart(most);
        let last = Output { end: Some(LegEnd::Complete { reason, cached_tokens: 3 }), ..out(0, &[10]) };
        let commands = machine.output(Side::Prefill, last);
        assert_eq!(commands, [Command::Cancel(Side::Decode), ok(reason, 3)]);
        assert_eq!(machine.take_fresh().tokens, [10]);
    }
}

#[test]
fn a_broken_transfer_waits_for_prefills_word() {
    let broken = |code| Output::failed(ApiError::new(code, "the transfer was broken off"));
    for code in [ErrorCode::Cancelled, ErrorCode::NotNeeded, ErrorCode::HandoffFailed] {
        // Prefill needed no decode.
        let mut machine = Machine::apart(1);
        assert!(machine.output(Side::Decode, broken(code)).is_empty());
        let last = Output { end: complete(StopReason::Length).end, ..out(0, &[10]) };
        assert_eq!(machine.output(Side::Prefill, last), [ok(StopReason::Length, 0)]);
        // Prefill failed and says why.
        let mut machine = Machine::apart(10);
        assert!(machine.output(Side::Decode, broken(code)).is_empty());
        assert!(machine.output(Side::Prefill, out(0, &[10])).is_empty());
        assert_eq!(machine.output(Side::Prefill, Output::failed(lost())), [Command::End(Err(lost()))]);
        // Prefill believes that decode has the cache.
        let mut machine = Machine::apart(10);
        machine.output(Side::Prefill, out(0, &[10]));
        assert!(machine.output(Side::Decode, broken(code)).is_empty());
        let commands = machine.output(Side::Prefill, handed(0));
        let failed = ErrorCode::HandoffFailed;
        assert!(matches!(&commands[..], [Command::End(Err(error))] if error.code == failed), "{commands:?}");
    }
}

#[test]
fn what_only_a_transfer_brings_is_not_the_clients_doing() {
    use ErrorCode::{AlreadyExists, Cancelled, HandoffFailed, Internal, NotNeeded, Unsupported};
    let ended = |mut machine: Machine, side, code| {
        let commands = machine.output(side, Output::failed(ApiError::new(code, "layouts differ")));
        let Some(Command::End(Err(error))) = commands.last() else { panic!("{code:?}: {commands:?}") };
        (error.code, error.message.clone())
    };
    for code in [Unsupported, AlreadyExists, Cancelled, NotNeeded] {
        let said = "layouts differ".to_owned();
        assert_eq!(ended(Machine::apart(10), Side::Prefill, code), (HandoffFailed, said.clone()));
        assert_eq!(ended(Machine::whole(10), Side::Whole, code), (Internal, said));
    }
    assert_eq!(ended(Machine::apart(10), Side::Decode, Unsupported).0, HandoffFailed);
    assert_eq!(
        ended(Machine::apart(10), Side::Decode, ErrorCode::InvalidArgument).0,
        ErrorCode::InvalidArgument
    );
}

#[test]
fn a_failing_leg_cancels_the_other() {
    for (fails, other) in [(Side::Prefill, Side::Decode), (Side::Decode, Side::Prefill)] {
        let mut machine = Machine::apart(10);
        let commands = machine.output(fails, Output::failed(lost()));
        assert_eq!(commands, [Command::Cancel(other), Command::End(Err(lost()))]);
        assert!(machine.output(other, Output::failed(lost())).is_empty(), "one error only");
    }
}

#[test]
fn prefill_is_told_that_what_it_handed_on_arrived_damaged() {
    let damaged = || ApiError::new(ErrorCode::KvDamaged, "a slice is damaged");
    let mut machine = Machine::apart(10);
    machine.output(Side::Prefill, out(0, &[10]));
    let commands = machine.output(Side::Decode, Output::failed(damaged()));
    assert_eq!(commands, [Command::CancelDamaged(Side::Prefill), Command::End(Err(damaged()))]);
}

#[test]
fn prefill_lost_after_decode_took_over_changes_nothing() {
    let mut machine = Machine::apart(10);
    machine.output(Side::Prefill, out(0, &[10]));
    machine.output(Side::Decode, out(1, &[11]));
    assert!(
        machine.output(Side::Prefill, Output::failed(lost())).is_empty(),
        "nobody needs to be waited for"
    );
    let last = Output { end: complete(StopReason::Stop).end, ..out(2, &[12]) };
    assert_eq!(machine.output(Side::Decode, last), [ok(StopReason::Stop, 0)]);
    assert_eq!(machine.take_fresh().tokens, [10, 11, 12]);
}

#[test]
fn prefill_lost_after_its_token_waits_for_decodes_word() {
    let waiting = |end: fn() -> LegEnd| {
        let mut machine = Machine::apart(10);
        machine.output(Side::Prefill, out(0, &[10]));
        let commands = machine.output(Side::Prefill, self::end(end()));
        assert_eq!(commands, [Command::AwaitDecode], "decode may have the cache");
        machine
    };
    for how in [|| LegEnd::Failed(lost().into()), || LegEnd::Cancelled] as [fn() -> LegEnd; 2] {
        // It has it, and goes on.
        let mut machine = waiting(how);
        assert!(machine.output(Side::Decode, out(1, &[11])).is_empty());
        let last = Output { end: complete(StopReason::Stop).end, ..out(2, &[12]) };
        assert_eq!(machine.output(Side::Decode, last), [ok(StopReason::Stop, 0)]);
        assert_eq!(machine.take_fresh().tokens, [10, 11, 12]);
        // It never says so.
        assert_eq!(waiting(how).abort(lost()), [Command::Cancel(Side::Decode), Command::End(Err(lost()))]);
    }
    // Nor anything else.
    let mut machine = waiting(|| LegEnd::Failed(lost().into()));
    assert_eq!(machine.decode_silent(), [Command::Cancel(Side::Decode), Command::End(Err(lost()))]);
    assert!(machine.decode_silent().is_empty());
    // Silence after its first word is the engine's business.
    let mut machine = waiting(|| LegEnd::Failed(lost().into()));
    machine.output(Side::Decode, out(1, &[11]));
    assert!(machine.decode_silent().is_empty() && !machine.is_over());
    // It has not: prefill's end is why.
    let of_transfer = |code| LegEnd::Failed(ApiError::new(code, "the transfer was broken off").into());
    for word in [of_transfer(ErrorCode::HandoffFailed), of_transfer(ErrorCode::Cancelled), LegEnd::Cancelled]
    {
        let mut machine = waiting(|| LegEnd::Failed(lost().into()));
        assert_eq!(machine.output(Side::Decode, end(word)), [Command::End(Err(lost()))]);
    }
    // It failed for a reason of its own.
    let full = ApiError::new(ErrorCode::KvExhausted, "full");
    let mut machine = waiting(|| LegEnd::Failed(lost().into()));
    assert_eq!(machine.output(Side::Decode, Output::failed(full.clone())), [Command::End(Err(full))]);
}

#[test]
fn decode_that_stops_after_taking_over_is_not_prefills_fault() {
    let mut machine = Machine::apart(10);
    machine.output(Side::Prefill, out(0, &[10]));
    machine.output(Side::Prefill, Output::failed(lost()));
    machine.output(Side::Decode, out(1, &[11]));
    let commands = machine.output(Side::Decode, end(LegEnd::Cancelled));
    assert!(matches!(&commands[..], [Command::End(Err(error))] if error.code == ErrorCode::Unavailable));
}

#[test]
fn prefill_lost_before_its_token_fails_even_if_decode_spoke() {
    let mut machine = Machine::apart(10);
    machine.output(Side::Decode, out(1, &[11]));
    let commands = machine.output(Side::Prefill, Output::failed(lost()));
    assert_eq!(commands, [Command::Cancel(Side::Decode), Command::End(Err(lost()))]);
}

#[test]
fn decode_that_finishes_first_waits_for_token_zero_and_the_count_of_cached_tokens() {
    let mut machine = Machine::apart(3);
    let last = Output { end: complete(StopReason::Length).end, ..out(1, &[11, 12]) };
    assert!(machine.output(Side::Decode, last).is_empty());
    assert_eq!(machine.output(Side::Prefill, out(0, &[10])), [Command::Linger]);
    assert_eq!(machine.take_fresh().tokens, [10, 11, 12], "nothing but the end waits");
    assert_eq!(machine.output(Side::Prefill, handed(7)), [ok(StopReason::Length, 7)]);
}

#[test]
fn a_silent_prefill_does_not_hold_the_end_for_ever() {
    let mut machine = Machine::apart(2);
    machine.output(Side::Prefill, out(0, &[10]));
    let last = Output { end: complete(StopReason::Length).end, ..out(1, &[11]) };
    assert_eq!(machine.output(Side::Decode, last), [Command::Linger]);
    assert_eq!(machine.linger_over(), [Command::Cancel(Side::Prefill), ok(StopReason::Length, 0)]);
}

#[test]
fn lost_tokens_are_an_error_not_a_short_answer() {
    let mut machine = Machine::whole(10);
    machine.output(Side::Whole, out(0, &[1]));
    let last = Output { end: complete(StopReason::Stop).end, ..out(2, &[3]) };
    assert!(matches!(machine.output(Side::Whole, last)[..], [Command::End(Err(_))]));
}

#[test]
fn a_whole_leg_without_a_token_is_no_answer() {
    let commands = Machine::whole(4).output(Side::Whole, complete(StopReason::Stop));
    assert!(matches!(&commands[..], [Command::End(Err(error))] if error.code == ErrorCode::Internal));
}

#[test]
fn stop_and_abort_cancel_what_is_open() {
    let mut machine = Machine::apart(10);
    machine.output(Side::Prefill, out(0, &[10]));
    machine.output(Side::Prefill, handed(0));
    assert_eq!(machine.stop(), [Command::Cancel(Side::Decode), ok(StopReason::Stop, 0)]);
    assert!(machine.abort(lost()).is_empty());
    let mut machine = Machine::whole(10);
    assert_eq!(machine.abort(lost()), [Command::Cancel(Side::Whole), Command::End(Err(lost()))]);
}

#[test]
fn instances_that_break_the_contract_are_told_apart() {
    let cases = [
        (Side::Prefill, out(1, &[5])),
        (Side::Prefill, handed(0)),
        (Side::Prefill, complete(StopReason::Stop)),
        (Side::Decode, handed(0)),
        (Side::Decode, out(3, &[1, 2])),
        (Side::Decode, out(u32::MAX, &[1, 2])),
    ];
    for (side, output) in cases {
        let commands = Machine::apart(4).output(side, output.clone());
        let Some(Command::End(Err(error))) = commands.last() else { panic!("{output:?} was taken") };
        assert!(error.message.contains(side.instance()), "{error}");
    }
}

proptest! {
    /// However the two streams interleave and repeat themselves, the client gets every token once, in order, and the
    /// request ends exactly once.
    #[test]
    fn any_interleaving_gives_the_same_answer(
        length in 2u32..20,
        cuts in prop::collection::vec(1u32..4, 20),
        order in prop::collection::vec(any::<bool>(), 60),
        repeat in prop::collection::vec(any::<bool>(), 20),
    ) {
        let token = |position: u32| 100 + position;
        let mut prefill = vec![out(0, &[token(0)]), handed(2)].into_iter().peekable();
        let mut decode = Vec::new();
        let mut at = 1;
        for (cut, again) in cuts.into_iter().zip(repeat) {
            let to = (at + cut).min(length);
            let from = if again && at > 1 { at - 1 } else { at };
            if at < to {
                decode.push(out(from, &(from..to).map(token).collect::<Vec<_>>()));
            }
            at = to;
        }
        prop_assume!(at == length);
        decode.push(complete(StopReason::Length));
        let mut decode = decode.into_iter().peekable();
        let mut order = order.into_iter();
        let mut machine = Machine::apart(length);
        let (mut got, mut ends) = (Vec::new(), 0);
        while prefill.peek().is_some() || decode.peek().is_some() {
            let from_prefill = order.next().unwrap_or(true);
            let commands = match (from_prefill, prefill.peek().is_some(), decode.peek().is_some()) {
                (true, true, _) | (_, true, false) => machine.output(Side::Prefill, prefill.next().expect("peeked")),
                _ => machine.output(Side::Decode, decode.next().expect("peeked")),
            };
            got.extend_from_slice(machine.take_fresh().tokens);
            for command in commands {
                match command {
                    Command::End(end) => {
                        ends += 1;
                        let Ok(Completed { reason, cached_tokens, outgrown }) = end else { panic!("it failed") };
                        prop_assert_eq!((reason, cached_tokens, outgrown), (StopReason::Length, 2, None));
                    }
                    Command::Linger => {}
                    Command::AwaitDecode => prop_assert!(false, "prefill was not lost"),
                    Command::Cancel(side) | Command::CancelDamaged(side) => prop_assert!(false, "cancelled {side:?}"),
                }
            }
        }
        prop_assert_eq!(got, (0..length).map(token).collect::<Vec<_>>());
        prop_assert_eq!(ends, 1);
    }
}
