//! Instances and a coordinator for tests, all in one process and over real sockets.

// Each test file uses its own part of this.
#![allow(dead_code, unused_imports, unreachable_pub)]

use std::{collections::HashMap, net::TcpListener, sync::Arc, time::Duration};

use baton_process::{Metrics, Tls, tls};
use baton_proto::{ErrorCode, Incarnation, InstanceId, RoleEpoch, Tokens, v1};
use baton_runtime::Executor;
use baton_server::{
    config::HandoffConfig,
    engine::{
        load::Load,
        sampler::{Sampler, SamplingParams, TokenCounts},
        scheduler::Limits,
        thread::{COMMAND_QUEUE, Command},
    },
    handoff::kv_layout,
    inference::dispatch::InstanceFacts,
    permits::Permits,
    role::{Phase, Role, RoleView},
    serving::{Serving, ServingParts, Shared},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Streaming;

pub mod model;
mod pair;
pub mod wire;

pub use pair::{Pair, apart, handed_on};

/// Nothing in a test takes longer, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub const EPOCH: u64 = 7;

/// One instance: engine, transfers, gRPC; the role is the test's to set.
pub struct Instance {
    pub id: String,
    pub incarnation: u64,
    pub endpoint: String,
    pub role: watch::Sender<RoleView>,
    pub load: watch::Receiver<Load>,
    pub engine: mpsc::Sender<Command>,
    pub faults: Arc<model::Faults>,
    pub metrics: Metrics,
    pub permits: Permits,
    pub stop: CancellationToken,
    tasks: TaskTracker,
}

/// How an instance differs from the usual one.
#[derive(Clone)]
pub struct Shape {
    pub blocks: u32,
    pub max_batch_tokens: u32,
    pub max_sequences: u32,
    pub max_waiting: u32,
    pub lease: Duration,
    /// Whether KV caches come over a wire that can damage them.
    pub wire: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            blocks: 200,
            max_batch_tokens: 32,
            max_sequences: 16,
            max_waiting: 64,
            lease: Duration::from_secs(2),
            wire: false,
        }
    }
}

impl Instance {
    pub async fn start(id: &str, role: Role, shape: Shape) -> Self {
        let faults = Arc::new(model::Faults { has_wire: shape.wire, ..model::Faults::default() });
        let executor = Box::new(model::HashModel::new(shape.blocks, faults.clone()));
        let limits = Limits {
            max_batch_tokens: shape.max_batch_tokens,
            max_sequences: shape.max_sequences,
            max_waiting: shape.max_waiting,
            context_tokens: model::CONTEXT_TOKENS,
            block_tokens: model::BLOCK_TOKENS,
            prefix_cache: true,
        };
        let handoff = HandoffConfig { lease: shape.lease, timeout: PATIENCE, ..HandoffConfig::default() };
        Self::over(id, role, executor, limits, handoff, faults).await
    }

    /// An instance over any model.
    pub async fn over(
        id: &str,
        role: Role,
        executor: Box<dyn Executor>,
        limits: Limits,
        handoff: HandoffConfig,
        faults: Arc<model::Faults>,
    ) -> Self {
        let (engine, commands) = mpsc::channel(COMMAND_QUEUE);
        let (epoch, phase) = (RoleEpoch(EPOCH), Phase::Ready);
        let view = RoleView { role, epoch, phase, load_permille: 1000, cordoned: false };
        let (role, role_seen) = watch::channel(view);
        let (load_shown, load) = watch::channel(Load::default());
        let (stop, tasks, permits) = (CancellationToken::new(), TaskTracker::new(), Permits::default());
        let incarnation = u64::from(id.as_bytes()[0]);
        let facts = InstanceFacts {
            instance_id: InstanceId::new(id).expect("a name"),
            incarnation: Incarnation(incarnation),
            model: "hash".into(),
            vocabulary: executor.shape().vocabulary,
            context_tokens: limits.context_tokens,
        };
        let data_listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        data_listener.set_nonblocking(true).expect("a socket");
        let data_address = data_listener.local_addr().expect("an address");
        let data_endpoint = if faults.has_wire {
            wire::open(data_address, faults.clone(), stop.clone()).await
        } else {
            data_address.to_string()
        };
        let handoff = match faults.has_wire {
            true => HandoffConfig { transports: vec!["tcp".into()], ..handoff },
            false => handoff,
        };
        let metrics = Metrics::new("server");
        let serving = Serving::start(ServingParts {
            layout: kv_layout(executor.kv_pool().layout(), "r1"),
            executor,
            limits,
            handoff,
            data_endpoint,
            peers: Tls::plaintext().dial(tls::Role::Server),
            data_listener,
            commands,
            load: load_shown,
            metrics: metrics.clone(),
            shared: Shared {
                facts: Arc::new(facts),
                role: role_seen,
                load: load.clone(),
                engine: engine.clone(),
                permits: permits.clone(),
                tasks: tasks.clone(),
                stop: stop.clone(),
            },
        })
        .expect("it starts");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let endpoint = listener.local_addr().expect("an address").to_string();
        let server = tonic::transport::Server::builder().add_routes(serving.routes());
        let until = stop.clone();
        tasks.spawn(async move {
            let serve = server.serve_with_incoming(TcpListenerStream::new(listener));
            tokio::select! {
                () = until.cancelled() => {}
                served = serve => served.expect("it serves"),
            }
        });
        Self {
            id: id.into(),
            incarnation,
            endpoint,
            role,
            load,
            engine,
            faults,
            metrics,
            permits,
            stop,
            tasks,
        }
    }

    /// Waits until nobody holds a block and nothing is left of any leg.
    pub async fn until_idle(&mut self) {
        let mut load = self.load.clone();
        let idle = load.wait_for(|load| {
            let occupancy = &load.occupancy;
            occupancy.blocks_total > 0
                && occupancy.blocks_free == occupancy.blocks_total
                && occupancy.running + occupancy.waiting + occupancy.leaving == 0
        });
        match tokio::time::timeout(PATIENCE, idle).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => panic!("the engine of {} is gone", self.id),
            Err(_) => panic!("{} is not idle: {:?}", self.id, *self.load.borrow()),
        }
        tokio::time::timeout(PATIENCE, self.permits.none_taken()).await.expect("no permit is kept");
    }

    pub async fn until_metric(&self, name: &str, enough: impl Fn(f64) -> bool) {
        let reached = async {
            while !enough(self.metric(name)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap_or_else(|_| panic!("{name} stays {}", self.metric(name)));
    }

    pub fn preemptions(&self) -> u64 {
        self.load.borrow().occupancy.counts.preemptions
    }

    /// The value of a metric; of one with labels, if the name has none, the sum.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.render();
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
        let values: Vec<f64> =
            text.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert!(!values.is_empty(), "no {name} in\n{text}");
        values.iter().sum()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What a leg has said.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<v1::TokenLogprobs>,
    pub first_position: Option<u32>,
    /// Of the prompt, as it was said with the first tokens.
    pub cached: Option<u32>,
    pub end: Option<v1::leg_output::End>,
}

/// One coordinator's stream to one instance.
pub struct Attached {
    pub requests: mpsc::Sender<v1::AttachRequest>,
    responses: Streaming<v1::AttachResponse>,
    /// By leg and choice.
    heard: HashMap<(u64, u32), Heard>,
    target: Target,
}

/// What a coordinator believes of an instance.
#[derive(Debug, Clone)]
pub struct Target {
    pub instance: String,
    pub incarnation: u64,
    pub epoch: u64,
    pub model: String,
}

impl Attached {
    pub async fn to(instance: &Instance) -> Self {
        let (id, incarnation) = (instance.id.clone(), instance.incarnation);
        let target = Target { instance: id, incarnation, epoch: EPOCH, model: "hash".into() };
        Self::open(&instance.endpoint, target).await
    }

    /// Of a coordinator that wants to be told the load every so many milliseconds.
    pub async fn told_every(millis: u32, instance: &Instance) -> Self {
        let (id, incarnation) = (instance.id.clone(), instance.incarnation);
        let target = Target { instance: id, incarnation, epoch: EPOCH, model: "hash".into() };
        Self::greet(&instance.endpoint, target, millis).await
    }

    pub async fn open(endpoint: &str, target: Target) -> Self {
        Self::greet(endpoint, target, 0).await
    }

    async fn greet(endpoint: &str, target: Target, load_interval_millis: u32) -> Self {
        let endpoint = format!("http://{endpoint}");
        let mut client = v1::inference_client::InferenceClient::connect(endpoint).await.expect("it listens");
        let (requests, outgoing) = mpsc::channel(64);
        let hello = v1::attach_request::Hello { coordinator_id: "c".into(), load_interval_millis };
        let hello = v1::AttachRequest { frame: Some(v1::attach_request::Frame::Hello(hello)) };
        requests.send(hello).await.expect("room");
        let responses = client.attach(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        let mut this = Self { requests, responses, heard: HashMap::new(), target };
        match this.frame().await {
            Some(v1::attach_response::Frame::Welcome(welcome)) => {
                assert_eq!(welcome.instance_id, this.target.instance)
            }
            other => panic!("expected welcome, got {other:?}"),
        }
        this
    }

    pub async fn frame(&mut self) -> Option<v1::attach_response::Frame> {
        let message =
            tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("a frame in time");
        message.ok().flatten()?.frame
    }

    pub async fn send(&self, frame: v1::attach_request::Frame) {
        self.requests.send(v1::AttachRequest { frame: Some(frame) }).await.expect("an open stream");
    }

    pub async fn dispatch(&self, leg: u64, request: &Request, work: v1::dispatch::Work) {
        let dispatch = v1::Dispatch {
            leg,
            request_id: format!("r{leg}"),
            incarnation: self.target.incarnation,
            role_epoch: self.target.epoch,
            model: self.target.model.clone(),
            prompt_tokens: Tokens::from(&request.prompt[..]).to_wire(),
            generated_tokens: request.generated.clone(),
            sampling: Some(request.sampling.clone()),
            timeout_millis: request.timeout_millis,
            priority: request.priority,
            first_token_within_millis: 0,
            work: Some(work),
            ..Default::default()
        };
        self.send(v1::attach_request::Frame::Dispatch(dispatch)).await;
    }

    pub async fn cancel_choice(&self, leg: u64, choice: u32) {
        let cancel = v1::Cancel { leg, reason: "test".into(), choice: Some(choice), damaged: false };
        self.send(v1::attach_request::Frame::Cancel(cancel)).await;
    }

    pub async fn cancel(&self, leg: u64) {
        self.cancel_with(v1::Cancel { leg, reason: "test".into(), ..Default::default() }).await;
    }

    pub async fn cancel_with(&self, cancel: v1::Cancel) {
        self.send(v1::attach_request::Frame::Cancel(cancel)).await;
    }

    /// Reads until `enough` of a leg's first choice. Checks that no token is lost, repeated or late.
    pub async fn until(&mut self, leg: u64, enough: impl Fn(&Heard) -> bool) -> Heard {
        self.until_of_choice(leg, 0, enough).await
    }

    pub async fn until_of_choice(&mut self, leg: u64, choice: u32, enough: impl Fn(&Heard) -> bool) -> Heard {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let heard = self.heard.entry((leg, choice)).or_default();
            if enough(heard) {
                return heard.clone();
            }
            let frame = tokio::time::timeout_at(deadline, self.frame()).await;
            match frame.unwrap_or_else(|_| panic!("leg {leg} hangs: {:?}", self.heard)) {
                Some(v1::attach_response::Frame::Step(step)) => {
                    step.legs.into_iter().for_each(|leg| self.hear(leg))
                }
                Some(_) => {}
                None => panic!("the stream ended before leg {leg}: {:?}", self.heard),
            }
        }
    }

    /// Checks that no token is lost, repeated or late.
    pub fn hear(&mut self, output: v1::LegOutput) {
        let heard = self.heard.entry((output.leg, output.choice)).or_default();
        assert!(heard.end.is_none(), "leg {} goes on after its end", output.leg);
        let first = *heard.first_position.get_or_insert(output.first_position);
        assert_eq!(first + heard.tokens.len() as u32, output.first_position, "leg {} has a gap", output.leg);
        heard.tokens.extend(output.tokens);
        heard.logprobs.extend(output.logprobs);
        heard.cached = heard.cached.or(output.cached_tokens);
        heard.end = output.end;
    }

    pub async fn until_end(&mut self, leg: u64) -> Heard {
        self.until(leg, |heard| heard.end.is_some()).await
    }

    pub async fn until_tokens(&mut self, leg: u64, count: usize) -> Heard {
        self.until(leg, |heard| heard.tokens.len() >= count || heard.end.is_some()).await
    }
}

impl Heard {
    pub fn finished(&self) -> v1::FinishReason {
        match &self.end {
            Some(v1::leg_output::End::Finished(finished)) => finished.reason(),
            other => panic!("not finished: {other:?}"),
        }
    }

    pub fn cached_tokens(&self) -> u32 {
        match &self.end {
            Some(v1::leg_output::End::Finished(finished)) => finished.cached_tokens,
            other => panic!("not finished: {other:?}"),
        }
    }

    pub fn failed(&self) -> ErrorCode {
        match &self.end {
            Some(v1::leg_output::End::Failed(error)) => ErrorCode::from_wire(error.code()),
            other => panic!("not failed: {other:?}"),
        }
    }
}

/// What a client wants.
#[derive(Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// What there is of the completion already.
    pub generated: Vec<u32>,
    pub sampling: v1::Sampling,
    pub timeout_millis: u64,
    pub priority: i32,
}

impl Request {
    pub fn greedy(prompt_tokens: u32, max_tokens: u32) -> Self {
        let sampling = v1::Sampling { top_p: 1.0, repetition_penalty: 1.0, max_tokens, ..Default::default() };
        let prompt = (0..prompt_tokens).map(|i| (i * 7 + prompt_tokens) % model::VOCABULARY).collect();
        Self { prompt, generated: Vec::new(), sampling, timeout_millis: 0, priority: 0 }
    }

    pub fn sampled(prompt_tokens: u32, max_tokens: u32, seed: u64) -> Self {
        let mut request = Self::greedy(prompt_tokens, max_tokens);
        request.sampling = v1::Sampling {
            temperature: 0.9,
            top_p: 0.95,
            top_k: 40,
            min_p: 0.01,
            frequency_penalty: 0.3,
            presence_penalty: 0.2,
            repetition_penalty: 1.1,
            seed,
            ..request.sampling
        };
        request
    }

    /// The request that has one of its choices for its only one.
    pub fn of_choice(&self, choice: u32) -> Self {
        let mut request = self.clone();
        request.sampling.choices = 1;
        request.sampling.seed += u64::from(choice);
        request
    }

    /// The request as it goes on after the first tokens of its completion.
    pub fn after(&self, tokens: usize) -> Self {
        Self { generated: self.expected()[..tokens].to_vec(), ..self.clone() }
    }

    /// The completion, from the model's definition.
    pub fn expected(&self) -> Vec<u32> {
        let s = &self.sampling;
        let params = SamplingParams {
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            frequency_penalty: s.frequency_penalty,
            presence_penalty: s.presence_penalty,
            repetition_penalty: s.repetition_penalty,
            seed: s.seed,
            logit_bias: s.logit_bias.iter().map(|bias| (bias.token, bias.bias)).collect(),
            min_tokens: s.min_tokens,
            stop_tokens: s.stop_token_ids.clone(),
        };
        let (mut tokens, mut completion) = (self.prompt.clone(), Vec::new());
        while completion.len() < s.max_tokens as usize && tokens.len() < model::CONTEXT_TOKENS as usize {
            let counts = TokenCounts::new(&self.prompt, &completion);
            let logits = model::reference_logits(&tokens);
            let position = completion.len() as u32;
            let token =
                Sampler::default().sample(&logits, &params, Some(&counts), position).expect("a token");
            tokens.push(token);
            completion.push(token);
            if s.stop_token_ids.contains(&token) {
                break;
            }
        }
        completion
    }
}

pub fn is_failure(end: &v1::leg_output::End) -> bool {
    matches!(end, v1::leg_output::End::Failed(_))
}

pub fn whole() -> v1::dispatch::Work {
    v1::dispatch::Work::Whole(v1::dispatch::Whole {})
}
