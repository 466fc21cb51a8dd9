//! What ends an answer before its length does: stop strings, stop tokens, and what puts them off.

use std::slice;

use baton_proto::ApiError;

use super::{
    invalid,
    openai::{Request, Stop},
};
use crate::text::{STOP_BYTES_MOST, TextStops};

/// Stop strings a request may name.
const STRINGS_MOST: usize = 16;
/// Stop tokens a request may name.
const TOKENS_MOST: usize = 64;

/// Tokens that end the sequence, ascending: the request's own, and the model's unless `ignore_eos`.
pub(super) fn stop_tokens(
    request: &Request,
    model_stops: &[u32],
    vocabulary: u32,
) -> Result<Vec<u32>, ApiError> {
    let field = "stop_token_ids";
    let asked = request.stop_token_ids.as_deref().unwrap_or_default();
    if asked.len() > TOKENS_MOST {
        return Err(invalid(field, &format!("at most {TOKENS_MOST} may be given, got {}", asked.len())));
    }
    let mut tokens = if request.ignore_eos == Some(true) { Vec::new() } else { model_stops.to_vec() };
    for asked in asked {
        let token = u32::try_from(asked.0).ok().filter(|&token| token < vocabulary);
        tokens.push(token.ok_or_else(|| no_token(field, asked.0, vocabulary))?);
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}

/// The error for an id that is no token's.
pub(super) fn no_token(field: &str, id: i64, vocabulary: u32) -> ApiError {
    invalid(field, &format!("{id} is no token: ids are 0 to {}", vocabulary.saturating_sub(1)))
}

/// Tokens before which nothing but the length ends the answer.
pub(super) fn min_tokens(request: &Request, max_tokens: u32) -> Result<u32, ApiError> {
    let asked = request.min_tokens.map_or(0, |asked| asked.0);
    u32::try_from(asked).ok().filter(|&least| least <= max_tokens).ok_or_else(|| {
        let message = format!("must be 0 to the {max_tokens} tokens that the answer may have, got {asked}");
        invalid("min_tokens", &message)
    })
}

/// Checks the stop strings of a request.
pub(super) fn text_stops(request: &Request, min_tokens: u32) -> Result<TextStops, ApiError> {
    let strings = match &request.stop {
        None => &[],
        Some(Stop::One(stop)) => slice::from_ref(stop),
        Some(Stop::Many(stops)) => stops.as_slice(),
    };
    if strings.len() > STRINGS_MOST {
        let message = format!("at most {STRINGS_MOST} strings may be given, got {}", strings.len());
        return Err(invalid("stop", &message));
    }
    if strings.iter().any(String::is_empty) {
        return Err(invalid("stop", "must not hold an empty string"));
    }
    if let Some(long) = strings.iter().find(|stop| stop.len() > STOP_BYTES_MOST) {
        let message = format!("a string may have at most {STOP_BYTES_MOST} bytes, got {}", long.len());
        return Err(invalid("stop", &message));
    }
    Ok(TextStops::new(strings, request.include_stop_str_in_output == Some(true), min_tokens))
}

#[cfg(test)]
mod tests {
    use super::{super::openai::parse, *};

    #[test]
    fn stops_are_one_or_many_and_never_empty() {
        let check = |body: &str| text_stops(&parse(body.as_bytes()).expect(body), 3);
        let one = check(r#"{"stop": "a", "include_stop_str_in_output": true}"#).expect("is taken");
        assert_eq!(one, TextStops::new(&["a".to_owned()], true, 3));
        assert_eq!(check(r#"{"stop": ["a", "b", "c", "d", "e"]}"#).expect("is taken").strings().count(), 5);
        assert!(check("{}").expect("is taken").are_none());
        for bad in [r#"{"stop": ""}"#, r#"{"stop": ["a", ""]}"#] {
            assert_eq!(check(bad).expect_err(bad).param.as_deref(), Some("stop"));
        }
        let many = format!(r#"{{"stop": {:?}}}"#, vec!["x"; STRINGS_MOST + 1]);
        assert!(check(&many).expect_err("too many").message.contains("at most 16"));
        let of = |bytes| check(&format!(r#"{{"stop": "{}"}}"#, "x".repeat(bytes)));
        assert_eq!(of(1024).expect("is taken").strings().map(str::len).sum::<usize>(), 1024);
        assert!(of(1025).expect_err("too long").message.contains("at most 1024 bytes, got 1025"));
    }

    #[test]
    fn ignore_eos_is_about_the_models_own_stop_tokens() {
        let check = |body: &str| stop_tokens(&parse(body.as_bytes()).expect(body), &[2], 50);
        assert_eq!(check("{}").expect("is taken"), [2]);
        assert_eq!(check(r#"{"stop_token_ids": [7, 1, 7, 2.0]}"#).expect("is taken"), [1, 2, 7]);
        assert_eq!(check(r#"{"stop_token_ids": [7], "ignore_eos": true}"#).expect("is taken"), [7]);
        for bad in ["50", "-1"] {
            let error = check(&format!(r#"{{"stop_token_ids": [{bad}]}}"#)).expect_err(bad);
            assert_eq!(error.param.as_deref(), Some("stop_token_ids"));
            assert!(error.message.contains("0 to 49"), "{error}");
        }
        assert!(check(&format!(r#"{{"stop_token_ids": {:?}}}"#, [1; 65])).is_err());
    }

    #[test]
    fn min_tokens_fit_into_max_tokens() {
        let check = |least: i64| {
            let body = format!(r#"{{"min_tokens": {least}}}"#);
            min_tokens(&parse(body.as_bytes()).expect("parses"), 5)
        };
        assert_eq!((check(0).expect("taken"), check(5).expect("taken")), (0, 5));
        for bad in [-1, 6, i64::MAX] {
            assert_eq!(check(bad).expect_err("refused").param.as_deref(), Some("min_tokens"));
        }
    }
}
