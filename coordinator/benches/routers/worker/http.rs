//! An instance as the other routers know it: OpenAI's API over HTTP, and what pairs a prefill with a decode worker.
//!
//! SGLang's kind are both sent the same request at once, with a `bootstrap_room` by which decode finds prefill's cache.
//! vLLM's prefill is asked first, for one token, and answers with the `kv_transfer_params` that decode is then sent. A
//! request with neither is answered by this worker alone: so the client asks when there is no router.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use baton_proto::v1;
use futures::StreamExt;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

use super::engine::{Engine, Sequence};
use crate::words::{ANSWER_TOKENS, Words};

/// Longest wait of a decode worker for the other leg.
const OTHER_LEG: Duration = Duration::from_secs(10);
/// Bytes of text for each block of 16 tokens, about.
const BLOCK_BYTES: usize = 80;

/// By which legs of SGLang's kind find each other, by room. One for all workers.
static ROOMS: LazyLock<Mutex<HashMap<u64, Arc<Notify>>>> = LazyLock::new(Mutex::default);

/// Every event of a stream, written beforehand: a token costs this worker little.
pub(crate) struct Frames {
    words: Arc<Words>,
    by_token: HashMap<u32, Bytes>,
    opening: Bytes,
    closing: Bytes,
}

impl Frames {
    pub(crate) fn new(words: &Arc<Words>) -> Self {
        let event = |delta: Value, finish: Option<&str>| {
            let chunk = json!({
                "id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion.chunk", "created": 1_700_000_000,
                "model": words.model,
                "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}],
            });
            format!("data: {chunk}\n\n")
        };
        let text = |text: &str| Bytes::from(event(json!({"content": text}), None));
        Self {
            by_token: words.all.iter().map(|word| (word.token, text(&word.text))).collect(),
            opening: event(json!({"role": "assistant", "content": ""}), None).into(),
            closing: format!("{}data: [DONE]\n\n", event(json!({}), Some("length"))).into(),
            words: words.clone(),
        }
    }

    pub(crate) fn opening(&self) -> &Bytes {
        &self.opening
    }

    /// The event of one token of an answer.
    pub(crate) fn token(&self, seed: u64, position: u32) -> Bytes {
        self.by_token.get(&self.words.answer_at(seed, position).token).cloned().unwrap_or_default()
    }

    /// The last events.
    pub(crate) fn closing(&self) -> &Bytes {
        &self.closing
    }
}

#[derive(Clone)]
struct Worker {
    frames: Arc<Frames>,
    engine: Arc<Engine>,
    role: v1::Role,
}

/// What of a request this worker looks at.
#[derive(Deserialize)]
struct Asked {
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    seed: u64,
    bootstrap_room: Option<u64>,
    kv_transfer_params: Option<TransferParams>,
}

#[derive(Deserialize)]
struct TransferParams {
    #[serde(default)]
    do_remote_decode: bool,
    remote_engine_id: Option<String>,
}

pub(super) async fn serve(listener: TcpListener, frames: Arc<Frames>, engine: Arc<Engine>, role: v1::Role) {
    let (name, vocabulary) = (frames.words.model.clone(), frames.words.vocabulary);
    let info = json!({"model_path": name, "served_model_name": name, "tokenizer_path": name, "is_generation": true,
        "vocab_size": vocabulary, "max_running_requests": 1024, "max_total_num_tokens": 1 << 24, "version": "0",
        "disaggregation_mode": if role == v1::Role::Prefill { "prefill" } else { "decode" }});
    let info = move || async move { Json(info) };
    let listed = json!({"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "bench"}]});
    let router = Router::new()
        .route("/v1/chat/completions", post(complete))
        .route("/v1/models", get(async move || Json(listed)))
        .route("/health", get(async || "ok"))
        .route("/health_generate", get(async || "ok"))
        .route("/get_server_info", get(info.clone()))
        .route("/server_info", get(info.clone()))
        .route("/get_model_info", get(info.clone()))
        .route("/model_info", get(info))
        .fallback(async |uri: Uri| {
            (StatusCode::NOT_FOUND, format!("this worker has nothing at {}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(Worker { frames, engine, role });
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let _ = axum::serve(listener, router).await;
}

async fn complete(State(worker): State<Worker>, body: Bytes) -> Response {
    let asked: Asked = match serde_json::from_slice(&body) {
        Ok(asked) => asked,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    let tokens = match (&asked.bootstrap_room, &asked.kv_transfer_params, worker.role) {
        (Some(room), _, v1::Role::Prefill) => {
            ROOMS.lock().entry(*room).or_default().notify_one();
            1
        }
        (Some(room), ..) => {
            let other = ROOMS.lock().entry(*room).or_default().clone();
            if timeout(OTHER_LEG, other.notified()).await.is_err() {
                return (StatusCode::GATEWAY_TIMEOUT, "prefill was not asked").into_response();
            }
            ROOMS.lock().remove(room);
            ANSWER_TOKENS
        }
        (None, Some(params), v1::Role::Prefill) if params.do_remote_decode => {
            return worker.first_token(&asked, body.len());
        }
        (None, Some(params), v1::Role::Decode) if params.remote_engine_id.as_deref() == Some(ENGINE_ID) => {
            ANSWER_TOKENS
        }
        (None, Some(_), _) => {
            return (StatusCode::BAD_REQUEST, "kv_transfer_params name no cache").into_response();
        }
        (None, None, v1::Role::Prefill) => {
            return (StatusCode::BAD_REQUEST, "prefill is asked for a whole answer").into_response();
        }
        (None, None, _) => ANSWER_TOKENS,
    };
    worker.answer(&asked, tokens).await
}

const ENGINE_ID: &str = "8f0d6a52-prefill";

impl Worker {
    /// What vLLM's prefill says, and with it where its cache is.
    fn first_token(&self, asked: &Asked, bytes: usize) -> Response {
        let blocks: Vec<usize> = (0..bytes.div_ceil(BLOCK_BYTES)).collect();
        let mut whole = self.whole(asked, 1);
        whole["kv_transfer_params"] = json!({
            "do_remote_prefill": true, "do_remote_decode": false, "remote_engine_id": ENGINE_ID,
            "remote_block_ids": blocks, "remote_host": "127.0.0.1", "remote_port": 5600, "tp_size": 1,
        });
        Json(whole).into_response()
    }

    fn whole(&self, asked: &Asked, tokens: u32) -> Value {
        let text: String =
            self.frames.words.answer(asked.seed).take(tokens as usize).map(|word| &*word.text).collect();
        json!({
            "id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion", "created": 1_700_000_000,
            "model": self.frames.words.model,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": null,
                "finish_reason": "length"}],
            "usage": {"prompt_tokens": 30, "completion_tokens": tokens, "total_tokens": 30 + tokens},
        })
    }

    /// The first token is there at once, the others come with the engine's steps.
    async fn answer(&self, asked: &Asked, tokens: u32) -> Response {
        // All events of an answer fit.
        let (sender, mut events) = mpsc::channel(ANSWER_TOKENS as usize + 2);
        let mut sequence =
            Sent { frames: self.frames.clone(), seed: asked.seed, position: 0, tokens, events: sender };
        if asked.stream {
            sequence.send(self.frames.opening.clone());
        }
        let goes_on = sequence.step();
        // One that does not is dropped here: its end is what the reader waits for.
        if goes_on {
            self.engine.add(Box::new(sequence));
        } else {
            drop(sequence);
        }
        if asked.stream {
            let events = ReceiverStream::new(events).map(Ok::<_, Infallible>);
            return ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response();
        }
        while events.recv().await.is_some() {}
        Json(self.whole(asked, tokens)).into_response()
    }
}

/// An answer that is being sent.
struct Sent {
    frames: Arc<Frames>,
    seed: u64,
    position: u32,
    tokens: u32,
    events: mpsc::Sender<Bytes>,
}

impl Sent {
    fn send(&self, event: Bytes) -> bool {
        self.events.try_send(event).is_ok()
    }
}

impl Sequence for Sent {
    fn step(&mut self) -> bool {
        let event = self.frames.token(self.seed, self.position);
        self.position += 1;
        let last = self.position == self.tokens;
        // A receiver that is gone has left.
        let goes_on = self.send(event) && !last;
        if last {
            self.send(self.frames.closing.clone());
        }
        goes_on
    }
}
