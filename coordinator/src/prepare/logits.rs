//! What a request wants done with logits, and what it wants to be told of them.

use baton_proto::ApiError;
use serde_json::Value;

use super::{
    Endpoint,
    ends::no_token,
    invalid,
    openai::{Request, Small},
};

/// Biases a request may name.
const BIASES_MOST: usize = 1024;
const BIAS_MOST: f64 = 100.0;
/// Likeliest tokens told beside each.
const TOP_MOST: i64 = 20;

/// What is added to the logits of single tokens, by token.
pub(super) fn logit_bias(request: &Request, vocabulary: u32) -> Result<Vec<(u32, f32)>, ApiError> {
    let field = "logit_bias";
    let map = match &request.logit_bias {
        None => return Ok(Vec::new()),
        Some(Small(Value::Object(map))) => map,
        Some(_) => {
            return Err(invalid(field, "must be an object of biases by token id, as in {\"50256\": -100}"));
        }
    };
    if map.len() > BIASES_MOST {
        return Err(invalid(field, &format!("at most {BIASES_MOST} may be given, got {}", map.len())));
    }
    let checked = |(key, value): (&String, &Value)| {
        let id: i64 = key
            .parse()
            .map_err(|_| invalid(field, &format!("its keys must be token ids, got `{key:.40}`")))?;
        let token = u32::try_from(id).ok().filter(|&token| token < vocabulary);
        let token = token.ok_or_else(|| no_token(field, id, vocabulary))?;
        match value.as_f64() {
            Some(bias) if bias.abs() <= BIAS_MOST => Ok((token, bias as f32)),
            _ => {
                let message = format!("the bias of token {token} must be a number from -100 to 100");
                Err(invalid(field, &message))
            }
        }
    };
    let mut biases = map.iter().map(checked).collect::<Result<Vec<_>, _>>()?;
    biases.sort_unstable_by_key(|bias| bias.0);
    // `7` and `07` are one token.
    match biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(invalid(field, &format!("token {} is there twice", pair[0].0))),
        None => Ok(biases),
    }
}

/// How many of the likeliest tokens to tell beside each token; `None`: nothing of the kind is wanted.
pub(super) fn top_logprobs(endpoint: Endpoint, request: &Request) -> Result<Option<u32>, ApiError> {
    let (top, logprobs) =
        (request.top_logprobs.map(|top| top.0), request.logprobs.as_ref().map(|asked| &asked.0));
    match endpoint {
        Endpoint::Chat => {
            let on = match logprobs {
                None | Some(Value::Bool(false)) => false,
                Some(Value::Bool(true)) => true,
                Some(_) => {
                    return Err(invalid("logprobs", "must be true or false; `top_logprobs` is the number"));
                }
            };
            let top = top.unwrap_or(0);
            if !(0..=TOP_MOST).contains(&top) {
                return Err(invalid("top_logprobs", &format!("must be 0 to {TOP_MOST}, got {top}")));
            }
            if top > 0 && !on {
                return Err(invalid("top_logprobs", "is allowed only with `logprobs`: true"));
            }
            Ok(on.then_some(top as u32))
        }
        Endpoint::Text => {
            if top.is_some_and(|top| top != 0) {
                return Err(invalid("top_logprobs", "is for chats; here `logprobs` is the number"));
            }
            let whole = |number: f64| number.fract() == 0.0 && (0.0..=TOP_MOST as f64).contains(&number);
            match logprobs {
                None | Some(Value::Bool(false)) => Ok(None),
                Some(value) => match value.as_f64().filter(|&number| whole(number)) {
                    Some(number) => Ok(Some(number as u32)),
                    None => Err(invalid(
                        "logprobs",
                        &format!("must be a whole number, 0 to {TOP_MOST}, got {value}"),
                    )),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::openai::parse, *};

    #[test]
    fn biases_are_keyed_by_token_and_bounded() {
        let check = |bias: &str| {
            let body = format!(r#"{{"logit_bias": {bias}}}"#);
            logit_bias(&parse(body.as_bytes()).expect("parses"), 50)
        };
        assert_eq!(check(r#"{"7": -100, "3": 0.5}"#).expect("is taken"), [(3, 0.5), (7, -100.0)]);
        assert!(check("null").expect("is taken").is_empty() && check("{}").expect("is taken").is_empty());
        let bad = [
            r#"{"50": 1}"#,
            r#"{"-1": 1}"#,
            r#"{"word": 1}"#,
            r#"{"7": 100.1}"#,
            r#"{"7": "1"}"#,
            r#"{"7": null}"#,
            r#"{"7": 1, "07": 1}"#,
            "[7]",
            "5",
        ];
        for bad in bad {
            let error = check(bad).expect_err(bad);
            assert_eq!(error.param.as_deref(), Some("logit_bias"), "{error}");
        }
    }

    #[test]
    fn each_endpoint_asks_for_log_probabilities_in_its_own_way() {
        use Endpoint::{Chat, Text};
        let check = |endpoint, body: &str| top_logprobs(endpoint, &parse(body.as_bytes()).expect(body));
        let good = [
            (Chat, "{}", None),
            (Chat, r#"{"logprobs": false, "top_logprobs": 0}"#, None),
            (Chat, r#"{"top_logprobs": 0}"#, None),
            (Chat, r#"{"logprobs": true}"#, Some(0)),
            (Chat, r#"{"logprobs": true, "top_logprobs": 20}"#, Some(20)),
            (Text, "{}", None),
            (Text, r#"{"logprobs": 0}"#, Some(0)),
            (Text, r#"{"logprobs": 5.0, "top_logprobs": 0}"#, Some(5)),
            (Text, r#"{"logprobs": 20}"#, Some(20)),
        ];
        for (endpoint, body, expected) in good {
            assert_eq!(check(endpoint, body).expect(body), expected, "{body}");
        }
        let bad = [
            (Chat, r#"{"logprobs": true, "top_logprobs": 21}"#, "top_logprobs"),
            (Chat, r#"{"logprobs": true, "top_logprobs": -1}"#, "top_logprobs"),
            (Chat, r#"{"top_logprobs": 1}"#, "top_logprobs"),
            (Chat, r#"{"logprobs": 2}"#, "logprobs"),
            (Text, r#"{"logprobs": 21}"#, "logprobs"),
            (Text, r#"{"logprobs": -1}"#, "logprobs"),
            (Text, r#"{"logprobs": 1.5}"#, "logprobs"),
            (Text, r#"{"logprobs": true}"#, "logprobs"),
            (Text, r#"{"logprobs": 1, "top_logprobs": 1}"#, "top_logprobs"),
        ];
        for (endpoint, body, field) in bad {
            assert_eq!(check(endpoint, body).expect_err(body).param.as_deref(), Some(field), "{body}");
        }
    }
}
