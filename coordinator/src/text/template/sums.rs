//! Sums of texts that a template prints, taken apart: `{{ 'a' + b }}` becomes `{{ 'a' }}{{( b)|__term }}`.
//!
//! Each `+` of a long text copies it twice, and published templates put three of them around a message. A sum that begins with
//! a text in quotes is a text, or an error: [`term`] makes an error of the same kind of what cannot be added to a text. Whatever
//! else is printed stays as it is.

use std::ops::Range;

use minijinja::{
    Environment, Error, ErrorKind, Value,
    machinery::{Span, Token, tokenize},
    syntax::SyntaxConfig,
    value::ValueKind,
};

const TERM: &str = "__term";
/// What binds less than a sum.
const LOOSE_WORDS: [&str; 7] = ["and", "else", "if", "in", "is", "not", "or"];
/// A sum may be escaped otherwise than its terms are.
const ESCAPES: &str = "autoescape";

/// `source` with the sums taken apart, for an environment of this syntax that was [made ready](make_ready). What is no template
/// stays as it is, too.
pub(super) fn apart(source: &str, syntax: &SyntaxConfig) -> String {
    let mut result = String::with_capacity(source.len());
    let (mut copied, mut sum) = (0, None);
    for token in tokenize(source, false, syntax.clone()) {
        match (token, &mut sum) {
            (Err(_) | Ok((Token::Ident(ESCAPES), _)), _) => return source.to_owned(),
            (Ok((Token::VariableStart, _)), sum) => *sum = Some(Sum::default()),
            (Ok((Token::VariableEnd, _)), sum) => {
                for (place, text) in sum.take().and_then(Sum::edits).into_iter().flatten() {
                    result.push_str(&source[copied..place.start]);
                    result.push_str(&text);
                    copied = place.end;
                }
            }
            (Ok((token, span)), Some(sum)) => sum.add(&token, span),
            (Ok(_), None) => {}
        }
    }
    result.push_str(&source[copied..]);
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

/// What is printed, as far as it has been read.
#[derive(Default)]
struct Sum {
    /// How many brackets are open.
    depth: usize,
    /// It is something else.
    other: bool,
    terms: Vec<Term>,
    /// Where each `+` between two of them is.
    signs: Vec<Range<usize>>,
}

#[derive(Default)]
struct Term {
    tokens: usize,
    /// The last of them is a text in quotes.
    quoted: bool,
    ends: usize,
}

impl Term {
    /// A text in quotes, and nothing else.
    fn is_quoted(&self) -> bool {
        self.tokens == 1 && self.quoted
    }
}

impl Sum {
    fn add(&mut self, token: &Token<'_>, span: Span) {
        let place = span.start_offset as usize..span.end_offset as usize;
        if self.terms.is_empty() {
            self.terms.push(Term::default());
        }
        match token {
            Token::BracketOpen | Token::ParenOpen | Token::BraceOpen => self.depth += 1,
            Token::BracketClose | Token::ParenClose | Token::BraceClose => {
                self.depth = self.depth.saturating_sub(1);
            }
            _ if self.depth > 0 => {}
            Token::Plus => {
                self.signs.push(place);
                return self.terms.push(Term::default());
            }
            Token::Minus | Token::Comma | Token::Colon | Token::Assign => self.other = true,
            Token::Eq | Token::Ne | Token::Gt | Token::Gte | Token::Lt | Token::Lte => self.other = true,
            Token::Ident(word) if LOOSE_WORDS.contains(word) => self.other = true,
            _ => {}
        }
        if let Some(term) = self.terms.last_mut() {
            term.tokens += 1;
            term.quoted = matches!(token, Token::Str(_) | Token::String(_));
            term.ends = place.end;
        }
    }

    /// What is to be written where, so that each term is printed by itself; `None`: it is something else.
    fn edits(self) -> Option<Vec<(Range<usize>, String)>> {
        let begins_with_text = self.terms.first().is_some_and(Term::is_quoted);
        if self.other || !begins_with_text || self.terms.iter().any(|term| term.tokens == 0) {
            return None;
        }
        let end_of = |term: &Term| if term.is_quoted() { String::new() } else { format!(")|{TERM}") };
        let begin_of = |term: &Term| if term.is_quoted() { "" } else { "(" };
        let mut edits = Vec::new();
        for (sign, pair) in self.signs.into_iter().zip(self.terms.windows(2)) {
            edits.push((sign, format!("{}}}}}{{{{{}", end_of(&pair[0]), begin_of(&pair[1]))));
        }
        let last = self.terms.last()?;
        edits.push((last.ends..last.ends, end_of(last)));
        Some(edits)
    }
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn apart_of(source: &str) -> String {
        apart(source, &SyntaxConfig::default())
    }

    #[test]
    fn sums_that_begin_with_a_text_are_printed_term_by_term() {
        for (source, expected) in [
            ("{{ 'a' + b }}", "{{ 'a' }}{{( b)|__term }}"),
            (
                r#"x{{- "<|" + m['role'] + '\n' + m.content | trim + "'+'" -}} y"#,
                r#"x{{- "<|" }}{{( m['role'] )|__term}}{{ '\n' }}{{( m.content | trim )|__term}}{{ "'+'" -}} y"#,
            ),
            ("{{'\\'+' +\n f(a + b, [c or d])}}", "{{'\\'+' }}{{(\n f(a + b, [c or d]))|__term}}"),
            (
                "{# {{ 'a' + b }} #}{{ 'ä' + b ~ 1e+5 }}{#}{{ 'a' + b }}#}",
                "{# {{ 'a' + b }} #}{{ 'ä' }}{{( b ~ 1e+5)|__term }}{#}{{ 'a' + b }}#}",
            ),
            (
                "{%\traw\t%}{{ 'a' + b }}{% endraw %}{{ 'a'+b }}",
                "{%\traw\t%}{{ 'a' + b }}{% endraw %}{{ 'a'}}{{(b)|__term }}",
            ),
        ] {
            assert_eq!(apart_of(source), expected, "{source}");
        }
    }

    #[test]
    fn whatever_else_is_printed_stays() {
        for source in [
            "{{ b + 'a' }}{{ 'a' }}{{ b }}{{ 'a' 'b' + c }}",
            "{{ 'a' + b if c else d }}{{ 'a' + b == 'ab' }}{{ 'a' + b in c }}{{ 'a' + b or c }}",
            "{{ 'a' + b, c }}{{ 'a' + }}{{ 'a'.x + b }}{{ 'a' ~ b + c }}{{ 'a' + b - c }}{{ 'a' + -b }}",
            "{% set a = 'a' + b %}{% if '{{' + a %}{% endif %}{ 'a' + b }",
            "{% autoescape 'json' %}{{ 'a' + b }}{% endautoescape %}",
            "{{ {'a': {'b': 'c' + d}} }} {{ 'a' + b",
        ] {
            assert_eq!(apart_of(source), source);
        }
    }

    #[test]
    fn it_reads_the_same_and_what_is_no_text_is_refused_as_before() {
        let mut environment = Environment::new();
        make_ready(&mut environment);
        let context = context! { b => "B", n => 1, none => (), m => context! { c => " <C> " } };
        let render = |source: &str| {
            let render = |source: &str| environment.render_str(source, &context);
            (render(source), render(&apart_of(source)))
        };
        for source in [
            "[ {{- 'a' + b + m.c | trim + m['c'] -}} ]",
            "{{ 'a' + (b + 'c') + b ~ n }}\n{{ '<' +\n b + '>'\n }}\n",
        ] {
            let (before, after) = render(source);
            assert_ne!(apart_of(source), source);
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
