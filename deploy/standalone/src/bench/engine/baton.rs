//! One `baton-server` on its own, role `mixed`, asked over gRPC as a coordinator would ask it: batching, paging, sampling
//! and the wire are all in the figures.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use baton_proto::v1::{
    self, attach_request::Frame as Ask, attach_response::Frame as Answer, dispatch::Work as Leg,
    inference_client::InferenceClient,
};
use command_fds::{CommandFdExt, FdMapping};
use tokio::{
    process::{Child, ChildStdin, Command},
    sync::mpsc,
};
use tonic::Streaming;

use super::{super::prompt::mix, EngineError, Rates, Work};

/// Where the child finds the socket it serves on.
const SOCKET: i32 = 3;
/// Between looks whether the child answers yet.
const POLL: Duration = Duration::from_millis(50);
/// How long a child that was told to end may take.
const GRACE: Duration = Duration::from_secs(5);
/// The KV cache's blocks are counted by this many tokens at least.
const SMALLEST_BLOCK: u32 = 16;
/// First token id that is surely plain text.
const PLAIN: u64 = 100;
const MODEL: &str = "bench";

/// The server that came with this program.
pub(super) fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("baton-server")
}

/// A running server and the one stream to it.
pub(super) struct Baton {
    child: Child,
    /// Open for as long as the server is to run.
    stdin: Option<ChildStdin>,
    ask: mpsc::Sender<v1::AttachRequest>,
    answers: Streaming<v1::AttachResponse>,
    incarnation: u64,
    role_epoch: u64,
    vocabulary: u32,
    legs: u64,
}

impl Baton {
    /// Starts the server beside this program and waits until it serves.
    pub(super) async fn start(
        model: &Path,
        vocabulary: u32,
        threads: u16,
        works: &[Work],
        set: &[String],
    ) -> Result<Self, EngineError> {
        let program = program();
        let failed = |source| EngineError::Spawn { program: program.clone(), source };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let log = tempfile::tempfile().map_err(failed)?;
        let blocks =
            |work: &Work| work.sequences * ((work.prompt_tokens + work.decode_tokens) / SMALLEST_BLOCK + 4);
        let mut settings = vec![
            format!("model.path={}", model.display()),
            format!("model.name={MODEL}"),
            "role=mixed".to_owned(),
            format!("listen=fd://{SOCKET}"),
            format!("runtime.threads={threads}"),
            format!("runtime.kv_blocks={}", works.iter().map(blocks).max().unwrap_or(1)),
            "process.log.level=warn".to_owned(),
        ];
        settings.extend_from_slice(set);
        let mut command = Command::new(&program);
        command
            .arg("--supervised")
            .args(settings.iter().flat_map(|setting| ["--set", setting.as_str()]))
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log.try_clone().map_err(failed)?)
            .kill_on_drop(true);
        let mapping = FdMapping { parent_fd: listener.into(), child_fd: SOCKET };
        command.fd_mappings(vec![mapping]).map_err(|error| failed(std::io::Error::other(error)))?;
        let child = command.spawn().map_err(failed)?;
        Self::attach(child, log, &address.to_string(), vocabulary).await
    }

    async fn attach(
        mut child: Child,
        mut log: File,
        address: &str,
        vocabulary: u32,
    ) -> Result<Self, EngineError> {
        // Waiting for a child closes its standard input.
        let stdin = child.stdin.take();
        let (ask, mut answers) = loop {
            let (ask, asked) = mpsc::channel(64);
            let hello = v1::attach_request::Hello { coordinator_id: MODEL.to_owned() };
            // A new channel holds at least one.
            let _ = ask.try_send(v1::AttachRequest { frame: Some(Ask::Hello(hello)) });
            let connecting = async {
                let mut client = InferenceClient::connect(format!("http://{address}")).await.ok()?;
                client.attach(tokio_stream::wrappers::ReceiverStream::new(asked)).await.ok()
            };
            tokio::select! {
                biased;
                _ = child.wait() => return Err(EngineError::ServerEnded(last_words(&mut log))),
                answered = connecting => if let Some(answers) = answered { break (ask, answers.into_inner()) },
            }
            tokio::time::sleep(POLL).await;
        };
        let mut incarnation = 0;
        loop {
            let role = match next(&mut answers).await? {
                Answer::Welcome(welcome) => {
                    incarnation = welcome.incarnation;
                    welcome.role
                }
                Answer::Role(role) => Some(role),
                Answer::Step(_) | Answer::Load(_) => None,
            };
            if let Some(role) = role.filter(|role| role.phase() == v1::Phase::Ready) {
                let role_epoch = role.epoch;
                return Ok(Self { child, stdin, ask, answers, incarnation, role_epoch, vocabulary, legs: 0 });
            }
        }
    }

    /// Prefill is timed to the last sequence's first token; decode from there to the first sequence's end, when every
    /// sequence is in every step.
    pub(super) async fn measure(&mut self, work: Work, seed: u32) -> Result<Rates, EngineError> {
        let first = self.legs;
        let begin = Instant::now();
        for _ in 0..work.sequences {
            // A prompt that no leg had before: none of it is in the prefix cache.
            let leg = self.dispatch(work, mix(seed.into()) ^ self.legs);
            let sent = self.ask.send(v1::AttachRequest { frame: Some(Ask::Dispatch(leg)) }).await;
            sent.map_err(|_| EngineError::Refused("it is gone".to_owned()))?;
        }
        let mut counts = vec![0_usize; work.sequences as usize];
        let (mut ended, mut all_began, mut window) = (0, None, None);
        while ended < work.sequences {
            let Answer::Step(step) = next(&mut self.answers).await? else { continue };
            let now = Instant::now();
            for leg in step.legs {
                let index = (leg.leg - first) as usize;
                counts[index] += leg.tokens.len();
                match leg.end {
                    Some(v1::leg_output::End::Failed(detail)) => {
                        return Err(EngineError::Refused(detail.message));
                    }
                    Some(v1::leg_output::End::Finished(_)) => ended += 1,
                    None => {}
                }
            }
            let total: usize = counts.iter().sum();
            if all_began.is_none() && counts.iter().all(|&count| count > 0) {
                all_began = Some((now, total));
            }
            if ended > 0 && window.is_none() {
                window = Some((now, total));
            }
        }
        let ((began, at_first), (ended, at_end)) =
            all_began.zip(window).ok_or_else(|| EngineError::Refused("it sent no tokens".to_owned()))?;
        Ok(Rates {
            prefill: f64::from(work.sequences * work.prompt_tokens) / (began - begin).as_secs_f64(),
            decode: (at_end - at_first) as f64 / (ended - began).as_secs_f64(),
        })
    }

    fn dispatch(&mut self, work: Work, seed: u64) -> v1::Dispatch {
        let leg = self.legs;
        self.legs += 1;
        let plain = u64::from(self.vocabulary).saturating_sub(PLAIN).max(1);
        let token =
            |i: u32| (PLAIN.min(u64::from(self.vocabulary) - 1) + mix(seed ^ mix(i.into())) % plain) as u32;
        let token = |i| token(i).min(self.vocabulary - 1);
        // Sequences that begin first go on while the others are still prefilled: a step each.
        let max_tokens = 1 + work.decode_tokens + work.sequences * 2;
        v1::Dispatch {
            leg,
            request_id: format!("bench-{leg}"),
            incarnation: self.incarnation,
            role_epoch: self.role_epoch,
            model: MODEL.to_owned(),
            prompt_tokens: (0..work.prompt_tokens).map(token).collect(),
            sampling: Some(v1::Sampling {
                top_p: 1.0,
                repetition_penalty: 1.0,
                max_tokens,
                ..v1::Sampling::default()
            }),
            work: Some(Leg::Whole(v1::dispatch::Whole {})),
            ..v1::Dispatch::default()
        }
    }

    /// Ends the server; one that does not end in time is killed.
    pub(super) async fn stop(mut self) {
        drop(self.stdin.take());
        // Whatever comes of it, dropping the child kills it.
        let _ = tokio::time::timeout(GRACE, self.child.wait()).await;
    }
}

async fn next(answers: &mut Streaming<v1::AttachResponse>) -> Result<Answer, EngineError> {
    loop {
        match answers.message().await.map_err(EngineError::Server)? {
            Some(v1::AttachResponse { frame: Some(answer) }) => return Ok(answer),
            Some(_) => {}
            None => return Err(EngineError::Refused("it closed the stream".to_owned())),
        }
    }
}

fn last_words(log: &mut File) -> String {
    let mut words = String::new();
    // A log that cannot be read says nothing.
    let _ = log.seek(SeekFrom::Start(0)).and_then(|_| log.read_to_string(&mut words));
    words.trim().lines().last().unwrap_or("it said nothing").to_owned()
}
