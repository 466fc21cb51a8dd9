//! Bad requests by field, good ones by what they become.

use super::*;

mod bytes;
pub(crate) use bytes::Bytes;

pub(crate) fn served() -> Served {
    Served {
        name: "tiny".into(),
        aliases: Vec::new(),
        revision: "r1".into(),
        context_tokens: 200,
        stop_tokens: vec![0],
        sampling: SamplingDefaults::default(),
        since: 1,
        text: Arc::new(Bytes),
    }
}

pub(crate) const LIMITS: RequestLimits = RequestLimits { max_completion_tokens: 0, max_choices: 8 };

fn chat(body: &str) -> Result<Prepared, ApiError> {
    prepare(&served(), Endpoint::Chat, &parse(body.as_bytes())?, LIMITS, 1)
}

fn text(body: &str) -> Result<Prepared, ApiError> {
    prepare(&served(), Endpoint::Text, &parse(body.as_bytes())?, LIMITS, 1)
}

/// The prompts, one after the other.
fn words(prepared: &Prepared) -> String {
    let of = |prompt: &PreparedPrompt| prompt.tokens.iter().map(|&token| char::from(token as u8)).collect();
    prepared.prompts.iter().map(of).collect::<Vec<String>>().join("|")
}

#[test]
fn chats_go_through_the_template() {
    let prepared = chat(
        r#"{"model": "tiny", "stream": true, "stream_options": {"include_usage": true}, "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null},
            {"role": "user", "content": "c"}]}"#,
    )
    .expect("is taken");
    assert_eq!(words(&prepared), "system:be brief\nuser:a\nb\nassistant:\nuser:c\nassistant:");
    assert_eq!(
        prepared.shape,
        Shape { endpoint: Endpoint::Chat, stream: true, include_usage: true, logprobs: false }
    );
    assert_eq!(*prepared.prompts[0].sampling.stop_token_ids, [0]);
}

#[test]
fn a_chat_may_tell_the_template_what_no_one_else_does() {
    let with = |variables: &str| {
        let messages = r#"[{"role": "user", "content": "a"}]"#;
        chat(&format!(r#"{{"model": "tiny", "messages": {messages}, "chat_template_kwargs": {variables}}}"#))
    };
    assert!(with(r#"{"enable_thinking": false}"#).is_ok() && with("{}").is_ok() && with("null").is_ok());
    for (variables, code, field) in [
        (r#"{"messages": []}"#, ErrorCode::Unsupported, "chat_template_kwargs.messages"),
        (r#"{"a": 1, "tools": [{}]}"#, ErrorCode::Unsupported, "chat_template_kwargs.tools"),
        ("[]", ErrorCode::InvalidArgument, "chat_template_kwargs"),
    ] {
        let error = with(variables).expect_err(variables);
        assert_eq!((error.code, error.param.as_deref()), (code, Some(field)), "{error}");
        assert!(error.message.starts_with(field), "{error}");
    }
}

#[test]
fn a_completion_has_no_template_to_tell_anything() {
    let with = |variables: &str| {
        text(&format!(r#"{{"model": "tiny", "prompt": "a", "chat_template_kwargs": {variables}}}"#))
    };
    assert!(with("{}").is_ok());
    let error = with(r#"{"enable_thinking": false}"#).expect_err("refused");
    assert_eq!((error.code, error.param.as_deref()), (ErrorCode::Unsupported, Some("chat_template_kwargs")));
}

#[test]
fn prompts_come_as_text_or_tokens_one_or_several() {
    for prompt in [r#""hi""#, "[104, 105]", r#"["hi"]"#, "[[104, 105]]"] {
        let prepared = text(&format!(r#"{{"model": "tiny", "prompt": {prompt}}}"#)).expect(prompt);
        assert_eq!(words(&prepared), "hi", "{prompt}");
    }
    for prompt in [r#"["hi", "ho"]"#, "[[104, 105], [104, 111]]"] {
        let body = format!(r#"{{"model": "tiny", "prompt": {prompt}, "n": 2, "seed": 5, "echo": true}}"#);
        let prepared = text(&body).expect(prompt);
        assert_eq!(words(&prepared), "hi|ho", "{prompt}");
        let each = prepared.prompts.iter().map(|one| (one.sampling.choices, one.sampling.seed, &*one.echo));
        assert_eq!(each.collect::<Vec<_>>(), [(2, 5, "hi"), (2, 5, "ho")]);
    }
    let many = r#"{"model": "tiny", "prompt": ["a", "b", "c"], "n": 3}"#;
    assert_eq!(text(many).expect_err("9 answers").param.as_deref(), Some("n"));
    for (prompt, code) in [
        (r#"["a", ""]"#, ErrorCode::InvalidArgument),
        ("[[1], [256]]", ErrorCode::InvalidArgument),
        ("[]", ErrorCode::InvalidArgument),
        (r#""""#, ErrorCode::InvalidArgument),
        ("[256]", ErrorCode::InvalidArgument),
        ("null", ErrorCode::InvalidArgument),
    ] {
        let error = text(&format!(r#"{{"model": "tiny", "prompt": {prompt}}}"#)).expect_err(prompt);
        assert_eq!((error.code, error.param.as_deref()), (code, Some("prompt")), "{prompt}");
    }
}

#[test]
fn bad_chats_are_told_by_field() {
    use ErrorCode::{ContextLengthExceeded, InvalidArgument, Unsupported};
    let long =
        format!(r#""model": "tiny", "messages": [{{"role": "user", "content": "{}"}}]"#, "x".repeat(300));
    let cases = [
        (r#""model": "tiny""#, InvalidArgument, "messages"),
        (r#""model": "tiny", "messages": []"#, InvalidArgument, "messages"),
        (
            r#""model": "tiny", "messages": [{"role": "assistant", "content": null, "function_call": {"name": "f"}}]"#,
            Unsupported,
            "messages[0].function_call",
        ),
        (r#""model": "tiny", "messages": [{"content": "x"}]"#, InvalidArgument, "messages[0].role"),
        (
            r#""model": "tiny", "messages": [{"role": "user", "content": "x"}, {"role": "king", "content": "x"}]"#,
            InvalidArgument,
            "messages[1].role",
        ),
        (
            r#""model": "tiny", "messages": [{"role": "tool", "content": "x"}]"#,
            Unsupported,
            "messages[0].role",
        ),
        (r#""model": "tiny", "messages": [{"role": "user"}]"#, InvalidArgument, "messages[0].content"),
        (
            r#""model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]"#,
            Unsupported,
            "messages[0].content[0].type",
        ),
        (
            r#""model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream_options": {}"#,
            InvalidArgument,
            "stream_options",
        ),
        (
            r#""model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop_token_ids": [256]"#,
            InvalidArgument,
            "stop_token_ids",
        ),
        (&long, ContextLengthExceeded, "messages"),
    ];
    for (body, code, field) in cases {
        let error = chat(&format!("{{{body}}}")).expect_err(body);
        assert_eq!((error.code, error.param.as_deref()), (code, Some(field)), "{body}: {error}");
        assert!(error.message.starts_with(field) || code == ContextLengthExceeded, "{error}");
    }
}

#[test]
fn priority_is_any_whole_number_that_the_wire_holds() {
    let asked = |priority: &str| text(&format!(r#"{{"model": "tiny", "prompt": "x"{priority}}}"#));
    for (body, priority) in [("", 0), (r#", "priority": -3"#, -3), (r#", "priority": 2147483647"#, i32::MAX)]
    {
        assert_eq!(asked(body).expect(body).priority, priority);
    }
    let error = asked(r#", "priority": 2147483648"#).expect_err("too large");
    assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidArgument, Some("priority")));
    assert!(error.message.contains("-2147483648 (first) to 2147483647 (last)"), "{error}");
}

#[test]
fn an_echo_is_kept_for_each_choice_and_written_from_that() {
    let held_of = |one: &str, more: &str| {
        let body = format!(r#"{{"model": "tiny", "prompt": "{}", "max_tokens": 1{more}}}"#, one.repeat(100));
        let request = parse(body.as_bytes()).expect("is JSON");
        prepare(&served(), Endpoint::Text, &request, LIMITS, 1).expect("is taken").held_bytes()
    };
    let held = |more: &str| held_of("x", more);
    let plain = held("");
    assert_eq!(held(r#", "n": 8"#), plain);
    assert_eq!(held(r#", "echo": true"#), plain + 3 * 100);
    assert_eq!(held(r#", "echo": true, "n": 8"#), plain + 17 * 100);
    // What JSON has to say in more letters takes as many.
    for (one, written) in [(r#"\""#, 2), (r"\n", 2), (r"\u0001", 6)] {
        let echoed = serde_json::from_str::<String>(&format!("\"{one}\"")).expect("is JSON");
        assert_eq!(serde_json::to_string(&echoed).expect("is JSON").len(), written + 2);
        assert_eq!(held_of(one, r#", "echo": true, "n": 8"#), plain + (1 + 8 * (1 + written)) * 100, "{one}");
    }
}

#[test]
fn log_probabilities_are_held_and_written_from_that_and_streamed_ones_as_they_come() {
    let held = |more: &str| {
        let body = format!(
            r#"{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 10, "n": 3{more}}}"#
        );
        let request = parse(body.as_bytes()).expect("is JSON");
        prepare(&served(), Endpoint::Chat, &request, LIMITS, 1).expect("is taken").held_bytes()
    };
    let of_each = |top: usize| held(&format!(r#", "logprobs": true, "top_logprobs": {top}"#)) - held("");
    assert_eq!([0, 1, 20].map(of_each), [0, 1, 20].map(|top| 30 * (96 + 8 * top + 100 * (1 + top))));
    let streamed = held(r#", "logprobs": true, "top_logprobs": 20, "stream": true"#);
    assert_eq!(streamed - held(""), 30 * (96 + 8 * 20));
}

#[test]
fn the_prompts_of_a_request_and_their_attempts_share_its_lists() {
    let lists = r#""logit_bias": {"7": 1, "3": -1}, "stop_token_ids": [9, 8]"#;
    let prepared = text(&format!(r#"{{"model": "tiny", "prompt": ["x", "y"], {lists}}}"#)).expect("is taken");
    let first = &prepared.prompts[0].sampling;
    let biases = |sampling: &Sampling| sampling.logit_bias.clone().expect("there are two");
    assert_eq!((&*biases(first), &*first.stop_token_ids), (&[(3, -1.0), (7, 1.0)][..], &[0, 8, 9][..]));
    for other in [&prepared.prompts[1].sampling, &first.clone()] {
        assert!(Arc::ptr_eq(&biases(first), &biases(other)));
        assert!(Arc::ptr_eq(&first.stop_token_ids, &other.stop_token_ids));
    }
    let none = text(r#"{"model": "tiny", "prompt": "x", "logit_bias": {}}"#).expect("is taken");
    assert_eq!(none.prompts[0].sampling.logit_bias, None);
}

#[test]
fn biases_are_held_once_whatever_number_of_prompts_and_choices_they_are_for() {
    let held = |prompt: &str, more: &str| {
        let body = format!(r#"{{"model": "tiny", "prompt": {prompt}, "max_tokens": 1{more}}}"#);
        text(&body).expect("is taken").held_bytes()
    };
    let biases: Vec<_> = (0..100).map(|token| format!(r#""{token}": 1"#)).collect();
    let biases = format!(r#", "logit_bias": {{{}}}"#, biases.join(","));
    for prompt in [r#""x""#, r#"["x", "y", "z"]"#] {
        assert_eq!(held(prompt, &format!(r#"{biases}, "n": 2"#)) - held(prompt, ""), 100 * 8, "{prompt}");
    }
}

#[test]
fn stop_strings_are_held_once_and_their_matches_for_each_answer() {
    let held = |more: &str| {
        let body = format!(r#"{{"model": "tiny", "prompt": ["x", "y"], "max_tokens": 1{more}}}"#);
        text(&body).expect("is taken").held_bytes()
    };
    let stops = format!(r#", "stop": {:?}"#, vec!["s".repeat(1024); 16]);
    let (plain, one, four) = (held(""), held(&stops), held(&format!(r#"{stops}, "n": 4"#)));
    // Each answer holds back as much as the longest, at most, in a string that doubles.
    let each = 2 * 1024 + 16 * 2;
    assert_eq!(four - one, 6 * each);
    assert!((16 * 3 * 1024..16 * 4 * 1024).contains(&(one - plain - 2 * each)), "{} bytes", one - plain);
}

#[test]
fn a_completion_that_names_no_length_has_16_tokens_and_a_chat_the_contexts_rest() {
    let max_tokens = |endpoint, fields: &str, limits| {
        let request = parse(format!(r#"{{"model": "tiny", {fields}}}"#).as_bytes()).expect("is JSON");
        prepare(&served(), endpoint, &request, limits, 1).expect("is taken").prompts[0].sampling.max_tokens
    };
    let (prompt, chat) = (r#""prompt": "x""#, r#""messages": [{"role": "user", "content": "x"}]"#);
    assert_eq!(max_tokens(Endpoint::Text, prompt, LIMITS), 16);
    assert_eq!(max_tokens(Endpoint::Text, &format!(r#"{prompt}, "max_tokens": 90"#), LIMITS), 90);
    assert!(max_tokens(Endpoint::Chat, chat, LIMITS) > 90);
    let few = RequestLimits { max_completion_tokens: 5, ..LIMITS };
    assert_eq!(max_tokens(Endpoint::Text, prompt, few), 5);
    assert_eq!(max_tokens(Endpoint::Chat, chat, few), 5);
}
