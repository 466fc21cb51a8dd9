//! Who is let in, on paused time: keys are replaced while requests run, and what they have used goes over.

use std::time::Duration;

use axum::http::HeaderValue;
use baton_proto::{KeyLimits, TenantName};
use prometheus_client::registry::Registry;
use tokio::time::{Instant, advance};

use super::*;
use crate::prepare::{
    Endpoint, Prepared, Served, parse, prepare,
    tests::{LIMITS, served},
};

const MINUTE: Duration = Duration::from_secs(60);

fn key(name: &str, secret: &str, limits: KeyLimits) -> ApiKey {
    ApiKey {
        name: ApiKeyName::new(name).expect("a good name"),
        tenant: TenantName::new(name).expect("a good name"),
        hash: KeyHash::of(secret),
        limits,
        band: Default::default(),
        weight: ApiKey::WEIGHT,
        expires_unix_seconds: None,
        created_by: String::new(),
        created_unix_millis: 0,
    }
}

fn most(number: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(number)
}

/// As if a source were followed, which the test does by hand.
fn closed(coordinators: u32) -> Arc<Keys> {
    Arc::new(Keys {
        closed: true,
        ring: watch::Sender::default(),
        counted: Mutex::default(),
        sharers: Sharers::new(most(coordinators).expect("not 0")),
        metrics: Metrics::register(&mut Registry::default()),
    })
}

fn headers(authorization: &str) -> HeaderMap {
    let value = HeaderValue::try_from(authorization).expect("a header");
    HeaderMap::from_iter([(header::AUTHORIZATION, value)])
}

fn by(keys: &Keys, secret: &str) -> Result<Caller, ApiError> {
    keys.caller(&mut headers(&format!("Bearer {secret}")))
}

/// A prompt of so many tokens, and answers of so many at most.
fn prepared(prompt: usize, max_tokens: u32, n: u32) -> Prepared {
    let prompt = "x".repeat(prompt);
    let body = format!(r#"{{"model": "tiny", "prompt": "{prompt}", "max_tokens": {max_tokens}, "n": {n}}}"#);
    let request = parse(body.as_bytes()).expect("is JSON");
    let served = Served { context_tokens: 1000, ..served() };
    prepare(&served, Endpoint::Text, &request, LIMITS, 1).expect("is good")
}

fn told(caller: &Caller, header: &str) -> String {
    let mut headers = HeaderMap::new();
    caller.tell(&mut headers, Instant::now());
    headers.get(header).map(|value| value.to_str().expect("is text").to_owned()).unwrap_or_default()
}

fn refused<T>(result: Result<T, ApiError>) -> (ErrorCode, Option<Duration>) {
    let error = result.err().expect("is refused");
    (error.code, error.retry_after)
}

#[test]
fn keys_are_taken_as_headers_show_them_and_taken_off() {
    let keys = closed(1);
    let (code, _) = refused(by(&keys, "s"));
    assert_eq!((code, keys.are_known()), (ErrorCode::Unavailable, false), "nobody knows the keys yet");
    keys.replace(vec![key("alice", "s", KeyLimits::default())]);
    assert!(keys.are_known());
    for good in ["Bearer s", "bearer  s ", "BEARER s"] {
        let mut headers = headers(good);
        assert_eq!(&*keys.caller(&mut headers).expect("is known").key_name(), "alice");
        assert!(headers.is_empty(), "nobody after this can tell the key");
    }
    for (bad, reason) in
        [("s", "missing"), ("Bearer ", "missing"), ("Basic s", "missing"), ("Bearer S", "unknown")]
    {
        let labels = KeyRefusalLabels { tenant: "".into(), reason };
        let before = keys.metrics.keys.refusals.get_or_create(&labels).get();
        assert_eq!(refused(keys.caller(&mut headers(bad))).0, ErrorCode::InvalidApiKey, "{bad}");
        assert_eq!(keys.metrics.keys.refusals.get_or_create(&labels).get(), before + 1, "{bad}");
    }
    assert_eq!(refused(keys.caller(&mut HeaderMap::new())).0, ErrorCode::InvalidApiKey);
}

#[test]
fn a_key_that_has_ended_lets_nobody_in() {
    let keys = closed(1);
    let ended = ApiKey { expires_unix_seconds: Some(1), ..key("old", "o", KeyLimits::default()) };
    let lasting = ApiKey { expires_unix_seconds: Some(u64::MAX), ..key("new", "n", KeyLimits::default()) };
    keys.replace(vec![ended, lasting]);
    let error = by(&keys, "o").expect_err("has ended");
    assert_eq!((error.code, &*error.message), (ErrorCode::InvalidApiKey, "API key old has expired"));
    assert!(by(&keys, "n").is_ok());
}

#[tokio::test(start_paused = true)]
async fn requests_a_minute_are_those_taken_on_and_survive_a_change_of_keys() {
    let keys = closed(1);
    let limits = KeyLimits { requests_per_minute: most(2), ..KeyLimits::default() };
    keys.replace(vec![key("alice", "s", limits), key("bob", "b", limits)]);
    let call = |secret| by(&keys, secret).and_then(|caller| caller.call(Instant::now()));
    drop((call("s").expect("one"), call("s").expect("two")));
    assert_eq!(refused(call("s")), (ErrorCode::RateLimited, Some(MINUTE / 2)));
    call("b").expect("others have their own");
    let caller = by(&keys, "s").expect("is known");
    assert_eq!(told(&caller, "x-ratelimit-limit-requests"), "2");
    assert_eq!(told(&caller, "x-ratelimit-remaining-requests"), "0");
    assert_eq!(told(&caller, "x-ratelimit-reset-requests"), "1m0s");
    assert_eq!(told(&caller, "x-ratelimit-limit-tokens"), "");
    // Read again, with another secret: it has used what it has.
    keys.replace(vec![key("alice", "t", limits)]);
    assert_eq!(refused(call("s")).0, ErrorCode::InvalidApiKey);
    assert_eq!(refused(call("t")).0, ErrorCode::RateLimited);
    advance(MINUTE / 2).await;
    call("t").expect("one has come back");
    // A higher limit holds at once.
    keys.replace(vec![key("alice", "t", KeyLimits { requests_per_minute: most(4), ..limits })]);
    assert_eq!(told(&by(&keys, "t").expect("is known"), "x-ratelimit-remaining-requests"), "0");
    advance(MINUTE / 4).await;
    call("t").expect("a quarter of a minute is one of four");
}

#[tokio::test(start_paused = true)]
async fn tokens_are_promised_as_expected_and_settled_as_used() {
    let keys = closed(1);
    keys.replace(vec![key("alice", "s", KeyLimits { tokens_per_minute: most(600), ..KeyLimits::default() })]);
    let caller = by(&keys, "s").expect("is known");
    let remaining = || told(&caller, "x-ratelimit-remaining-tokens");
    let begin = || caller.call(Instant::now()).expect("no limit");
    let admit = |call: &mut Call, prompt, max, n| call.admit(&prepared(prompt, max, n), Instant::now());

    let mut first = begin();
    admit(&mut first, 100, 100, 3).expect("400 of 600");
    assert_eq!(remaining(), "200");
    let mut second = begin();
    assert_eq!(
        refused(admit(&mut second, 101, 100, 1)),
        (ErrorCode::RateLimited, Some(Duration::from_millis(100)))
    );
    drop(second);
    assert_eq!(remaining(), "200", "what was refused has used nothing");
    // The client leaves in the midst of it: what was computed for it counts.
    first.dispatched(100);
    first.generated(20);
    first.generated(30);
    drop(first);
    assert_eq!(remaining(), "450");
    assert_eq!(told(&caller, "x-ratelimit-reset-tokens"), "15s");
    // One that never came to be computed costs nothing.
    let mut third = begin();
    admit(&mut third, 100, 100, 1).expect("200 of 450");
    drop(third);
    assert_eq!(remaining(), "450");
    // More than may ever be used is refused for good; what is merely allowed so much is not.
    assert_eq!(refused(admit(&mut begin(), 600, 1, 1)), (ErrorCode::RateLimited, None));
    advance(MINUTE).await;
    let mut last = begin();
    admit(&mut last, 599, 400, 1).expect("the bucket is full");
    last.dispatched(599);
    last.generated(400);
    drop(last);
    assert_eq!(remaining(), "0");
    let wait = Duration::from_secs_f64(41.9);
    assert_eq!(
        refused(admit(&mut begin(), 10, 10, 1)),
        (ErrorCode::RateLimited, Some(wait)),
        "399 too many, and 20"
    );
}

#[tokio::test(start_paused = true)]
async fn a_prompt_that_is_more_than_this_ones_part_is_let_in_and_made_up_for() {
    let keys = closed(4);
    keys.replace(vec![key("alice", "s", KeyLimits { tokens_per_minute: most(400), ..KeyLimits::default() })]);
    let caller = by(&keys, "s").expect("is known");
    let begin = || caller.call(Instant::now()).expect("requests have no limit");
    assert_eq!(refused(begin().admit(&prepared(400, 1, 1), Instant::now())).1, None, "nobody grants that");
    let mut call = begin();
    call.admit(&prepared(290, 10, 1), Instant::now()).expect("the part is free");
    call.dispatched(290);
    call.generated(10);
    // It is settled as it was promised, whoever is here by then.
    keys.share_among(40);
    drop(call);
    keys.share_among(4);
    let (_, wait) = refused(begin().admit(&prepared(50, 50, 1), Instant::now()));
    assert_eq!(wait, Some(3 * MINUTE));
}

#[test]
fn requests_at_a_time_are_those_that_have_not_ended() {
    let keys = closed(1);
    let limits = KeyLimits { concurrent: most(2), ..KeyLimits::default() };
    keys.replace(vec![key("alice", "s", limits)]);
    let call = || by(&keys, "s").and_then(|caller| caller.call(Instant::now()));
    let (first, second) = (call().expect("one"), call().expect("two"));
    assert_eq!(refused(call()), (ErrorCode::RateLimited, Some(Duration::from_secs(1))));
    drop(first);
    let third = call().expect("one has ended");
    // They run on over a change of keys, and count.
    keys.replace(vec![key("alice", "s", limits)]);
    assert_eq!(refused(call()).0, ErrorCode::RateLimited);
    drop((second, third));
    assert!(call().is_ok());
    let shown = keys.metrics.keys.of_tenant("alice".into());
    assert_eq!((shown.requests.get(), shown.in_flight.get()), (4, 0));
}

#[test]
fn a_refusal_because_others_run_uses_up_no_minute() {
    let keys = closed(1);
    let limits = KeyLimits { requests_per_minute: most(2), concurrent: most(1), ..KeyLimits::default() };
    keys.replace(vec![key("alice", "s", limits)]);
    let now = Instant::now();
    let call = || by(&keys, "s").and_then(|caller| caller.call(now));
    let first = call().expect("one");
    (0..5).for_each(|_| assert_eq!(refused(call()).0, ErrorCode::RateLimited));
    drop(first);
    drop(call().expect("the second of the minute"));
    // Nor does a refusal for the minute take the place of one that runs.
    (0..2).for_each(|_| assert!(refused(call()).1 > Some(Duration::from_secs(10))));
    assert_eq!(keys.metrics.keys.of_tenant("alice".into()).in_flight.get(), 0);
}

#[test]
fn several_coordinators_grant_a_part_each() {
    let keys = closed(4);
    let limits =
        KeyLimits { requests_per_minute: most(100), tokens_per_minute: most(2), concurrent: most(9) };
    keys.replace(vec![key("alice", "s", limits)]);
    let caller = by(&keys, "s").expect("is known");
    assert_eq!(told(&caller, "x-ratelimit-limit-requests"), "25");
    assert_eq!(told(&caller, "x-ratelimit-limit-tokens"), "1", "never nothing at all");
    let calls: Vec<_> = (0..2).map(|_| caller.call(Instant::now()).expect("two")).collect();
    assert!(caller.call(Instant::now()).is_err());
    // What the controller says holds from then on, also for who is here already; that it does not know changes nothing.
    keys.share_among(2);
    assert_eq!(told(&caller, "x-ratelimit-limit-requests"), "50");
    let more: Vec<_> = (0..2).map(|_| caller.call(Instant::now()).expect("four")).collect();
    assert!(caller.call(Instant::now()).is_err());
    keys.share_among(0);
    assert_eq!(told(&caller, "x-ratelimit-limit-requests"), "50");
    drop((calls, more));
}

#[test]
fn tenants_that_are_gone_are_counted_as_long_as_there_is_room() {
    let keys = closed(1);
    let many = |prefix: &str| {
        let name = |n| format!("{prefix}{n}");
        (0..API_KEYS_MOST).map(|n| key(&name(n), &name(n), KeyLimits::default())).collect::<Vec<_>>()
    };
    keys.replace(vec![key("first", "f", KeyLimits::default())]);
    by(&keys, "f").and_then(|caller| caller.call(Instant::now())).expect("no limits");
    keys.replace(many("a")[1..].to_vec());
    assert_eq!(keys.metrics.keys.of_tenant("first".into()).requests.get(), 1, "there is room for it");
    keys.replace(many("b"));
    assert_eq!(keys.metrics.keys.of_tenant("first".into()).requests.get(), 0);
    assert_eq!(keys.counted.lock().len(), API_KEYS_MOST);
}
