//! What the log says of a leg, within its span.

use std::{
    sync::LazyLock,
    time::{Duration, Instant, SystemTime},
};

use baton_proto::ErrorCode;

use super::{LegEnd, Sequence};

/// What a handoff's time is made of; for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Stage {
    /// Prefill: the last keys and values of the prompt are in its blocks.
    LastLayer,
    /// Prefill: the first token is chosen.
    FirstToken,
    /// Decode: the last slice of the cache has landed.
    LastSlice,
    /// Decode: the first step on the cache that has come begins.
    FirstStep,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::LastLayer => "last_layer",
            Self::FirstToken => "first_token",
            Self::LastSlice => "last_slice",
            Self::FirstStep => "first_step",
        }
    }
}

/// Times that both clocks are read; those count that were read with the least between them.
const READINGS: usize = 8;

/// Microseconds since 1970. The clocks are set beside each other once in a process: whenever it is held up later, what lies between
/// two of its times is what lay between them.
fn unix_micros(at: Instant) -> u64 {
    static BOTH: LazyLock<(Instant, Duration)> = LazyLock::new(|| {
        let readings = (0..READINGS).map(|_| {
            let (before, unix) = (Instant::now(), SystemTime::now());
            (before.elapsed(), (before, unix.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()))
        });
        readings
            .min_by_key(|(between, _)| *between)
            .map_or_else(|| (Instant::now(), Duration::ZERO), |(_, both)| both)
    });
    let (instant, unix) = *BOTH;
    let since = unix + at.saturating_duration_since(instant);
    since.saturating_sub(instant.saturating_duration_since(at)).as_micros() as u64
}

impl Sequence {
    /// Says in the log how far the leg is, and when it came there: a line's own time is that of its writing.
    pub(in crate::engine) fn log(&self, stage: Stage, at: Instant) {
        let _entered = self.span.enter();
        let at_micros = unix_micros(at);
        tracing::debug!(request_id = %self.request, stage = stage.name(), at_micros, "leg goes on");
    }

    /// Says in the log how the leg ended.
    pub(in crate::engine) fn log_end(&self, end: &LegEnd) {
        let _entered = self.span.enter();
        match end {
            LegEnd::Finished { reason, completion_tokens, .. } => {
                tracing::debug!(request_id = %self.request, ?reason, completion_tokens, "leg finished");
            }
            // The other side needs it no more: a completion of one token, say, leaves nothing to decode.
            LegEnd::Failed(error) if matches!(error.code, ErrorCode::Cancelled | ErrorCode::NotNeeded) => {
                tracing::debug!(request_id = %self.request, %error, "leg cancelled");
            }
            LegEnd::Failed(error) => {
                tracing::warn!(request_id = %self.request, code = error.code.name(), %error, "leg failed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_two_times_is_kept_and_all_are_of_today() {
        let now = Instant::now();
        let [first, second] = [now - Duration::from_millis(7), now].map(unix_micros);
        assert!((second - first).abs_diff(7_000) <= 1, "{first} {second}");
        let today =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_micros() as u64;
        assert!(today.abs_diff(second) < 60_000_000, "{second} at {today}");
    }
}
