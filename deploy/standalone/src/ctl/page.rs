//! Text with labelled facts in sections, as `describe` and `explain` print it. Pure.

use super::output::visible;

/// Columns that labels take.
const LABEL: usize = 20;

/// Lines so far.
#[derive(Debug, Default)]
pub(super) struct Page {
    lines: Vec<String>,
    /// Set under a section's title.
    indent: &'static str,
}

impl Page {
    /// What follows stands under this title.
    pub(super) fn section(&mut self, title: &str) {
        if !self.lines.is_empty() {
            self.lines.push(String::new());
        }
        self.lines.push(visible(title));
        self.indent = "  ";
    }

    pub(super) fn fact(&mut self, label: &str, value: impl AsRef<str>) {
        let value = visible(value.as_ref());
        self.lines
            .push(format!("{}{:LABEL$} {value}", self.indent, format!("{label}:")).trim_end().to_owned());
    }

    /// A label once, and a value on each line; "-" if there are none.
    pub(super) fn facts(&mut self, label: &str, values: &[String]) {
        self.fact(label, values.first().map_or("-", String::as_str));
        for value in values.iter().skip(1) {
            let value = visible(value);
            self.lines.push(format!("{}{:LABEL$} {value}", self.indent, ""));
        }
    }

    /// Lines as they are, under the title.
    pub(super) fn text(&mut self, text: &str) {
        self.lines.extend(text.lines().map(|line| format!("{}{}", self.indent, visible(line))));
    }

    pub(super) fn end(self) -> String {
        self.lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_in_a_column() {
        let mut page = Page::default();
        page.fact("Name", "a");
        page.section("More");
        page.facts("Labels", &["x=1".into(), "y=\u{1b}2".into()]);
        page.facts("None", &[]);
        page.text("one\ntwo");
        let expected = "Name:                a\n\nMore\n  Labels:              x=1\n                       y= 2\n  None:                -\n  one\n  two";
        assert_eq!(page.end(), expected);
    }
}
