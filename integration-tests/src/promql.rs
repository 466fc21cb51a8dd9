//! Reads expressions for Prometheus as far as names go: which metrics they ask for, and by which labels.

use std::collections::BTreeSet;

/// What an expression names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub metrics: BTreeSet<String>,
    /// In matchers, and after `by`, `on` and `group_left`.
    pub labels: BTreeSet<String>,
}

/// Metrics are those of Baton's processes, and what Prometheus itself says of them.
pub fn names(expression: &str) -> Names {
    let mut names = Names::default();
    let code = without_strings(expression);
    let mut rest = code.as_str();
    let mut before = "";
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '(' || c == '{') {
        rest = &rest[start..];
        let closing = if rest.starts_with('(') { ')' } else { '}' };
        let group = matches!(before, "by" | "on" | "group_left") && rest.starts_with('(');
        if group || rest.starts_with('{') {
            let inner = rest[1..].split(closing).next().unwrap_or_default();
            let label = |part: &str| part.split(['=', '!']).next().unwrap_or_default().trim().to_owned();
            names.labels.extend(inner.split(',').map(label).filter(|label| !label.is_empty()));
            (rest, before) = (&rest[inner.len() + 2..], "");
            continue;
        }
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
        before = &rest[..end];
        if is_metric(before) {
            names.metrics.insert(before.to_owned());
        }
        rest = &rest[end.max(1)..];
    }
    names
}

/// Whether a word is the name of a metric.
pub fn is_metric(word: &str) -> bool {
    const OF_SERVICES: [&str; 7] = [
        "baton_controller_",
        "baton_coordinator_",
        "baton_server_",
        "baton_tls_",
        "baton_grpc_",
        "baton_http_",
        "process_",
    ];
    let own = |prefix: &&str| word.strip_prefix(*prefix).is_some_and(|own| !own.is_empty());
    matches!(word, "up" | "ALERTS" | "baton_ready") || OF_SERVICES.iter().any(own)
}

/// The expression with nothing between its quotes.
fn without_strings(expression: &str) -> String {
    let parts = expression.split('"').enumerate();
    parts.map(|(number, part)| if number % 2 == 0 { part } else { "\"\"" }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_and_labels_are_found_wherever_they_stand() {
        let expression = r#"1 - sum by (model, code) (rate(baton_coordinator_requests_total{route!="/v1, up{a=b}", code=~"a|b"}[5m]))
            / on (instance) group_left () up{job=~"baton.*"} > 0"#;
        let all = |words: &str| words.split(' ').map(str::to_owned).collect();
        let expected = Names {
            metrics: all("baton_coordinator_requests_total up"),
            labels: all("code instance job model route"),
        };
        assert_eq!(names(expression), expected);
    }
}
