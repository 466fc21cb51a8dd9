//! Durations in configuration: `"250ms"`, `"2s"`, `"1m"`, `"1h"`. Use as `#[serde(with = "baton_process::duration")]` and
//! `#[schemars(schema_with = "baton_process::duration::schema")]`.

use std::time::Duration;

use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serializer, de::Error};

const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// Reads a duration; the error says what is expected.
pub fn parse(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let expected = || {
        format!("`{text}` is not a duration; expected a whole number and a unit, as in 250ms, 2s, 1m or 1h")
    };
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(expected)?;
    let number: u64 = text[..split].parse().map_err(|_| expected())?;
    let (_, millis) = UNITS.iter().find(|(unit, _)| *unit == text[split..].trim()).ok_or_else(expected)?;
    number.checked_mul(*millis).map(Duration::from_millis).ok_or_else(expected)
}

/// Writes a duration in the largest unit that holds it exactly. Finer than a millisecond is cut off.
pub fn format(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    match UNITS.iter().rev().find(|(_, unit)| millis > 0 && millis.is_multiple_of(*unit)) {
        Some((name, unit)) => format!("{}{name}", millis / unit),
        None => "0s".to_owned(),
    }
}

pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*duration))
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
}

/// Text that [`parse`] reads.
pub fn schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "pattern": "^\\s*[0-9]+\\s*(ms|s|m|h)\\s*$" })
}

/// Durations that may be left open: `""` = `None`. Use as `#[serde(with = "baton_process::duration::option")]`.
pub mod option {
    use std::time::Duration;

    use schemars::{Schema, SchemaGenerator, json_schema};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&duration.map(super::format).unwrap_or_default())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        match String::deserialize(deserializer)?.trim() {
            "" => Ok(None),
            text => super::parse(text).map(Some).map_err(D::Error::custom),
        }
    }

    /// Text that [`super::parse`] reads, or none.
    pub fn schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^\\s*([0-9]+\\s*(ms|s|m|h)\\s*)?$" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_the_same_durations() {
        for text in ["250ms", "2s", "1m", "90s", "1h", "0s", "1001ms"] {
            assert_eq!(format(parse(text).unwrap()), text);
        }
        assert_eq!(parse("60s").unwrap(), parse("1m").unwrap());
    }

    #[test]
    fn refuses_what_has_no_unit_or_no_number() {
        for text in ["5", "s", "", "-1s", "1.5s", "2 days", "99999999999999999999s", "18446744073709551615h"]
        {
            assert!(parse(text).unwrap_err().contains("expected a whole number and a unit"), "{text}");
        }
    }
}
