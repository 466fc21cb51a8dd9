//! Label selectors, as in `-l zone=a,tier!=spot,gpu,!draining`. Pure.

use std::str::FromStr;

use baton_proto::v1::Instance;

use super::error::CtlError;

/// All of its parts must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selector(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Is(String, String),
    IsNot(String, String),
    Has(String),
    HasNot(String),
}

impl Selector {
    pub(super) fn holds_for(&self, instance: &Instance) -> bool {
        let of = |key: &String| instance.spec.as_ref().and_then(|spec| spec.labels.get(key));
        self.0.iter().all(|part| match part {
            Part::Is(key, value) => of(key) == Some(value),
            Part::IsNot(key, value) => of(key) != Some(value),
            Part::Has(key) => of(key).is_some(),
            Part::HasNot(key) => of(key).is_none(),
        })
    }
}

impl FromStr for Selector {
    type Err = CtlError;

    fn from_str(text: &str) -> Result<Self, CtlError> {
        text.split(',').map(|part| parse(part.trim())).collect::<Result<_, _>>().map(Self)
    }
}

fn parse(text: &str) -> Result<Part, CtlError> {
    let own = |text: &str| text.trim().to_owned();
    let part = if let Some((key, value)) = text.split_once("!=") {
        Part::IsNot(own(key), own(value))
    } else if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        Part::Is(own(key), own(value))
    } else if let Some(key) = text.strip_prefix('!') {
        Part::HasNot(own(key))
    } else {
        Part::Has(own(text))
    };
    let (Part::Is(key, _) | Part::IsNot(key, _) | Part::Has(key) | Part::HasNot(key)) = &part;
    if key.is_empty() {
        let expected = "expected key=value, key!=value, key or !key, with commas between";
        return Err(CtlError::Selector(format!("`{text}` selects no label: {expected}")));
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::Phase;

    use super::*;
    use crate::ctl::instances::tests::instance;

    #[test]
    fn every_part_must_hold() {
        // Its labels are zone=a and name=server-0.
        let instance = instance("server-0", Phase::Ready);
        for text in
            ["zone=a", "zone==a", "zone=a,name=server-0", "zone", "!tier", "tier!=spot", "zone != b , name"]
        {
            assert!(text.parse::<Selector>().unwrap().holds_for(&instance), "{text}");
        }
        for text in ["zone=b", "zone=a,name=x", "tier", "!zone", "zone!=a"] {
            assert!(!text.parse::<Selector>().unwrap().holds_for(&instance), "{text}");
        }
    }

    #[test]
    fn what_selects_nothing_is_refused() {
        for text in ["", "=a", "!", "zone=a,"] {
            let error = text.parse::<Selector>().unwrap_err().to_string();
            assert!(error.contains("expected key=value"), "{error}");
        }
    }
}
