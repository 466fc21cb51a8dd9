//! Fuzz target of whole requests as a client sends them, from the head to the answer, by the routes that clients have. No
//! instance is there, so that a good one is answered with 503.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header},
};
use baton_process::{Essential, HealthHandle, Tls, telemetry::TraceContext};
use baton_proto::{ApiError, KeyHash};
use baton_registry::{FleetWatch, FleetWatchConfig, MemoryConfig, MemoryStore, Revision};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use super::expand;
use crate::{
    CoordinatorConfig, Parts, assemble,
    http::request_id,
    keys::{Source, file::KeyFile},
    prepare::{SamplingDefaults, Served},
    serve::Service,
    text::{TextCache, fuzz::small_model},
};

const KEY: &str = "sk-baton-known";
/// More than the limit.
const BODY_BYTES_MOST: usize = 80 << 10;
const MESSAGE_BYTES_MOST: usize = ApiError::MESSAGE_BYTES_MOST;
const PATHS: [&str; 6] =
    ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/", "/v1/", "/"];

struct Stage {
    runtime: Runtime,
    /// One that lets everybody in, and one that asks for a key.
    open: (Arc<Service>, Router),
    closed: (Arc<Service>, Router),
    rooms: usize,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _enter = runtime.enter();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.toml");
    let entry = format!("[[keys]]\nname = \"known\"\nsha256 = \"{}\"\n", KeyHash::of(KEY).to_hex());
    std::fs::write(&file, entry).expect("is written");
    let keys = KeyFile::open(&file).expect("is good");
    let (open, closed) = (coordinator(Source::Open), coordinator(Source::File(keys)));
    let rooms = open.0.gate.rooms();
    Stage { open, closed, rooms, runtime }
});

fn coordinator(keys: Source) -> (Arc<Service>, Router) {
    let mut config = CoordinatorConfig::default();
    config.limits.placement_timeout = Duration::ZERO;
    config.limits.max_body_bytes = 64 << 10;
    config.metrics_listen = None;
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let store = Arc::new(MemoryStore::start(MemoryConfig::new(Revision(1)), stop.clone(), &tasks));
    let served = Served {
        name: "tiny".into(),
        aliases: vec!["an/alias".into()],
        revision: "r1".into(),
        context_tokens: 2048,
        stop_tokens: vec![0],
        sampling: SamplingDefaults::default(),
        since: 1,
        text: Arc::new(small_model("smollm", &TextCache::new(64 << 10))),
    };
    let parts = Parts {
        served: vec![served],
        keys,
        fleet: FleetWatch::start(store, FleetWatchConfig::default(), stop.clone(), &tasks),
        tls: Tls::plaintext(),
        metrics: baton_process::Metrics::new("coordinator"),
        health: HealthHandle::default(),
        essential: Essential::new(tasks.clone(), stop.clone()),
        tasks,
        shutdown: stop.clone(),
        drained: stop,
    };
    assemble(&config, parts).expect("a coordinator")
}

/// A request: the first byte says the method and which of the two coordinators, the second how its path begins. Parted by
/// 0xff come the path's rest, lines of headers, and a body, in pieces as the third byte says.
pub fn http(bytes: &[u8]) {
    let [first, second, third, rest @ ..] = bytes else { return };
    let mut parts = rest.splitn(3, |&byte| byte == 0xff);
    let (path, lines) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let body = expand(parts.next().unwrap_or_default(), BODY_BYTES_MOST);
    let method = match first % 8 {
        0..=4 => Method::POST,
        5 | 6 => Method::GET,
        _ => Method::DELETE,
    };
    let stage = &*STAGE;
    let closed = first & 0x80 != 0;
    let (service, router) = if closed { &stage.closed } else { &stage.open };
    let uri = [PATHS[usize::from(*second) % PATHS.len()].as_bytes(), path].concat();
    let Ok(mut request) = Request::builder().method(method).uri(&*uri).body(Body::empty()) else { return };
    for line in lines.split(|&byte| byte == b'\n') {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let value = line[colon + 1..].trim_ascii();
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(value))
        {
            request.headers_mut().append(name, value);
        }
    }
    of_headers(request.headers());
    let shown = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes().to_vec());
    let is_api = request.uri().path() == "/v1" || request.uri().path().starts_with("/v1/");
    let length = usize::from(*third) * 61 + 1;
    let pieces: Vec<_> = body.chunks(length).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    *request.body_mut() = Body::from_stream(futures::stream::iter(pieces));
    let answered = async {
        let response = router.clone().oneshot(request).await.expect("every request is answered");
        let (head, body) = response.into_parts();
        (head, axum::body::to_bytes(body, 4 << 20).await.expect("a whole answer"))
    };
    let (head, answer) = stage.runtime.block_on(answered);
    let status = head.status;
    let known = shown.is_some_and(|shown| String::from_utf8_lossy(&shown).contains(KEY));
    if closed && is_api && !known {
        assert_eq!(status, StatusCode::UNAUTHORIZED, "nobody is let in without a key");
    }
    if status.is_success() {
        assert!(!answer.is_empty());
    } else {
        assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{answer:?}");
        // Of a path that is no text axum says so itself.
        if head.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json") {
            let error: Value = serde_json::from_slice(&answer).expect("JSON");
            if is_api {
                let message = error["error"]["message"].as_str().expect("a message");
                assert!(!message.is_empty() && message.len() <= MESSAGE_BYTES_MOST, "{message}");
                assert!(error["error"]["code"].is_string() && error["error"]["type"].is_string());
            }
        }
    }
    if let Some(id) = head.headers.get("x-request-id") {
        assert!((1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic), "{id:?}");
    }
    assert_eq!(service.gate.rooms(), stage.rooms, "every room was given back");
    assert_eq!(service.metrics.body_reserved.get(), 0, "and all memory");
    assert_eq!(service.metrics.prompt_reserved.get(), 0, "for prompts, too");
    assert!(service.roster.list().is_empty(), "and nobody is listed");
}

/// What of a request's head goes on to instances, logs and answers.
fn of_headers(headers: &HeaderMap) {
    let id = request_id(headers);
    assert!(
        (1..=128).contains(&id.as_str().len()) && id.as_str().bytes().all(|byte| byte.is_ascii_graphic())
    );
    let context = TraceContext::sent(headers);
    let trace = context.parent();
    assert!(!trace.is_empty() || context.state().is_empty(), "a state of no trace");
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let parts: Vec<&str> = trace.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    assert!(
        trace.is_empty() || lengths == [2, 32, 16, 2] && parts.iter().all(|part| is_hex(part)),
        "{trace}"
    );
    let says = |part: &&str| part.bytes().any(|byte| byte != b'0');
    assert!(trace.is_empty() || parts[0] != "ff" && parts[1..3].iter().all(says), "{trace}");
}
