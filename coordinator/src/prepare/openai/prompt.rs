//! What is to be completed, in its four spellings. Read straight into what it turns out to be: a prompt of 100,000 token ids
//! is held once, and not as JSON values before.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Unexpected, Visitor, value::SeqAccessDeserializer},
};

use super::{List, values};
use crate::config::CHOICES_MOST;

#[derive(Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// One of the prompts of a request.
#[derive(Debug, Clone, Copy)]
pub enum OnePrompt<'a> {
    Text(&'a str),
    Tokens(&'a [u32]),
}

impl Prompt {
    /// All of them, in order.
    pub fn each(&self) -> Vec<OnePrompt<'_>> {
        match self {
            Self::Text(text) => vec![OnePrompt::Text(text)],
            Self::Tokens(tokens) => vec![OnePrompt::Tokens(tokens)],
            Self::Texts(texts) => texts.iter().map(|text| OnePrompt::Text(text)).collect(),
            Self::TokenLists(lists) => lists.iter().map(|tokens| OnePrompt::Tokens(tokens)).collect(),
        }
    }
}

/// A token id. Which ones the model has is not known here.
struct Token(u32);

struct TokenVisitor;

impl Visitor<'_> for TokenVisitor {
    type Value = Token;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token id")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Token, E> {
        u32::try_from(value).map(Token).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_u32(TokenVisitor)
    }
}

fn ids(tokens: Vec<Token>) -> Vec<u32> {
    tokens.into_iter().map(|Token(id)| id).collect()
}

/// What a list begins with, which says what it is a list of.
enum First {
    Token(Token),
    Text(String),
    Tokens(List<Token>),
}

struct FirstVisitor;

impl<'de> Visitor<'de> for FirstVisitor {
    type Value = First;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id or a list of token ids")
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<First, E> {
        TokenVisitor.visit_u64(value).map(First::Token)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<First, E> {
        Ok(First::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<First, A::Error> {
        List::deserialize(SeqAccessDeserializer::new(list)).map(First::Tokens)
    }
}

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FirstVisitor)
    }
}

/// All of a list whose first element has been read.
fn whole<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    first: T,
    list: A,
    most: usize,
) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    values::extend(&mut all, list, most)?;
    Ok(all)
}

/// Prompts of a request: each wants an answer.
const PROMPTS_MOST: usize = CHOICES_MOST as usize;

struct PromptVisitor;

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of token ids, or a list of either")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        Ok(match list.next_element()? {
            None => Prompt::Tokens(Vec::new()),
            Some(First::Token(token)) => Prompt::Tokens(ids(whole(token, list, usize::MAX)?)),
            Some(First::Text(text)) => Prompt::Texts(whole(text, list, PROMPTS_MOST)?),
            Some(First::Tokens(tokens)) => {
                let lists = whole(tokens, list, PROMPTS_MOST)?;
                Prompt::TokenLists(lists.into_iter().map(|List(tokens)| ids(tokens)).collect())
            }
        })
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_spelling_is_what_it_is() {
        let text = |text: &str| text.to_owned();
        let cases = [
            (r#""a\nb""#, Prompt::Text(text("a\nb"))),
            ("[]", Prompt::Tokens(vec![])),
            ("[0, 4294967295]", Prompt::Tokens(vec![0, u32::MAX])),
            (r#"["a", "\u00e9"]"#, Prompt::Texts(vec![text("a"), text("é")])),
            ("[[], [1, 2], [3]]", Prompt::TokenLists(vec![vec![], vec![1, 2], vec![3]])),
        ];
        for (json, prompt) in cases {
            assert_eq!(serde_json::from_str::<Prompt>(json).expect(json), prompt);
        }
    }

    #[test]
    fn what_is_none_is_told_in_words_of_json() {
        let cases = [
            ("true", "boolean `true`, expected a string, a list of token ids, or a list of either"),
            ("[true]", "boolean `true`, expected a string, a token id or a list of token ids"),
            (r#"[1, "a"]"#, "string \"a\", expected a token id"),
            (r#"["a", 1]"#, "integer `1`, expected a string"),
            ("[[1], 2]", "integer `2`, expected a list"),
            ("[[1], [-2]]", "integer `-2`, expected a token id"),
            ("[1, 4294967296]", "invalid value: integer `4294967296`, expected a token id"),
            ("[4294967296]", "invalid value: integer `4294967296`, expected a token id"),
            ("[1.5]", "floating point `1.5`, expected"),
        ];
        for (json, message) in cases {
            let error = serde_json::from_str::<Prompt>(json).expect_err(json).to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }
}
