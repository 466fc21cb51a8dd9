//! `get links`: how KV caches travel between instances, over all coordinators. Pure.

use baton_proto::v1::Link;
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

fn row(link: &Link) -> Row {
    let share = if link.handoffs + link.failures > 0 {
        format!("{:.1}%", 100.0 * link.failures as f64 / (link.handoffs + link.failures) as f64)
    } else {
        "-".to_owned()
    };
    let cells = vec![
        link.prefill_instance.clone(),
        link.decode_instance.clone(),
        link.handoffs.to_string(),
        link.failures.to_string(),
        micros(link.mean_micros),
        share,
    ];
    Row {
        key: format!("{} -> {}", link.prefill_instance, link.decode_instance),
        names: vec![link.prefill_instance.clone(), link.decode_instance.clone()],
        cells,
        object: object(link),
    }
}

fn object(link: &Link) -> Value {
    json!({
        "prefill_instance": link.prefill_instance,
        "decode_instance": link.decode_instance,
        "handoffs": link.handoffs,
        "failures": link.failures,
        "mean_micros": link.mean_micros,
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
        };
        let all = table(vec![link("b", "c"), link("a", "c"), link("a", "d")]);
        assert_eq!(all.rows[0].cells, ["a", "c", "3", "1", "12.3ms", "25.0%"]);
        let of_c = all.only(&["c".into()]).unwrap();
        assert_eq!(of_c.rows.iter().map(|row| row.key.as_str()).collect::<Vec<_>>(), ["a -> c", "b -> c"]);
    }
}
