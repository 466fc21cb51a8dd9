//! How values of the wire read: roles, phases, ages, times. Pure; [`super::output`] and the pages of `describe` are made
//! of these words.

use std::time::{SystemTime, UNIX_EPOCH};

use baton_proto::v1::{Cordoned, InstanceBeat, Intent, Phase, Role, RolePolicy, Targets};

/// As in "prefill"; what this build does not know is "unknown".
pub(crate) fn role(role: i32) -> String {
    let known = baton_proto::Role::from_wire(role).map(baton_proto::Role::name);
    if role == Role::Unspecified as i32 { "-".to_owned() } else { known.unwrap_or("unknown").to_owned() }
}

/// As in "loading".
pub(crate) fn phase(phase: i32) -> String {
    let known = baton_proto::Phase::from_wire(phase).map(baton_proto::Phase::name);
    if phase == Phase::Unspecified as i32 { "-".to_owned() } else { known.unwrap_or("unknown").to_owned() }
}

/// The phase, and how far a load has come.
pub(super) fn doing(beat: &InstanceBeat) -> String {
    match beat.phase() {
        Phase::Loading => format!("loading {}%", beat.load_permille / 10),
        phase_now => phase(phase_now.into()),
    }
}

/// As in "auto".
pub(super) fn policy(policy: i32) -> &'static str {
    match RolePolicy::try_from(policy) {
        Ok(RolePolicy::Unspecified) => "-",
        Ok(RolePolicy::Ratio) => "ratio",
        Ok(RolePolicy::Auto) => "auto",
        Err(_) => "unknown",
    }
}

/// What counts under the policy, as in "ratio 1:3" or "auto, TTFT 500ms, TPOT 50ms".
pub(super) fn targets(targets: &Targets) -> String {
    let Targets { prefill, decode, ttft_millis, tpot_millis, .. } = targets;
    let name = policy(targets.policy);
    let ratio = if *prefill > 0 || *decode > 0 { format!("{prefill}:{decode}") } else { String::new() };
    if targets.policy() == RolePolicy::Ratio {
        return format!("{name} {ratio}").trim_end().to_owned();
    }
    let part =
        |name: &str, millis: u32| if millis > 0 { format!(", {name} {millis}ms") } else { String::new() };
    format!("{name}{}{}", part("TTFT", *ttft_millis), part("TPOT", *tpot_millis))
}

/// As in "cordoned by alice: disk" or "pinned to decode"; "-" without any.
pub(super) fn intent(intent: Option<&Intent>) -> String {
    let Some(intent) = intent else { return "-".to_owned() };
    let by = &intent.pinned_by;
    let by = if by.is_empty() { String::new() } else { format!(" by {by}") };
    let pinned =
        (intent.pinned() != Role::Unspecified).then(|| format!("pinned to {}{by}", role(intent.pinned)));
    let parts: Vec<String> = intent.cordoned.as_ref().map(cordoned).into_iter().chain(pinned).collect();
    if parts.is_empty() { "-".to_owned() } else { parts.join("; ") }
}

fn cordoned(cordoned: &Cordoned) -> String {
    let by = if cordoned.by.is_empty() { String::new() } else { format!(" by {}", cordoned.by) };
    let why = if cordoned.reason.is_empty() { String::new() } else { format!(": {}", cordoned.reason) };
    format!("cordoned{by}{why}")
}

/// In seconds, with as many digits as matter; longer times in minutes, hours, days.
pub(super) fn age(millis: u64) -> String {
    match millis {
        0..10_000 => format!("{}.{}s", millis / 1000, millis % 1000 / 100),
        10_000..600_000 => format!("{}s", millis / 1000),
        600_000..10_800_000 => format!("{}m", millis / 60_000),
        10_800_000..259_200_000 => format!("{}h", millis / 3_600_000),
        _ => format!("{}d", millis / 86_400_000),
    }
}

/// How long ago; "-" for a time that was never set.
pub(super) fn since(unix_millis: u64, now: u64) -> String {
    if unix_millis == 0 { "-".to_owned() } else { age(now.saturating_sub(unix_millis)) }
}

/// As in "2025-11-26T15:38:36Z"; "-" for a time that was never set.
pub(super) fn time(unix_millis: u64) -> String {
    if unix_millis == 0 {
        return "-".to_owned();
    }
    let seconds = unix_millis / 1000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // H. Hinnant, "chrono-compatible low-level date algorithms": years begin in March, so that leap days end them.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

/// Milliseconds with a digit where it matters; "cannot keep up" for infinity.
pub(super) fn millis(value: f64) -> String {
    match value {
        value if !value.is_finite() => "cannot keep up".to_owned(),
        value if value < 10.0 => format!("{value:.2}ms"),
        value if value < 100.0 => format!("{value:.1}ms"),
        value if value < 10_000.0 => format!("{value:.0}ms"),
        value => format!("{:.1}s", value / 1000.0),
    }
}

/// Microseconds as [`millis`]; "-" for what was never measured.
pub(super) fn micros(value: u64) -> String {
    if value == 0 { "-".to_owned() } else { millis(value as f64 / 1000.0) }
}

pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

pub(super) fn now_unix_millis() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let ages = [0, 1_250, 9_999, 61_000, 3_600_000, 11_000_000, 864_000_000].map(age);
        assert_eq!(ages, ["0.0s", "1.2s", "9.9s", "61s", "60m", "3h", "10d"]);
        assert_eq!((since(0, 5), since(1_000, 3_000)), ("-".to_owned(), "2.0s".to_owned()));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        let times = [1_000, 951_782_399_000, 951_782_400_000, 1_764_171_516_999, 4_107_542_400_000].map(time);
        let wanted = [
            "1970-01-01T00:00:01Z",
            "2000-02-28T23:59:59Z",
            "2000-02-29T00:00:00Z",
            "2025-11-26T15:38:36Z",
            "2100-03-01T00:00:00Z",
        ];
        assert_eq!(times, wanted);
    }

    #[test]
    fn targets_say_what_counts() {
        let both = Targets { policy: 1, prefill: 1, decode: 3, ttft_millis: 500, tpot_millis: 50 };
        assert_eq!(targets(&both), "ratio 1:3");
        assert_eq!(targets(&Targets { policy: 2, ..both }), "auto, TTFT 500ms, TPOT 50ms");
        assert_eq!(targets(&Targets::default()), "-");
    }

    #[test]
    fn intents_name_who_and_why() {
        let by_alice = Cordoned { by: "alice".into(), reason: "disk".into(), ..Default::default() };
        let both = Intent { cordoned: Some(by_alice), pinned: Role::Decode.into(), pinned_by: "bob".into() };
        assert_eq!(intent(Some(&both)), "cordoned by alice: disk; pinned to decode by bob");
        assert_eq!(
            intent(Some(&Intent { cordoned: Some(Cordoned::default()), ..Default::default() })),
            "cordoned"
        );
        assert_eq!(intent(Some(&Intent::default())), "-");
    }

    #[test]
    fn what_this_build_does_not_know_is_unknown() {
        assert_eq!((role(99), phase(99), policy(99)), ("unknown".into(), "unknown".into(), "unknown"));
    }

    #[test]
    fn milliseconds_have_the_digits_that_matter() {
        let read = [0.4, 12.34, 345.6, 12_000.0, f64::INFINITY].map(millis);
        assert_eq!(read, ["0.40ms", "12.3ms", "346ms", "12.0s", "cannot keep up"]);
    }
}
