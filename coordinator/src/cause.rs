//! What follows from why an attempt ended: whose fault it was, and whether another may do better. Pure.
//!
//! All that is concluded from an error's code on the way of a request is concluded here, by whoever leaves instances out
//! ([`crate::fleet::breakers`]), whoever drives its legs ([`crate::dispatch`]) and whoever carries it on ([`crate::carry`],
//! [`crate::stream`]).

use baton_proto::ErrorCode;

/// Something is wrong with an instance, or with the way its caches take. A lost instance is no fault: nobody places
/// requests where no stream stands. Nor is one that refuses.
pub fn is_fault(code: ErrorCode) -> bool {
    code == ErrorCode::Internal || is_of_a_handoff(code)
}

/// Either of a pair may be at fault, or what lies between, whoever reports it.
pub fn is_of_a_handoff(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::HandoffFailed | ErrorCode::KvDamaged)
}

/// The link is at fault if a request ends so before decode has said anything: the handoff failed by its own word, or the
/// cache was on its way, there was a first token, and then one side was lost or the time was up.
pub fn is_of_the_link(code: ErrorCode, first_token: bool) -> bool {
    let on_its_way = first_token && matches!(code, ErrorCode::InstanceLost | ErrorCode::DeadlineExceeded);
    on_its_way || is_of_a_handoff(code)
}

/// The other side of a transfer knows better why it ended.
pub fn is_of_the_other_side(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::Cancelled | ErrorCode::NotNeeded | ErrorCode::HandoffFailed)
}

/// What the end of an attempt counts as. Codes that only a transfer brings, which ends so on one of its sides, say nothing to
/// a client, whose doing they are not: of a pair it is a failed handoff, and whoever has no transfer breaks the contract.
pub fn taken_for(code: ErrorCode, apart: bool) -> ErrorCode {
    use ErrorCode::{AlreadyExists, Cancelled, HandoffFailed, Internal, NotNeeded, Unsupported};
    match code {
        Unsupported | AlreadyExists | Cancelled | NotNeeded if apart => HandoffFailed,
        Unsupported | AlreadyExists | Cancelled | NotNeeded => Internal,
        other => other,
    }
}

/// An instance is gone. One that is well and says so means its peer.
pub fn is_loss(code: ErrorCode) -> bool {
    code == ErrorCode::InstanceLost
}

/// Nothing was tried, if no token has come: an instance that drains, say, or has another role by now, does not take the
/// request.
pub fn is_refusal(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::Unavailable | ErrorCode::StaleEpoch | ErrorCode::QueueFull)
}

/// Another attempt may do better.
pub fn may_pass(code: ErrorCode) -> bool {
    is_loss(code) || is_refusal(code) || is_fault(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_each_code() {
        let handoff = "fault, handoff, link, link after a token, may pass";
        let failed = format!("other side, {handoff}");
        let refused = "refusal, may pass";
        let table = [
            (ErrorCode::Internal, "fault, may pass"),
            (ErrorCode::HandoffFailed, failed.as_str()),
            (ErrorCode::KvDamaged, handoff),
            (ErrorCode::InstanceLost, "loss, link after a token, may pass"),
            (ErrorCode::DeadlineExceeded, "link after a token"),
            (ErrorCode::Cancelled, "other side, of a transfer"),
            (ErrorCode::NotNeeded, "other side, of a transfer"),
            (ErrorCode::Unavailable, refused),
            (ErrorCode::StaleEpoch, refused),
            (ErrorCode::QueueFull, refused),
            (ErrorCode::KvExhausted, ""),
            (ErrorCode::InvalidArgument, ""),
            (ErrorCode::ModelNotFound, ""),
            (ErrorCode::ContextLengthExceeded, ""),
            (ErrorCode::PayloadTooLarge, ""),
            (ErrorCode::NotFound, ""),
            (ErrorCode::AlreadyExists, "of a transfer"),
            (ErrorCode::Unsupported, "of a transfer"),
            (ErrorCode::MethodNotAllowed, ""),
            (ErrorCode::RequestTimeout, ""),
            (ErrorCode::InvalidApiKey, ""),
            (ErrorCode::RateLimited, ""),
            (ErrorCode::UnsupportedMediaType, ""),
        ];
        for (code, expected) in table {
            let answers = [
                ("loss", is_loss(code)),
                ("refusal", is_refusal(code)),
                ("other side", is_of_the_other_side(code)),
                ("of a transfer", taken_for(code, true) != code),
                ("fault", is_fault(code)),
                ("handoff", is_of_a_handoff(code)),
                ("link", is_of_the_link(code, false)),
                ("link after a token", is_of_the_link(code, true)),
                ("may pass", may_pass(code)),
            ];
            let follows: Vec<_> = answers.iter().filter(|(_, holds)| *holds).map(|(what, _)| *what).collect();
            assert_eq!(follows.join(", "), expected, "{code:?}");
            for (apart, taken) in [(true, ErrorCode::HandoffFailed), (false, ErrorCode::Internal)] {
                let taken = if expected.contains("of a transfer") { taken } else { code };
                assert_eq!(taken_for(code, apart), taken, "{code:?}");
                assert!(taken == code || may_pass(taken));
            }
        }
    }
}
