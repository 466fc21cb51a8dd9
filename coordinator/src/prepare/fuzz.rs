//! Fuzz target of request bodies, from the first byte to what instances are sent.

use std::sync::LazyLock;

use serde::de::IgnoredAny;

use super::*;
use crate::{
    fuzz::expand,
    text::{TextCache, fuzz::small_model},
};

const CONTEXT_TOKENS: u32 = 8192;
const LIMITS: RequestLimits = RequestLimits { max_completion_tokens: 0, max_choices: 8 };
/// As long as an error's message may be, whatever the client sent.
const MESSAGE_BYTES_MOST: usize = ApiError::MESSAGE_BYTES_MOST;
/// Strings from 48 KiB on that cannot be cut are left to the end.
const BODY_BYTES_MOST: usize = 64 << 10;
/// Longer ones are too slow to compare as text.
const COMPARED_BYTES: usize = 8 << 10;

fn served(cache_bytes: usize) -> Served {
    Served {
        name: "tiny".into(),
        aliases: Vec::new(),
        revision: "r1".into(),
        context_tokens: CONTEXT_TOKENS,
        stop_tokens: vec![0],
        sampling: SamplingDefaults::default(),
        since: 1,
        text: Arc::new(small_model("smollm", &TextCache::new(cache_bytes))),
    }
}

/// Without a cache, and with one that bodies are read ahead into.
static MODELS: LazyLock<[Served; 2]> = LazyLock::new(|| [served(0), served(256 << 10)]);

/// A body: the first byte says the endpoint, the second in what pieces it comes.
pub fn bodies(bytes: &[u8]) {
    let [first, second, rest @ ..] = bytes else { return };
    let body = expand(rest, BODY_BYTES_MOST);
    let endpoint = if first % 2 == 0 { Endpoint::Chat } else { Endpoint::Text };
    let [plain, cached] = &*MODELS;
    ahead(cached, &body, usize::from(*second));
    let request = parse(&body);
    if body.len() <= COMPARED_BYTES {
        let slow = openai::parse_by_field(&body);
        assert_eq!(format!("{request:?}"), format!("{slow:?}"), "however it is read, it is the same");
    }
    if request.is_ok() {
        serde_json::from_slice::<IgnoredAny>(&body).expect("what is taken is JSON");
    }
    let prepared = request.and_then(|request| {
        let with = |served| prepare(served, endpoint, &request, LIMITS, 1);
        let (prepared, found) = (with(plain), with(cached));
        assert_eq!(format!("{prepared:?}"), format!("{found:?}"), "nothing depends on what was read ahead");
        prepared
    });
    match prepared {
        Ok(prepared) => check(&prepared, plain),
        Err(error) => {
            assert!((400..500).contains(&error.code.http()), "the client's fault: {error:?}");
            assert!(!error.message.is_empty() && error.message.len() <= MESSAGE_BYTES_MOST, "{error:?}");
            let param = error.param.unwrap_or_default();
            assert!(param.len() <= MESSAGE_BYTES_MOST, "{param}");
        }
    }
}

/// Reads a body in pieces, as it comes.
fn ahead(served: &Served, body: &[u8], lengths: usize) {
    let mut ahead = Ahead::new(served.text.clone());
    let (mut come, mut calls, mut pieces) = (0, 0, 0);
    while come < body.len() {
        come = body.len().min(come + 1 + (lengths * (pieces + 1) * 37) % 5000);
        pieces += 1;
        calls += 1;
        while ahead.read(&body[..come]) {
            calls += 1;
        }
    }
    assert!(calls <= 2 * pieces + body.len() / (8 << 10) + 1, "{calls} calls for {} bytes", body.len());
    let is_plain = std::str::from_utf8(body).is_ok_and(|body| !body.contains("\\u"));
    if is_plain && serde_json::from_slice::<IgnoredAny>(body).is_ok() {
        assert!(ahead.is_outside(), "JSON that is whole ends outside of its strings");
    }
}

/// What instances rely on.
fn check(prepared: &Prepared, served: &Served) {
    let chat = prepared.shape.endpoint == Endpoint::Chat;
    assert!(!prepared.prompts.is_empty() && (prepared.prompts.len() == 1 || !chat));
    let mut answers = 0;
    for prompt in &prepared.prompts {
        let (sampling, tokens) = (&prompt.sampling, &prompt.tokens);
        assert!(!tokens.is_empty() && tokens.iter().all(|&token| token < served.text.vocabulary()));
        assert!(sampling.max_tokens > 0 && sampling.min_tokens <= sampling.max_tokens);
        let whole = u64::from(prompt.prompt_tokens()) + u64::from(sampling.max_tokens);
        assert!(whole <= CONTEXT_TOKENS.into(), "{whole} tokens");
        assert!(sampling.stop_token_ids.is_sorted() && sampling.stop_token_ids.len() <= 65);
        let biases = sampling.logit_bias.as_deref().unwrap_or_default();
        assert!(biases.is_sorted_by(|a, b| a.0 < b.0));
        let finite = [
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            sampling.repetition_penalty,
        ];
        assert!(finite.into_iter().chain(biases.iter().map(|bias| bias.1)).all(f32::is_finite));
        answers += sampling.choices;
    }
    assert!((1..=LIMITS.max_choices).contains(&answers));
}
