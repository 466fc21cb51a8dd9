//! Why a leg is cancelled: told to the instance, for its log, and counted by name.

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelReason {
    /// The answer is complete, and only a report was waited for.
    AnswerComplete,
    /// The request met a bug in the coordinator.
    Bug,
    ClientGone,
    Deadline,
    /// The instance sent more, in more disorder, than is kept.
    Flood,
    /// What prefill handed on arrived damaged.
    KvDamaged,
    /// It is one of several that were to leave an instance together, and not all could.
    NotMoved,
    /// Of its pair.
    OtherLegEnded,
    /// The request goes on elsewhere.
    PlacedAgain,
    /// Prefill is lost, and the cache did not come.
    PrefillLost,
    /// Prefill could not be asked.
    PrefillNotDispatched,
    RequestFailed,
    StopString,
    /// The instance does not get on.
    Stuck,
}

impl CancelReason {
    pub const ALL: [Self; 14] = [
        Self::AnswerComplete,
        Self::Bug,
        Self::ClientGone,
        Self::Deadline,
        Self::Flood,
        Self::KvDamaged,
        Self::NotMoved,
        Self::OtherLegEnded,
        Self::PlacedAgain,
        Self::PrefillLost,
        Self::PrefillNotDispatched,
        Self::RequestFailed,
        Self::StopString,
        Self::Stuck,
    ];

    /// As logs and metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AnswerComplete => "answer_complete",
            Self::Bug => "bug",
            Self::ClientGone => "client_gone",
            Self::Deadline => "deadline",
            Self::Flood => "flood",
            Self::KvDamaged => "kv_damaged",
            Self::NotMoved => "not_moved",
            Self::OtherLegEnded => "other_leg_ended",
            Self::PlacedAgain => "placed_again",
            Self::PrefillLost => "prefill_lost",
            Self::PrefillNotDispatched => "prefill_not_dispatched",
            Self::RequestFailed => "request_failed",
            Self::StopString => "stop_string",
            Self::Stuck => "stuck",
        }
    }
}
