//! `get links`: how KV caches travel between instances, over all coordinators. Pure.

use baton_proto::v1::{Link, ListLinksResponse};
use serde_json::{Value, json};

use super::{
    output::{Column, Row, Table},
    words::micros,
};

const COLUMNS: &[Column] = &[
    Column::new("PREFILL"),
    Column::new("DECODE"),
    Column::new("HANDOFFS"),
    Column::new("FAILURES"),
    Column::new("MEAN"),
    Column::new("HEALTH"),
    Column::wide("FAILED"),
];

pub(super) fn table(mut links: Vec<Link>) -> Table {
    links.sort_by(|a, b| {
        (&a.prefill_instance, &a.decode_instance).cmp(&(&b.prefill_instance, &b.decode_instance))
    });
    Table {
        kind: "instance with a link",
        nothing: "no KV cache has travelled yet",
        columns: COLUMNS,
        rows: links.iter().map(row).collect(),
    }
}

/// As in "server-0 -> server-1".
pub(super) fn name(link: &Link) -> String {
    format!("{} -> {}", link.prefill_instance, link.decode_instance)
}

/// How many of its handoffs failed, as in "25.0%".
pub(super) fn failed(link: &Link) -> String {
    match link.handoffs.saturating_add(link.failures) {
        0 => "-".to_owned(),
        all => format!("{:.1}%", 100.0 * link.failures as f64 / all as f64),
    }
}

fn row(link: &Link) -> Row {
    let cells = vec![
        link.prefill_instance.clone(),
        link.decode_instance.clone(),
        link.handoffs.to_string(),
        link.failures.to_string(),
        micros(link.mean_micros),
        health(link),
        failed(link),
    ];
    Row {
        key: name(link),
        names: vec![link.prefill_instance.clone(), link.decode_instance.clone()],
        cells,
        object: object(link),
    }
}

/// As in "degraded: 40 % fail of late".
pub(super) fn health(link: &Link) -> String {
    if link.degraded {
        format!("degraded: {:.0} % fail of late", link.failing * 100.0)
    } else {
        "-".to_owned()
    }
}

/// Said beside a list of links that is not whole; none if it is.
pub(super) fn left_out(answer: &ListLinksResponse) -> Option<String> {
    let (shown, left_out) = (answer.links.len(), answer.left_out);
    (left_out > 0).then(|| format!("{left_out} more links are left out; shown are the {shown} used most"))
}

fn object(link: &Link) -> Value {
    json!({
        "prefill_instance": link.prefill_instance,
        "decode_instance": link.decode_instance,
        "handoffs": link.handoffs,
        "failures": link.failures,
        "mean_micros": link.mean_micros,
        "degraded": link.degraded,
        "failing": link.failing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_by_either_end() {
        let link = |from: &str, to: &str| Link {
            prefill_instance: from.into(),
            decode_instance: to.into(),
            handoffs: 3,
            failures: 1,
            mean_micros: 12_345,
            degraded: to == "d",
            failing: 0.4,
        };
        let all = table(vec![link("b", "c"), link("a", "c"), link("a", "d")]);
        assert_eq!(all.rows[0].cells, ["a", "c", "3", "1", "12.3ms", "-", "25.0%"]);
        assert_eq!(all.rows[1].cells[5], "degraded: 40 % fail of late");
        let of_c = all.only(&["c".into()]).unwrap();
        let mut answer = ListLinksResponse { links: vec![link("a", "c")], left_out: 0 };
        assert_eq!(left_out(&answer), None);
        answer.left_out = 7;
        let said = "7 more links are left out; shown are the 1 used most";
        assert_eq!(left_out(&answer).as_deref(), Some(said));
        assert_eq!(of_c.rows.iter().map(|row| row.key.as_str()).collect::<Vec<_>>(), ["a -> c", "b -> c"]);
    }
}
