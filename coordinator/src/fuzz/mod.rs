//! What the targets in `integration-tests/fuzz` call: each takes any bytes and must neither panic nor break a promise, which
//! its README tells. The corpora that are kept there run with the unit tests, too.

mod answers;
mod http;
mod models;

pub use answers::answers;
pub use http::http;
pub use models::models;

pub use crate::{prepare::fuzz::bodies, text::fuzz::text};

/// A file of API keys, if the first byte says so.
pub fn key_files(bytes: &[u8]) {
    crate::keys::file::fuzz(bytes);
}

/// Long inputs in few bytes, as what is cut, kept or bounded has thousands of them: a 0, a length and a count stand for as
/// many repetitions of what was before them, and never come in what is told so. `most` bounds the whole.
pub(crate) fn expand(bytes: &[u8], most: usize) -> Vec<u8> {
    let mut whole = Vec::with_capacity(bytes.len());
    let mut rest = bytes.iter();
    while let Some(&byte) = rest.next() {
        if byte != 0 {
            whole.push(byte);
            continue;
        }
        let (Some(&length), Some(&count)) = (rest.next(), rest.next()) else { break };
        let from = whole.len().saturating_sub(usize::from(length % 64) + 1);
        let piece = whole[from..].to_vec();
        for _ in 0..1 << (count % 14) {
            if whole.len() + piece.len() > most {
                break;
            }
            whole.extend_from_slice(&piece);
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpora_are_taken() {
        baton_fuzz::replay("answers", answers);
        baton_fuzz::replay("bodies", bodies);
        baton_fuzz::replay("files", key_files);
        baton_fuzz::replay("http", http);
        baton_fuzz::replay("models", models);
        baton_fuzz::replay("text", text);
    }

    #[test]
    fn what_is_repeated_is_told_in_three_bytes() {
        assert_eq!(expand(b"ab\0\x01\x02c", 99), b"ababababab\x63");
        assert_eq!(expand(b"\0\x05\x05x\0", 99), b"x");
        assert_eq!(expand(b"a\0\0\x0d", 9999).len(), 8193);
    }
}
