//! Targets of a group on the command line, and durations as the wire takes them. Pure.

use std::{str::FromStr, time::Duration};

use baton_process::duration;
use baton_proto::v1::{RolePolicy, Targets};
use clap::ValueEnum;

use super::error::CtlError;

/// By what a group is divided. What is not given is as configured.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct TargetArgs {
    /// By a fixed ratio, or by what is measured [default: that which the other flags are for].
    #[arg(long, value_enum)]
    policy: Option<Policy>,

    /// Prefill to decode, as in 1:3.
    #[arg(long, value_name = "P:D")]
    ratio: Option<Ratio>,

    /// Wanted mean time to the first token, as in 500ms.
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    ttft: Option<Duration>,

    /// Wanted mean time per token after it, as in 50ms.
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    tpot: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Policy {
    Ratio,
    Auto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ratio {
    prefill: u32,
    decode: u32,
}

impl FromStr for Ratio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let part = |text: &str| text.trim().parse::<u32>().ok().filter(|part| *part > 0);
        text.split_once(':')
            .and_then(|(prefill, decode)| Some(Self { prefill: part(prefill)?, decode: part(decode)? }))
            .ok_or_else(|| "expected prefill to decode, each 1 or more, as in 1:3".to_owned())
    }
}

impl TargetArgs {
    /// None if nothing is given.
    pub(super) fn targets(&self) -> Result<Option<Targets>, CtlError> {
        let timed = self.ttft.is_some() || self.tpot.is_some();
        let policy = match (self.policy, self.ratio.is_some(), timed) {
            (Some(Policy::Ratio), ..) | (None, true, false) => RolePolicy::Ratio,
            (Some(Policy::Auto), ..) | (None, false, true) => RolePolicy::Auto,
            (None, false, false) => return Ok(None),
            (None, true, true) => {
                return Err(CtlError::Usage(
                    "--ratio is for one policy and --ttft and --tpot are for the other: say which with --policy",
                ));
            }
        };
        Ok(Some(Targets {
            policy: policy.into(),
            prefill: self.ratio.map_or(0, |ratio| ratio.prefill),
            decode: self.ratio.map_or(0, |ratio| ratio.decode),
            ttft_millis: self.ttft.map_or(Ok(0), wire_millis)?,
            tpot_millis: self.tpot.map_or(Ok(0), wire_millis)?,
        }))
    }
}

/// 0 would mean that nothing was said.
pub(super) fn wire_millis(duration: Duration) -> Result<u32, CtlError> {
    let millis = u32::try_from(duration.as_millis()).ok().filter(|millis| *millis > 0);
    millis.ok_or(CtlError::Usage("durations must be 1ms to 49 days"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_is_the_one_that_the_flags_are_for() {
        let ratio = Some("1:3".parse().unwrap());
        let ttft = Some(Duration::from_millis(500));
        let of = |args: TargetArgs| args.targets();
        let by_ratio = of(TargetArgs { ratio, ..Default::default() }).unwrap().unwrap();
        assert_eq!((by_ratio.policy(), by_ratio.prefill, by_ratio.decode), (RolePolicy::Ratio, 1, 3));
        let by_time = of(TargetArgs { ttft, ..Default::default() }).unwrap().unwrap();
        assert_eq!((by_time.policy(), by_time.ttft_millis, by_time.tpot_millis), (RolePolicy::Auto, 500, 0));
        let both = || TargetArgs { ratio, ttft, ..Default::default() };
        assert!(of(both()).unwrap_err().to_string().contains("say which with --policy"));
        let said = of(TargetArgs { policy: Some(Policy::Auto), ..both() }).unwrap().unwrap();
        assert_eq!((said.policy(), said.prefill, said.ttft_millis), (RolePolicy::Auto, 1, 500));
        assert_eq!(of(TargetArgs::default()).unwrap(), None);
        let never = of(TargetArgs { tpot: Some(Duration::ZERO), ..Default::default() });
        assert!(never.unwrap_err().to_string().contains("1ms"));
    }

    #[test]
    fn ratios_have_two_parts() {
        assert_eq!("2:5".parse(), Ok(Ratio { prefill: 2, decode: 5 }));
        for text in ["", "3", "0:1", "1:0", "1:2:3", "a:b", "-1:2"] {
            assert!(text.parse::<Ratio>().is_err(), "{text}");
        }
    }
}
