//! The four ways to show a list: a table, a wider one, JSON, YAML. Pure. Every kind of thing makes a [`Table`] of its
//! answers: cells for people beside whole objects for programs.

use serde_json::Value;

use super::error::CtlError;

/// How to show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Output {
    /// Columns for people.
    Table,
    /// More of them.
    Wide,
    /// All fields: an array, or one object where one is named; with --watch, an object on each line.
    Json,
    /// The same in YAML; with --watch, documents.
    Yaml,
}

/// A column's header, and what of it matters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    name: &'static str,
    /// Shown in wide tables only.
    wide: bool,
    /// Changes with time alone, which does not count as a change of its row.
    passing: bool,
}

impl Column {
    pub(super) const fn new(name: &'static str) -> Self {
        Self { name, wide: false, passing: false }
    }

    pub(super) const fn wide(name: &'static str) -> Self {
        Self { name, wide: true, passing: false }
    }

    pub(super) const fn passing(self) -> Self {
        Self { name: self.name, wide: self.wide, passing: true }
    }
}

/// One thing.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    /// By what it is the same thing later on.
    pub(super) key: String,
    /// By what it is asked for.
    pub(super) names: Vec<String>,
    /// As many as there are columns.
    pub(super) cells: Vec<String>,
    pub(super) object: Value,
}

/// Things of one kind.
#[derive(Debug)]
pub(super) struct Table {
    /// As in "instance".
    pub(super) kind: &'static str,
    /// What is said if there are none.
    pub(super) nothing: &'static str,
    pub(super) columns: &'static [Column],
    pub(super) rows: Vec<Row>,
}

impl Table {
    /// Only those that are named; all, if none is. A name that nothing has is an error.
    pub(super) fn only(mut self, names: &[String]) -> Result<Self, CtlError> {
        if names.is_empty() {
            return Ok(self);
        }
        if let Some(name) = names.iter().find(|name| !self.rows.iter().any(|row| row.names.contains(name))) {
            let mut known: Vec<String> = self.rows.iter().flat_map(|row| row.names.clone()).collect();
            known.sort();
            known.dedup();
            return Err(CtlError::Unknown { kind: self.kind, name: name.clone(), known });
        }
        self.rows.retain(|row| row.names.iter().any(|name| names.contains(name)));
        Ok(self)
    }

    /// All of it. `single` says that one thing was asked for, and so one object is given.
    pub(super) fn text(&self, output: Output, headers: bool, single: bool) -> String {
        let objects = || match self.rows.as_slice() {
            [row] if single => row.object.clone(),
            rows => rows.iter().map(|row| row.object.clone()).collect(),
        };
        match output {
            Output::Json => json(&objects()),
            Output::Yaml => yaml(&objects()),
            Output::Table | Output::Wide if self.rows.is_empty() => self.nothing.to_owned(),
            Output::Table | Output::Wide => {
                let mut layout = Layout::new(self.columns, output == Output::Wide);
                layout.text(&self.rows, headers)
            }
        }
    }

    /// What of a row counts as a change.
    pub(super) fn lasting(&self, row: &Row) -> Vec<String> {
        let lasting = row.cells.iter().zip(self.columns).filter(|(_, column)| !column.passing);
        lasting.map(|(cell, _)| cell.clone()).collect()
    }
}

/// Of the characters that terminals obey JSON may hold some as they are: they are written as their numbers.
pub(super) fn json(value: &Value) -> String {
    let text = format!("{value:#}");
    let obeyed = |c: char| c.is_control() && c != '\n';
    if !text.contains(obeyed) {
        return text;
    }
    let escaped = |c: char| if obeyed(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    text.chars().map(escaped).collect()
}

pub(super) fn yaml(value: &Value) -> String {
    // Fails for what JSON cannot hold either.
    serde_saphyr::to_string(value).unwrap_or_default().trim_end().to_owned()
}

/// Widths of columns, which only grow, so that rows that come later stand under those before them.
#[derive(Debug)]
pub(super) struct Layout {
    columns: &'static [Column],
    wide: bool,
    widths: Vec<usize>,
}

impl Layout {
    pub(super) fn new(columns: &'static [Column], wide: bool) -> Self {
        let widths = columns.iter().map(|column| column.name.len()).collect();
        Self { columns, wide, widths }
    }

    /// Lines without an end of line after the last.
    pub(super) fn text(&mut self, rows: &[Row], headers: bool) -> String {
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.cells.iter().map(|cell| visible(cell)).collect()).collect();
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let header = headers.then(|| self.columns.iter().map(|column| column.name.to_owned()).collect());
        let lines: Vec<String> = header.iter().chain(&rows).map(|cells| self.line(cells)).collect();
        lines.join("\n")
    }

    fn line(&self, cells: &[String]) -> String {
        let shown = cells.iter().zip(self.columns).zip(&self.widths);
        let shown = shown.filter(|((_, column), _)| self.wide || !column.wide);
        let padded: Vec<String> = shown.map(|((cell, _), width)| format!("{cell:width$}")).collect();
        padded.join("   ").trim_end().to_owned()
    }
}

/// On one line, and without what terminals obey: names and reasons come from elsewhere.
pub(super) fn visible(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: &[Column] =
        &[Column::new("NAME"), Column::new("AGE").passing(), Column::wide("MORE"), Column::new("WHY")];

    fn row(name: &str, why: &str) -> Row {
        let cells = vec![name.to_owned(), "1s".into(), "more".into(), why.to_owned()];
        Row { key: name.into(), names: vec![name.into()], cells, object: json!({"name": name, "on": true}) }
    }

    fn table(rows: Vec<Row>) -> Table {
        Table { kind: "thing", nothing: "no things", columns: COLUMNS, rows }
    }

    #[test]
    fn columns_stand_under_their_headers() {
        let table = table(vec![row("a", "x"), row("longer", "")]);
        assert_eq!(
            table.text(Output::Table, true, false),
            "NAME     AGE   WHY\na        1s    x\nlonger   1s"
        );
        assert_eq!(table.text(Output::Wide, false, false), "a        1s    more   x\nlonger   1s    more");
    }

    #[test]
    fn programs_get_an_array_or_the_one_object_they_named() {
        let one = table(vec![row("a", "")]);
        assert_eq!(
            one.text(Output::Json, true, false),
            "[\n  {\n    \"name\": \"a\",\n    \"on\": true\n  }\n]"
        );
        assert_eq!(one.text(Output::Yaml, true, true), "name: a\n\"on\": true");
        assert_eq!(table(vec![]).text(Output::Json, true, false), "[]");
        assert_eq!(table(vec![]).text(Output::Table, true, false), "no things");
    }

    #[test]
    fn yaml_keeps_texts_texts() {
        let odd = json!({"version": "1.10", "yes": "no", "hash": "0x1f", "lines": "a\nb", "none": null, "count": 7});
        let text = yaml(&odd);
        for line in ["version: \"1.10\"", "\"0x1f\"", "count: 7", "none: null"] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(text.contains("\"no\"") || text.contains("'no'"), "{text}");
    }

    #[test]
    fn names_choose_rows_and_unknown_ones_are_an_error() {
        let two = || table(vec![row("a", ""), row("b", "")]);
        assert_eq!(two().only(&["b".into()]).unwrap().rows, [row("b", "")]);
        assert_eq!(two().only(&[]).unwrap().rows.len(), 2);
        let text = two().only(&["a".into(), "c".into()]).unwrap_err().to_string();
        assert_eq!(text, "no thing is called c: there are a, b");
    }

    #[test]
    fn what_comes_from_elsewhere_does_not_move_the_cursor() {
        assert!(!table(vec![row("a", "\u{1b}[2J\nx")]).text(Output::Table, true, false).contains('\u{1b}'));
        assert_eq!(visible("a\tb\nc"), "a b c");
    }

    #[test]
    fn widths_only_grow() {
        let mut layout = Layout::new(COLUMNS, false);
        layout.text(&[row("longer", "x")], true);
        assert_eq!(layout.text(&[row("a", "x")], false), "a        1s    x");
    }
}
