//! Tokens that are matched whole in a text, such as `<|im_end|>`.

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{Normalizer, Tokenizer as Tables, tokenizer::NormalizedString};

use super::Slow;

/// Some of them; the leftmost is taken, and of those that begin together the longest.
#[derive(Debug)]
pub(super) struct Added {
    found: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Added {
    /// Those that are looked for in a text as it came, and those in the normalised text.
    pub(super) fn of(tables: &Tables) -> Result<[Self; 2], Slow> {
        let (mut plain, mut normalized) = (Vec::new(), Vec::new());
        for (id, token) in tables.get_added_tokens_decoder() {
            if token.lstrip || token.rstrip || token.single_word || token.content.is_empty() {
                return Err(Slow::Added(token.content));
            }
            if !token.normalized {
                plain.push((token.content, id));
                continue;
            }
            let mut content = NormalizedString::from(token.content.as_str());
            if let Some(normalizer) = tables.get_normalizer() {
                normalizer.normalize(&mut content).map_err(|error| Slow::Tables(error.to_string()))?;
            }
            normalized.push((content.get().to_owned(), id));
        }
        Ok([Self::new(plain)?, Self::new(normalized)?])
    }

    fn new(tokens: Vec<(String, u32)>) -> Result<Self, Slow> {
        let (contents, ids): (Vec<String>, Vec<u32>) = tokens.into_iter().unzip();
        let found = (!contents.is_empty())
            .then(|| AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&contents));
        Ok(Self { found: found.transpose().map_err(|error| Slow::Tables(error.to_string()))?, ids })
    }

    /// Where the last of them ends in a text; 0: there is none.
    pub(super) fn last_end(&self, text: &str) -> usize {
        self.found.as_ref().and_then(|found| found.find_iter(text).last()).map_or(0, |token| token.end())
    }

    /// Calls `part` with each plain text, never empty but before a token, and the token that comes after it.
    pub(super) fn each(&self, text: &str, mut part: impl FnMut(&str, Option<u32>)) {
        let mut at = 0;
        if let Some(found) = &self.found {
            for token in found.find_iter(text) {
                part(&text[at..token.start()], Some(self.ids[token.pattern().as_usize()]));
                at = token.end();
            }
        }
        if at < text.len() {
            part(&text[at..], None);
        }
    }
}
