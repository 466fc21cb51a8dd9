//! An instance as Baton's coordinator knows it: one stream for all legs, one message a step.
//!
//! A prefill leg has its token at once and hands over; the decode leg of the same transfer goes on from there with the next
//! step. Loads are told as often as the coordinator asks, and count the coordinator's own legs.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, LazyLock},
    time::Duration,
};

use baton_process::{
    Closed, HealthHandle, Tls,
    grpc::{self, GrpcOptions, KeepAlive},
    tls::Door,
};
use baton_proto::{BlockHash, tokens, v1};
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, service::Routes};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer, dispatch::Work, leg_output::End};

use super::{
    cache::{self, Cache},
    engine::{Engine, Sequence},
    outbox::Outbox,
};
use crate::words::{ANSWER_TOKENS, Words};

/// As servers take them, so that a prompt of 32k tokens comes in one.
const FRAME_BYTES: u32 = 160 << 10;
/// As many blocks as no line of the bench fills.
const BLOCKS: u32 = 1 << 20;
/// Sequences that an instance says it decodes at a time.
const SEQUENCES_MOST: u32 = 16_384;

/// Of each transfer, the leg that came first. One for all instances.
static TRANSFERS: LazyLock<Mutex<HashMap<Vec<u8>, First>>> = LazyLock::new(Mutex::default);

/// See the module.
#[derive(Clone)]
pub(super) struct Instance {
    id: String,
    role: v1::Role,
    words: Arc<Words>,
    engine: Arc<Engine>,
    cache: Arc<Cache>,
}

impl Instance {
    pub(super) fn new(id: String, role: v1::Role, words: Arc<Words>, engine: Arc<Engine>) -> Self {
        let cache = Arc::new(Cache::default());
        Self { id, role, words, engine, cache }
    }

    /// As real servers are served.
    pub(super) async fn serve(self, listener: std::net::TcpListener) {
        let cache = v1::kv_cache_server::KvCacheServer::from_arc(self.cache.clone());
        let inference = v1::inference_server::InferenceServer::new(self);
        let options = GrpcOptions {
            health: HealthHandle::default(),
            services: Vec::new(),
            descriptors: baton_proto::FILE_DESCRIPTOR_SET,
            tls: Tls::plaintext(),
            door: Door::default(),
            shutdown: CancellationToken::new(),
            drain: Duration::ZERO,
            keep_alive: KeepAlive::default(),
            connections: grpc::CONNECTIONS,
            frame_bytes: FRAME_BYTES,
            closed: Closed::default(),
        };
        // The bench ends with its processes; a server that ends before has nobody left to serve.
        let _ = grpc::serve(listener, Routes::new(inference).add_service(cache), options).await;
    }
}

/// A leg that waits for the other of its transfer.
struct First {
    /// What their prompt's blocks are called.
    names: Vec<BlockHash>,
    /// None: it is prefill's.
    decode: Option<Leg>,
}

/// A leg that has tokens to bring.
struct Leg {
    leg: u64,
    position: u32,
    /// Told at a time, but for the first; what has not been told yet.
    at_a_time: usize,
    begun: bool,
    untold: Vec<u32>,
    seed: u64,
    prompt_tokens: u32,
    words: Arc<Words>,
    stream: Arc<Attached>,
}

/// What the legs of one stream share.
#[derive(Default)]
struct Attached {
    outbox: Outbox,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where in the engine a leg is, for those that step.
    running: HashMap<u64, u64>,
    seen_leg: u64,
    dispatches: u64,
    prompt_tokens: u64,
}

impl Leg {
    /// What there is to tell, the token at its position the last of it.
    fn output(&mut self, end: Option<v1::FinishReason>) -> v1::LegOutput {
        let finished = |reason: v1::FinishReason| {
            End::Finished(v1::Finished {
                reason: reason.into(),
                prompt_tokens: self.prompt_tokens,
                cached_tokens: 0,
                completion_tokens: self.position + 1,
            })
        };
        v1::LegOutput {
            leg: self.leg,
            choice: 0,
            first_position: self.position + 1 - self.untold.len() as u32,
            tokens: std::mem::take(&mut self.untold),
            logprobs: Vec::new(),
            cached_tokens: None,
            end: end.map(finished),
        }
    }

    fn run(self, engine: &Engine) {
        let (stream, leg) = (self.stream.clone(), self.leg);
        let id = engine.add(Box::new(self));
        stream.state.lock().running.insert(leg, id);
    }
}

impl Sequence for Leg {
    fn step(&mut self) -> bool {
        let last = self.position + 1 == ANSWER_TOKENS;
        self.untold.push(self.words.answer_at(self.seed, self.position).token);
        if last || !self.begun || self.untold.len() >= self.at_a_time {
            let output = self.output(last.then_some(v1::FinishReason::Length));
            self.stream.outbox.put(output);
        }
        self.begun = true;
        self.position += 1;
        if last {
            self.stream.state.lock().running.remove(&self.leg);
        }
        !last
    }
}

impl Instance {
    fn dispatched(&self, dispatch: v1::Dispatch, stream: &Arc<Attached>) {
        let prompt_tokens = (dispatch.prompt_tokens.len() / size_of::<u32>()) as u32;
        {
            let mut state = stream.state.lock();
            state.seen_leg = dispatch.leg;
            state.dispatches += 1;
            state.prompt_tokens += u64::from(prompt_tokens);
        }
        let names = || cache::names(&tokens::from_wire(&dispatch.prompt_tokens).unwrap_or_default());
        let seed = dispatch.sampling.as_ref().map_or(0, |sampling| sampling.seed);
        let leg = |position| Leg {
            leg: dispatch.leg,
            position,
            at_a_time: dispatch.tokens_at_a_time.max(1) as usize,
            begun: false,
            untold: Vec::new(),
            seed,
            prompt_tokens,
            words: self.words.clone(),
            stream: stream.clone(),
        };
        let (transfer, decode) = match &dispatch.work {
            Some(Work::Prefill(prefill)) => {
                let mut leg = leg(0);
                leg.untold.push(self.words.answer_at(seed, 0).token);
                stream.outbox.put(leg.output(Some(v1::FinishReason::HandedOff)));
                (prefill.transfer_id.to_vec(), None)
            }
            Some(Work::Decode(decode)) => (decode.transfer_id.to_vec(), Some(leg(1))),
            Some(Work::Whole(_)) => {
                self.cache.store(&names());
                return leg(0).run(&self.engine);
            }
            None => return,
        };
        let first = TRANSFERS.lock().remove(&transfer);
        let Some(first) = first else {
            let names = names();
            self.cache.store(&names);
            TRANSFERS.lock().insert(transfer, First { names, decode });
            return;
        };
        // Of both instances, but computed once: the second would only take time from who is measured.
        self.cache.store(&first.names);
        if let Some(decode) = first.decode.or(decode) {
            decode.run(&self.engine);
        }
    }

    fn cancelled(&self, leg: u64, stream: &Attached) {
        let running = stream.state.lock().running.remove(&leg);
        if let Some(id) = running {
            self.engine.remove(id);
        }
        let cancelled = v1::Finished { reason: v1::FinishReason::Cancelled.into(), ..Default::default() };
        stream.outbox.put(v1::LegOutput { leg, end: Some(End::Finished(cancelled)), ..Default::default() });
    }

    fn load(stream: &Attached) -> v1::InstanceLoad {
        let state = stream.state.lock();
        let running = state.running.len() as u32;
        v1::InstanceLoad {
            running_sequences: running,
            kv_blocks_total: BLOCKS,
            kv_blocks_free: BLOCKS,
            prefill_tokens_per_second: 1_000_000,
            decode_step_micros: 5_000,
            max_sequences: SEQUENCES_MOST,
            seen_leg: Some(state.seen_leg),
            accepted_requests: state.dispatches,
            accepted_prompt_tokens: state.prompt_tokens,
            ..Default::default()
        }
    }
}

#[tonic::async_trait]
impl v1::inference_server::Inference for Instance {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::AttachResponse, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut frames = request.into_inner();
        let Some(v1::AttachRequest { frame: Some(Ask::Hello(hello)) }) = frames.message().await? else {
            return Err(Status::invalid_argument("the first frame must be a hello"));
        };
        let attached = Arc::new(Attached::default());
        let (instance, stream) = (self.clone(), attached.clone());
        tokio::spawn(async move {
            while let Ok(Some(v1::AttachRequest { frame: Some(frame) })) = frames.message().await {
                match frame {
                    Ask::Dispatch(dispatch) => instance.dispatched(dispatch, &stream),
                    Ask::Cancel(cancel) => instance.cancelled(cancel.leg, &stream),
                    Ask::Hello(_) => break,
                }
            }
            stream.outbox.close();
        });
        let stream = attached.clone();
        let every = Duration::from_millis(u64::from(hello.load_interval_millis.clamp(20, 1000)));
        tokio::spawn(async move {
            let (mut ticks, mut told) = (interval(every), None);
            while !stream.outbox.is_closed() {
                ticks.tick().await;
                let load = Self::load(&stream);
                if told.as_ref() != Some(&load) {
                    stream.outbox.tell(load);
                    told = Some(load);
                }
            }
        });
        let role = v1::RoleChange { role: self.role.into(), epoch: 1, phase: v1::Phase::Ready.into() };
        let welcome =
            v1::attach_response::Welcome { instance_id: self.id.clone(), incarnation: 1, role: Some(role) };
        let welcome = v1::AttachResponse { frame: Some(Answer::Welcome(welcome)) };
        let rest = stream::unfold(attached, |attached| async {
            let message = attached.outbox.next().await?;
            Some((Ok(message), attached))
        });
        let first = stream::iter([Ok(welcome)]);
        Ok(Response::new(Box::pin(first.chain(rest))))
    }
}
