//! What the beginning of a body says: which model it asks, if it says so before anything long.

use std::{borrow::Cow, fmt};

use serde::{
    Deserializer as _,
    de::{IgnoredAny, MapAccess, Visitor},
};

/// The name in the field `model` of a body of which so much has come; `None`: it has not come yet, or is none.
pub fn asked_model(begun: &[u8]) -> Option<String> {
    let mut found = None;
    // That it breaks off is an error, found or not.
    let _ = serde_json::Deserializer::from_slice(begun).deserialize_map(Looking(&mut found));
    found
}

struct Looking<'a>(&'a mut Option<String>);

impl<'de> Visitor<'de> for Looking<'_> {
    type Value = ();

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("a request")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            if key == "model" {
                *self.0 = Some(map.next_value()?);
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_found_if_all_before_it_has_come() {
        for (begun, found) in [
            (r#"{"model": "a\u0062", "messages": [{"role": "us"#, Some("ab")),
            (r#" {"stream":true,"stop":["x","model"],"model":"m","prompt":"long "#, Some("m")),
            (r#"{"model": "b"}"#, Some("b")),
            (r#"{"messages": [{"model": "inner"}, "#, None),
            (r#"{"model": "half of"#, None),
            (r#"{"model": 7, "prompt": "x"#, None),
            (r#"["model", "m"]"#, None),
            ("", None),
            ("\u{0}", None),
        ] {
            assert_eq!(asked_model(begun.as_bytes()).as_deref(), found, "{begun}");
        }
        // However deep it goes.
        let deep = format!("{{\"a\": {}", "[".repeat(100_000));
        assert_eq!(asked_model(deep.as_bytes()), None);
    }
}
