//! Reads Prometheus text, as a scraper would.

/// What a server holds for requests: nothing once all have ended.
pub const HELD_BY_SERVERS: [&str; 6] = [
    "baton_server_kv_blocks_used",
    "baton_server_sequences_running",
    "baton_server_sequences_waiting",
    "baton_server_transfers_in_active",
    "baton_server_transfers_out_active",
    "baton_server_transfer_offers_held",
];

/// Sum of a metric over all its label sets that contain `label` (empty = all); `None` if there is no such sample.
pub fn sum(text: &str, name: &str, label: &str) -> Option<f64> {
    let samples: Vec<f64> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter(|(series, _)| series.split('{').next() == Some(name) && series.contains(label))
        .filter_map(|(_, value)| value.parse().ok())
        .collect();
    (!samples.is_empty()).then(|| samples.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn sums_matching_samples_only() {
        let text = "# TYPE a counter\na{x=\"1\"} 2\na{x=\"2\"} 3.5\nab 7\n";
        assert_eq!(sum(text, "a", ""), Some(5.5));
        assert_eq!(sum(text, "a", "x=\"2\""), Some(3.5));
        assert_eq!(sum(text, "b", ""), None);
    }
}
