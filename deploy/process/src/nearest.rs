//! The known key that an unknown one was probably meant to be. Pure.

/// Below this likeness (0 to 1) a guess would mislead.
const LEAST_LIKENESS: f64 = 0.5;

/// The most alike of `known`. Dotted keys are compared whole and by their last part, so that a right name under the
/// wrong table is found too.
pub(crate) fn nearest<'a>(unknown: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |candidate: &str| {
        let whole = strsim::normalized_damerau_levenshtein(unknown, candidate);
        let last = strsim::normalized_damerau_levenshtein(leaf(unknown), leaf(candidate));
        0.5 * whole + 0.5 * last
    };
    known
        .into_iter()
        .map(|candidate| (likeness(candidate), candidate))
        .filter(|(score, _)| *score >= LEAST_LIKENESS)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn leaf(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_typos_and_misplaced_keys_and_stays_silent_otherwise() {
        let known = ["listen.http", "process.log.level", "process.log.format", "kv.block_tokens"];
        assert_eq!(nearest("process.log.levle", known), Some("process.log.level"));
        assert_eq!(nearest("log.level", known), Some("process.log.level"));
        assert_eq!(nearest("kv.blocktokens", known), Some("kv.block_tokens"));
        assert_eq!(nearest("zebra", known), None);
    }
}
