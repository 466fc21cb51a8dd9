//! What clients see: the OpenAI endpoints, models, probes and metrics over HTTP.
//!
//! Thin: reads the body within its limits, hands it to [`crate::serve`], and writes the answer as JSON or as
//! server-sent events. What lies under `/v1` is for those who show an API key that [`crate::keys`] knows, where keys are
//! asked for. Every error, of whatever path, is an OpenAI-shaped JSON body. When the client goes away, hyper
//! drops the handler or the body, and with it everything that the request holds.

mod body;
mod logprobs;
mod reply;
mod sse;
mod whole;

use std::{any::Any, sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::{self, Next},
    response::Response,
    routing::{get, post},
};
use baton_process::{
    http::{Express, Stranger},
    telemetry::TraceContext,
};
use baton_proto::{ApiError, ErrorCode, RequestId};
use tokio::time::{Instant, timeout};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;

use crate::{
    keys::Caller,
    prepare::Endpoint,
    report::{Report, bug},
    serve::{Received, Service},
    stream::{Delta, Step, Streaming},
};

pub use reply::{error_json, error_response};
use sse::SseBody;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Tokens with log probabilities, and bytes of text, that an answer may have to be written on the spot: a few milliseconds' work.
const SCORED_INLINE: usize = 1024;
const TEXT_INLINE: usize = 1 << 20;
/// A stream's head waits this long for the first token, so that what fails before it has a status of its own.
const HEAD_PATIENCE: Duration = Duration::from_secs(2);

/// All routes, beside those by which the process is observed.
pub fn router(service: Arc<Service>, observed: Router) -> Router {
    let routes = Router::new()
        .route(Endpoint::Chat.route(), post(chat))
        .route(Endpoint::Text.route(), post(text))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .with_state(service.clone())
        .merge(observed)
        .method_not_allowed_fallback(wrong_method)
        .fallback(wrong_path)
        .layer(middleware::from_fn_with_state(service, let_in));
    guarded(routes)
}

/// What is left once clients are let in no more and requests still run: by what the process is observed. Everything else is to
/// be asked of another coordinator.
pub fn closed(observed: Router) -> Router {
    guarded(observed.method_not_allowed_fallback(wrong_method).fallback(turned_away))
}

async fn turned_away(request: Request) -> Response {
    let (head, body) = request.into_parts();
    body::leave_all_unread(&head, body).await;
    let message = "this coordinator is shutting down and takes no new requests: send it again, to another";
    let mut response = error_response(&ApiError::new(ErrorCode::Unavailable, message));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Nothing under `/v1` is reached without a key where keys are asked for, not even what is not there. Handlers find the
/// [`Caller`] among the extensions, and no key in the headers. Whoever has been let in keeps their connection.
async fn let_in(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path != "/v1" && !path.starts_with("/v1/") {
        return next.run(request).await;
    }
    let arrived = Instant::now();
    let endpoint = [Endpoint::Chat, Endpoint::Text].into_iter().find(|endpoint| endpoint.route() == path);
    match service.keys.caller(request.headers_mut()) {
        Ok(caller) => {
            if let Some(stranger) = request.extensions_mut().remove::<Stranger>() {
                stranger.settle();
            }
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            if let Some(endpoint) = endpoint {
                let id = request.extensions().get::<RequestId>().map(tracing::field::display);
                let span = tracing::info_span!("request", request_id = id, route = endpoint.route());
                Report::new(service.metrics.clone(), endpoint.route(), arrived, span).failed(&error);
            }
            let (head, body) = request.into_parts();
            body::leave_unread(&head, body).await;
            error_response(&error)
        }
    }
}

/// A bug in a handler ends its request with an error of the usual shape, not with a cut connection.
fn guarded(routes: Router) -> Router {
    let told = |_: Box<dyn Any + Send>| error_response(&bug());
    let guard = ServiceBuilder::new().layer(middleware::from_fn(identified));
    routes.layer(guard.layer(CatchPanicLayer::custom(told)))
}

/// Handlers find the [`RequestId`] among the request's extensions, and clients in the answer, whatever that is.
async fn identified(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let shown = HeaderValue::from_str(id.as_str());
    request.extensions_mut().insert(id);
    let mut response = next.run(request).await;
    if let Ok(shown) = shown {
        response.headers_mut().insert(X_REQUEST_ID, shown);
    }
    response
}

async fn chat(
    State(service): State<Arc<Service>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    complete(service, Endpoint::Chat, id, request).await
}

async fn text(
    State(service): State<Arc<Service>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    complete(service, Endpoint::Text, id, request).await
}

async fn complete(service: Arc<Service>, endpoint: Endpoint, id: RequestId, request: Request) -> Response {
    let arrived = Instant::now();
    let (mut head, body) = request.into_parts();
    let caller: Caller = head.extensions.get().cloned().unwrap_or_default();
    let express = head.extensions.remove();
    let (route, key) = (endpoint.route(), caller.key_name());
    let span = tracing::info_span!("request", request_id = %id, route, api_key = tracing::field::Empty);
    if !key.is_empty() {
        span.record("api_key", &*key);
    }
    let sent = TraceContext::sent(&head.headers);
    sent.adopt(&span);
    let mut report = Report::new(service.metrics.clone(), route, arrived, span.clone());
    let answered = async {
        let card = service.roster.enter(id.clone(), arrived, key);
        report.shown(card.card());
        let (call, ticket) = match service.enter(&caller, arrived) {
            Ok(entered) => entered,
            Err(error) => {
                report.failed(&error);
                drop(card);
                body::leave_unread(&head, body).await;
                return Err(error);
            }
        };
        let read = body::read(&service, &call.tenant(), ticket, &head.headers, body).await;
        let body = read.inspect_err(|error| report.failed(error))?;
        // The client's own goes on where traces are not exported.
        let trace = TraceContext::current().unwrap_or(sent);
        let streaming = service.serve(Received { call, endpoint, body, trace, card }, report).await?;
        answer(&service, &id, streaming, express).await
    };
    let answered = answered.instrument(span).await;
    let mut response = answered.unwrap_or_else(|error| error_response(&error));
    caller.tell(response.headers_mut(), Instant::now());
    response
}

/// Writes the answer: a stream once its first token is there, JSON once it is complete.
async fn answer(
    service: &Service,
    id: &RequestId,
    mut streaming: Streaming,
    express: Option<Express>,
) -> Result<Response, ApiError> {
    let voice = reply::Voice::new(&streaming.model.served, streaming.shape, id);
    let mut deltas = streaming.deltas();
    if !streaming.shape.stream {
        let usage = streaming.rest(&mut deltas).await?;
        let scored: usize = deltas.iter().map(|delta| delta.tokens.len()).sum();
        let text: usize = deltas.iter().map(|delta| delta.text.len()).sum();
        let written = if scored <= SCORED_INLINE && text <= TEXT_INLINE {
            voice.whole(&deltas, &usage)
        } else {
            match tokio::task::spawn_blocking(move || voice.whole(&deltas, &usage)).await {
                Ok(written) => written,
                Err(_) => return Err(streaming.broke()),
            }
        };
        streaming.written(&usage);
        return Ok(whole::respond(service, streaming, written));
    }
    // A step that fails leaves nothing to come.
    let deadline = streaming.deadline();
    let first = match timeout(HEAD_PATIENCE, streaming.step(&mut deltas)).await {
        Ok(Step::End(Err(error))) if deltas.iter().all(Delta::is_empty) => return Err(error),
        Ok(step) => Some(step),
        Err(_) => None,
    };
    let comment_after = service.limits.stream_comment_after;
    let body = SseBody::new(comment_after, voice, streaming, deltas, first, express);
    if let Some(deadline) = deadline {
        service.overdue.watch(body.answer(), deadline);
    }
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies in front must not gather tokens.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// The client's id if it sent a usable one, or a fresh one.
pub(crate) fn request_id(headers: &HeaderMap) -> RequestId {
    let theirs = headers.get(&X_REQUEST_ID).and_then(|value| value.to_str().ok()).map(RequestId::adopt);
    theirs.filter(|id| !id.as_str().is_empty()).unwrap_or_else(RequestId::generate)
}

async fn models(State(service): State<Arc<Service>>) -> Response {
    reply::models(&service.models)
}

async fn model(State(service): State<Arc<Service>>, id: Result<Path<String>, PathRejection>) -> Response {
    let not_text = |_| ApiError::new(ErrorCode::ModelNotFound, "the model's name is not UTF-8");
    let found = id.map_err(not_text).and_then(|Path(id)| {
        let model = service.models.asked(Some(&id))?;
        Ok(reply::model(&model.served, &id))
    });
    found.unwrap_or_else(|error| error_response(&error))
}

async fn wrong_path(request: Request) -> Response {
    let (head, body) = request.into_parts();
    body::leave_unread(&head, body).await;
    let path = head.uri.path();
    let message =
        format!("there is nothing at {path}; see /v1/chat/completions, /v1/completions, /v1/models");
    error_response(&ApiError::new(ErrorCode::NotFound, message))
}

async fn wrong_method(request: Request) -> Response {
    let (head, body) = request.into_parts();
    body::leave_unread(&head, body).await;
    let message = format!("{} is not called with {}", head.uri.path(), head.method);
    error_response(&ApiError::new(ErrorCode::MethodNotAllowed, message))
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_bug_in_a_handler_is_an_answer() {
        async fn bug() -> StatusCode {
            panic!("as the test wants it")
        }
        let buggy = get(bug);
        let routes = guarded(Router::new().route("/", buggy));
        let request = Request::get("/").header(X_REQUEST_ID, "mine").body(Body::empty());
        let response = routes.oneshot(request.expect("a request")).await.expect("an answer");
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()[X_REQUEST_ID], "mine");
        assert_eq!(error_code(response).await, "internal_error");
    }

    #[tokio::test]
    async fn every_error_of_a_coordinator_that_shuts_down_has_the_usual_shape() {
        let observed = Router::new().route("/metrics", get(async || "figures"));
        for (method, path, status, code) in
            [("POST", "/metrics", 405, "method_not_allowed"), ("POST", "/v1/completions", 503, "unavailable")]
        {
            let request = Request::builder().method(method).uri(path).body(Body::empty());
            let answered = closed(observed.clone()).oneshot(request.expect("a request")).await;
            let response = answered.expect("an answer");
            assert_eq!(response.status(), status, "{path}");
            assert_eq!(error_code(response).await, code, "{path}");
        }
    }

    async fn error_code(response: Response) -> String {
        let body = axum::body::to_bytes(response.into_body(), 4096).await.expect("a body");
        let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        body["error"]["code"].as_str().expect("a code").to_owned()
    }
}
