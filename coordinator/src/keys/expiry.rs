//! When a key ends, as it is written in a file: a day or a time, in UTC. Pure.

use toml::value::{Date, Datetime, Offset, Time};

/// Seconds since 1970. A day stands for its beginning. None if it says no day, or a time of no known place.
pub(super) fn unix_seconds(at: &Datetime) -> Option<u64> {
    let Datetime { date: Some(date), time, offset } = at else { return None };
    let time = match (time, offset) {
        (None, None) => 0,
        (Some(time), Some(Offset::Z)) => seconds(time),
        (Some(time), Some(Offset::Custom { minutes })) => seconds(time) - i64::from(*minutes) * 60,
        (Some(_), None) | (None, Some(_)) => return None,
    };
    u64::try_from(days(*date) * 86_400 + time).ok()
}

fn seconds(time: &Time) -> i64 {
    let part = |part: Option<u8>| i64::from(part.unwrap_or(0));
    i64::from(time.hour) * 3600 + i64::from(time.minute) * 60 + part(time.second)
}

/// Since 1970-01-01, by the Gregorian calendar: years are counted from March, so that a leap day is the last of its year.
fn days(date: Date) -> i64 {
    let (year, month, day) = (i64::from(date.year), i64::from(date.month), i64::from(date.day));
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year / 4 - year / 100 + year / 400;
    // Of the months since March: 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31.
    let before_month = (153 * month + 2) / 5;
    // From the first of March of year 0 to 1970.
    const TO_1970: i64 = 719_468;
    year * 365 + leap_days + before_month + day - 1 - TO_1970
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_times_are_those_of_the_calendar() {
        // What `date -u -d ... +%s` says.
        for (text, seconds) in [
            ("1970-01-01", 0),
            ("2000-02-29", 951_782_400),
            ("2000-03-01", 951_868_800),
            ("2026-11-27", 1_795_737_600),
            ("2027-01-31T18:00:00Z", 1_801_418_400),
            ("2027-01-31T19:00:00+01:00", 1_801_418_400),
            ("2100-02-28T23:59:59Z", 4_107_542_399),
            ("2100-03-01", 4_107_542_400),
            ("2400-02-29T00:00:00-00:30", 13_574_565_000),
        ] {
            let at: Datetime = text.parse().expect("a time");
            assert_eq!(unix_seconds(&at), Some(seconds), "{text}");
        }
        for text in ["2027-01-31T18:00:00", "18:00:00", "1969-12-31"] {
            let at: Datetime = text.parse().expect("a time");
            assert_eq!(unix_seconds(&at), None, "{text}");
        }
    }
}
