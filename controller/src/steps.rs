//! What the decode steps of an instance were like between two of its reports. Pure; called by [`crate::demand`] and
//! [`crate::fleet::health`].

use baton_proto::InstanceLoad;

/// Decode steps, on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Steps {
    pub(crate) seconds: f64,
    /// At least 1.
    pub(crate) sequences: f64,
}

impl Steps {
    /// Of what was done between two reports of one start. None if no step only decoded: how long one takes that computes
    /// a prompt, too, depends on the prompt.
    pub(crate) fn between(before: &InstanceLoad, after: &InstanceLoad) -> Option<Self> {
        let more = |of: fn(&InstanceLoad) -> u64| of(after).saturating_sub(of(before)) as f64;
        let (steps, sequences, micros) = if after.timed_decode_steps > 0 {
            let steps = more(|load| load.timed_decode_steps);
            (steps, more(|load| load.decode_sequences), more(|load| load.decode_micros) / steps)
        } else {
            // An earlier version, which tells how long such steps take and how many there are of any.
            (
                more(|load| load.decode_steps),
                more(|load| load.decoded_tokens),
                after.decode_step_micros as f64,
            )
        };
        (steps > 0.0 && micros > 0.0)
            .then(|| Self { seconds: micros / 1e6, sequences: (sequences / steps).max(1.0) })
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::v1;

    use super::*;

    #[test]
    fn steps_that_only_decode_are_told_apart_if_the_instance_does() {
        let none = v1::InstanceLoad::default();
        let all =
            v1::InstanceLoad { decode_step_micros: 15_000, decode_steps: 10, decoded_tokens: 80, ..none };
        let alone =
            v1::InstanceLoad { decode_micros: 60_000, timed_decode_steps: 4, decode_sequences: 20, ..all };
        let more = v1::InstanceLoad { decode_steps: 20, decoded_tokens: 160, ..alone };
        let unmeasured = v1::InstanceLoad { decode_step_micros: 0, ..all };
        let cases = [
            (none, alone, Some(Steps { seconds: 0.015, sequences: 5.0 })),
            (alone, more, None),
            (none, all, Some(Steps { seconds: 0.015, sequences: 8.0 })),
            (none, unmeasured, None),
        ];
        for (before, after, steps) in cases {
            assert_eq!(Steps::between(&before.into(), &after.into()), steps, "{after:?}");
        }
    }
}
