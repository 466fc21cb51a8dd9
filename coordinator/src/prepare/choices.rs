//! How many answers a request wants.

use baton_proto::{ApiError, ErrorCode};

use super::{
    invalid,
    openai::{Integer, Request},
};

/// Answers wanted to each of so many prompts; `most` bounds them all together.
pub(super) fn choices(request: &Request, prompts: usize, most: u32) -> Result<u32, ApiError> {
    let n = request.n.map_or(1, |n| n.0);
    if n < 1 {
        return Err(invalid("n", &format!("must be at least 1, got {n}")));
    }
    let prompts = i64::try_from(prompts).unwrap_or(i64::MAX);
    if n.saturating_mul(prompts) > i64::from(most) {
        return Err(match prompts {
            1 => invalid("n", &format!("must be 1 to {most}, got {n}")),
            _ if n == 1 => invalid("prompt", &format!("at most {most} prompts may be given, got {prompts}")),
            _ => {
                invalid("n", &format!("{n} answers to each of {prompts} prompts are more than {most} in all"))
            }
        });
    }
    match request.best_of {
        Some(Integer(best_of)) if best_of != n => {
            let message =
                format!("best_of: must be `n`, as no answer is left out, got {best_of} and an n of {n}");
            Err(ApiError::new(ErrorCode::Unsupported, message).param("best_of"))
        }
        // Within `most`, which fits.
        _ => Ok(n as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::openai::parse, *};

    #[test]
    fn all_answers_together_are_bounded_and_errors_name_the_field() {
        let check = |body: &str, prompts| choices(&parse(body.as_bytes()).expect(body), prompts, 8);
        for (body, prompts, expected) in
            [("{}", 8, 1), (r#"{"n": 8}"#, 1, 8), (r#"{"n": 2, "best_of": 2}"#, 4, 2)]
        {
            assert_eq!(check(body, prompts).expect(body), expected);
        }
        let bad = [
            (r#"{"n": 0}"#, 1, "n"),
            (r#"{"n": -1}"#, 1, "n"),
            (r#"{"n": 9}"#, 1, "n"),
            (r#"{"n": 9223372036854775807}"#, 3, "n"),
            (r#"{"n": 3}"#, 3, "n"),
            ("{}", 9, "prompt"),
            (r#"{"best_of": 2}"#, 1, "best_of"),
            (r#"{"n": 2, "best_of": 3}"#, 1, "best_of"),
        ];
        for (body, prompts, field) in bad {
            assert_eq!(check(body, prompts).expect_err(body).param.as_deref(), Some(field), "{body}");
        }
    }
}
