//! Sums of texts that a template prints, taken apart: `{{ 'a' + b }}` becomes `{{ 'a' }}{{ (b)|TERM }}`.
//!
//! Each `+` of a long text copies it twice, and published templates put three of them around a message. A sum that begins with
//! a text in quotes is a text, or an error: [`term`] makes the same error of what cannot be added to a text. Whatever else is
//! printed stays as it is.

use minijinja::{Environment, Error, ErrorKind, Value, value::ValueKind};

const TERM: &str = "__term";
/// They bind less than a sum, or are no expression's.
const LOOSE_WORDS: [&str; 7] = ["and", "else", "if", "in", "is", "not", "or"];

/// `source` with the sums taken apart, for an environment that was [made ready](make_ready).
pub(super) fn apart(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find('{') {
        let tag = &rest[open..];
        let length = match tag.as_bytes().get(1) {
            Some(b'{') => length(&tag[2..], "}}").map(|length| 2 + length),
            Some(b'%') => length(&tag[2..], "%}").map(|length| 2 + length),
            Some(b'#') => tag.find("#}").map(|at| at + 2),
            _ => Some(1),
        };
        // Without an end, or with text that only looks like tags.
        let Some(length) = length else { break };
        let tag = &tag[..length];
        if is_raw(tag) {
            break;
        }
        result.push_str(&rest[..open]);
        match tag.starts_with("{{").then(|| terms(tag)).flatten() {
            Some(printed) => result.push_str(&printed),
            None => result.push_str(tag),
        }
        rest = &rest[open + length..];
    }
    result.push_str(rest);
    result
}

/// Gives an environment what [`apart`] writes.
pub(super) fn make_ready(environment: &mut Environment<'static>) {
    environment.add_filter(TERM, term);
}

/// A text, which can be added to another.
fn term(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => Ok(value),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("a text and {kind} cannot be added"))),
    }
}

fn is_raw(tag: &str) -> bool {
    tag.starts_with("{%") && tag.trim_matches(['{', '%', '}', '-', '+', ' ', '\n']) == "raw"
}

/// How long it is up to and with `end`, which counts outside of quotes and brackets.
fn length(code: &str, end: &str) -> Option<usize> {
    let at = top_level(code).find(|(at, _)| code[*at..].starts_with(end))?;
    Some(at.0 + end.len())
}

/// What of an expression stands outside of quotes and brackets, and where. Of a quoted text its first quote stands there.
fn top_level(code: &str) -> impl Iterator<Item = (usize, char)> {
    let (mut quote, mut escaped, mut depth) = (None, false, 0_u32);
    code.char_indices().filter(move |&(_, character)| {
        if let Some(open) = quote {
            match character {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if character == open => quote = None,
                _ => {}
            }
            return false;
        }
        let outside = depth == 0;
        match character {
            '\'' | '"' => quote = Some(character),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        outside
    })
}

/// A sum that begins with a text in quotes, as terms that are printed one by one. `None`: it is something else.
fn terms(tag: &str) -> Option<String> {
    let inner = tag.strip_prefix("{{")?.strip_suffix("}}")?;
    let (before, inner) = inner.strip_prefix('-').map_or(("", inner), |inner| ("-", inner));
    let (behind, code) = inner.strip_suffix('-').map_or(("", inner), |inner| ("-", inner));
    let (mut terms, mut from) = (Vec::new(), 0);
    for (at, character) in top_level(code) {
        match character {
            '+' => {
                terms.push(code[from..at].trim());
                from = at + 1;
            }
            '-' | '<' | '>' | '=' | '!' | ',' | ':' => return None,
            _ => {}
        }
    }
    terms.push(code[from..].trim());
    let (first, others) = terms.split_first().filter(|(_, others)| !others.is_empty())?;
    if !is_quoted(first) || others.iter().any(|term| term.is_empty() || has_loose_word(term)) {
        return None;
    }
    let of_term = |term: &&str| {
        if is_quoted(term) { format!("{{{{ {term} }}}}") } else { format!("{{{{ ({term})|{TERM} }}}}") }
    };
    let printed: String = terms.iter().map(of_term).collect();
    let bare = printed.strip_prefix("{{")?.strip_suffix("}}")?;
    Some(format!("{{{{{before}{bare}{behind}}}}}"))
}

/// Whether it is a text in quotes, and nothing else.
fn is_quoted(term: &str) -> bool {
    let quoted = term.starts_with(['\'', '"']) && term.len() > 1;
    quoted && top_level(term).count() == 1 && term.ends_with(&term[..1])
}

fn has_loose_word(term: &str) -> bool {
    let mut outside = String::new();
    let mut next = 0;
    for (at, character) in top_level(term) {
        // What was left out between two words is no word of its own.
        if at != next {
            outside.push(' ');
        }
        outside.push(character);
        next = at + character.len_utf8();
    }
    outside
        .split(|character: char| !character.is_alphanumeric() && character != '_')
        .any(|word| LOOSE_WORDS.contains(&word))
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    #[test]
    fn sums_that_begin_with_a_text_are_printed_term_by_term() {
        for (source, expected) in [
            ("{{ 'a' + b }}", "{{ 'a' }}{{ (b)|__term }}"),
            (
                r#"x{{- "<|" + m['role'] + '\n' + m.content | trim + "'+'" -}} y"#,
                r#"x{{- "<|" }}{{ (m['role'])|__term }}{{ '\n' }}{{ (m.content | trim)|__term }}{{ "'+'" -}} y"#,
            ),
            ("{{'\\'+' + f(a + b, [c or d])}}", "{{ '\\'+' }}{{ (f(a + b, [c or d]))|__term }}"),
            ("{# {{ 'a' + b }} #}{{ 'ä' + b ~ 1 }}", "{# {{ 'a' + b }} #}{{ 'ä' }}{{ (b ~ 1)|__term }}"),
        ] {
            assert_eq!(apart(source), expected, "{source}");
        }
    }

    #[test]
    fn whatever_else_is_printed_stays() {
        for source in [
            "{{ b + 'a' }}{{ 'a' }}{{ b }}",
            "{{ 'a' + b if c else d }}{{ 'a' + b == 'ab' }}{{ 'a' + b in c }}{{ 'a' + b or c }}",
            "{{ 'a' + b, c }}{{ 'a' + }}{{ 'a'.x + b }}{{ 'a' ~ b + c }}{{ 'a' + b - c }}",
            "{% set a = 'a' + b %}{% if '{{' + a %}{% endif %}{ 'a' + b }",
            "{% raw %}{{ 'a' + b }}{% endraw %}{{ 'a' + b }}",
            "{{ {'a': {'b': 'c' + d}} }} {{ 'a' + b",
        ] {
            assert_eq!(apart(source), source);
        }
    }

    #[test]
    fn it_reads_the_same_and_what_is_no_text_is_refused_as_before() {
        let mut environment = Environment::new();
        make_ready(&mut environment);
        let context = context! { b => "B", n => 1, none => (), m => context! { c => " <C> " } };
        let render = |source: &str| {
            let render =
                |environment: &Environment<'_>, source: &str| environment.render_str(source, &context);
            (render(&environment, source), render(&environment, &apart(source)))
        };
        for source in ["[ {{- 'a' + b + m.c | trim + m['c'] -}} ]", "{{ 'a' + (b + 'c') + b ~ n }}"] {
            let (before, after) = render(source);
            assert_eq!(before.expect("renders"), after.expect("renders"), "{source}");
        }
        for source in [
            "{{ 'a' + n }}",
            "{{ 'a' + none }}",
            "{{ 'a' + b + unknown }}",
            "{{ 'a' + m }}",
            "{{ 'a' + [] }}",
        ] {
            let (before, after) = render(source);
            let (before, after) = (before.expect_err("cannot be added"), after.expect_err("cannot be added"));
            assert_eq!(before.kind(), after.kind(), "{source}: {after}");
        }
    }
}
