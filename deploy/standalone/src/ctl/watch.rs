//! `get --watch`: looks again each second and prints the rows that are not as they were.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use super::output::{Column, Layout, Output, Row, Table, yaml};
use crate::screen::say_if_read;

/// How often a list is looked at.
pub(super) const EVERY: Duration = Duration::from_secs(1);

/// What was seen last.
#[derive(Debug, Default)]
pub(super) struct Watched {
    rows: BTreeMap<String, (Vec<String>, Row)>,
}

impl Watched {
    /// Rows that are new or changed, as they are now, and those that are gone, as they were and saying so.
    pub(super) fn changes(&mut self, table: &Table) -> Vec<Row> {
        let mut changed = Vec::new();
        let mut before = std::mem::take(&mut self.rows);
        for row in &table.rows {
            let lasting = table.lasting(row);
            if before.remove(&row.key).is_none_or(|(before, _)| before != lasting) {
                changed.push(row.clone());
            }
            self.rows.insert(row.key.clone(), (lasting, row.clone()));
        }
        changed.extend(before.into_values().map(|(_, row)| gone(row)));
        changed
    }
}

fn gone(mut row: Row) -> Row {
    // What it is called stands in front: a link has two names.
    if let Some(cell) = row.cells.get_mut(row.names.len()) {
        *cell = "(gone)".to_owned();
    }
    if let Value::Object(object) = &mut row.object {
        object.insert("gone".to_owned(), Value::Bool(true));
    }
    row
}

/// Prints rows one after the other, under one header.
#[derive(Debug)]
pub(super) struct Printer {
    layout: Layout,
    output: Output,
    headers: bool,
}

impl Printer {
    pub(super) fn new(columns: &'static [Column], output: Output, headers: bool) -> Self {
        Self { layout: Layout::new(columns, output == Output::Wide), output, headers }
    }

    /// Whether somebody still reads.
    pub(super) fn print(&mut self, rows: &[Row]) -> bool {
        rows.is_empty() || say_if_read(&self.text(rows))
    }

    fn text(&mut self, rows: &[Row]) -> String {
        let each = |text: &dyn Fn(&Row) -> String| rows.iter().map(text).collect::<Vec<_>>().join("\n");
        match self.output {
            Output::Json => each(&|row| row.object.to_string()),
            Output::Yaml => each(&|row| format!("---\n{}", yaml(&row.object))),
            Output::Table | Output::Wide => {
                let headers = std::mem::take(&mut self.headers);
                self.layout.text(rows, headers)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: &[Column] = &[Column::new("NAME"), Column::new("STATE"), Column::new("AGE").passing()];

    fn table(rows: &[[&str; 3]]) -> Table {
        let row = |cells: &[&str; 3]| Row {
            key: cells[0].to_owned(),
            names: vec![cells[0].to_owned()],
            cells: cells.iter().map(|&cell| cell.to_owned()).collect(),
            object: json!({"name": cells[0]}),
        };
        Table { kind: "thing", nothing: "", columns: COLUMNS, rows: rows.iter().map(row).collect() }
    }

    #[test]
    fn only_rows_that_changed_are_printed() {
        let mut watched = Watched::default();
        let mut printer = Printer::new(COLUMNS, Output::Table, true);
        let mut see = |rows: &[[&str; 3]]| {
            let changes = watched.changes(&table(rows));
            printer.text(&changes)
        };
        assert_eq!(
            see(&[["a", "on", "1s"], ["b", "on", "1s"]]),
            "NAME   STATE   AGE\na      on      1s\nb      on      1s"
        );
        assert_eq!(see(&[["a", "on", "2s"], ["b", "off", "2s"]]), "b      off     2s");
        assert_eq!(see(&[["a", "on", "3s"], ["b", "off", "3s"]]), "");
        assert_eq!(see(&[["a", "on", "4s"]]), "b      (gone)   3s");
        assert_eq!(see(&[["a", "on", "4s"], ["b", "on", "4s"]]), "b      on       4s");
    }

    #[test]
    fn a_link_that_is_gone_keeps_both_of_its_names() {
        let names = ["a".to_owned(), "b".to_owned()].to_vec();
        let row = Row {
            key: "a -> b".into(),
            cells: [&names[..], &["7".into()]].concat(),
            names,
            object: json!({}),
        };
        assert_eq!(gone(row).cells, ["a", "b", "(gone)"]);
    }

    #[test]
    fn programs_get_an_object_a_line() {
        let mut watched = Watched::default();
        watched.changes(&table(&[["a", "on", ""], ["b", "on", ""]]));
        let changes = watched.changes(&table(&[["a", "off", ""]]));
        let mut printer = Printer::new(COLUMNS, Output::Json, true);
        assert_eq!(printer.text(&changes), "{\"name\":\"a\"}\n{\"gone\":true,\"name\":\"b\"}");
        let mut printer = Printer::new(COLUMNS, Output::Yaml, true);
        assert_eq!(printer.text(&changes[..1]), "---\nname: a");
    }
}
