//! One `baton-server` of its own, without a controller, asked over gRPC as a coordinator would ask it.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use baton_proto::{
    Tokens,
    v1::{
        self, attach_request::Frame as Ask, attach_response::Frame as Answer, dispatch::Work as Leg,
        inference_client::InferenceClient,
    },
};
use command_fds::{CommandFdExt, FdMapping};
use tempfile::NamedTempFile;
use tokio::{
    process::{Child, ChildStdin, Command},
    sync::mpsc,
};
use tonic::Streaming;

use super::prompt::mix;

/// Where the child finds the socket it serves on.
const SOCKET: i32 = 3;
/// Between looks whether the child answers yet.
const POLL: Duration = Duration::from_millis(50);
/// How long a child that was told to end may take.
const GRACE: Duration = Duration::from_secs(5);
/// First token id that is surely plain text.
const PLAIN: u64 = 100;
/// What the server calls its model, and whoever asks it.
const NAME: &str = "bench";

/// The program that came with this one.
pub(super) fn program() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("baton-server")
}

/// Why a server could not be had or asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("cannot start {program}")]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error("the server ended before it was ready: {0}")]
    Ended(String),
    #[error("the server cannot be talked to")]
    Call(#[source] tonic::Status),
    #[error("the server's log cannot be read")]
    Log(#[source] std::io::Error),
    #[error("the server refused the work: {0}")]
    Refused(String),
}

/// A running server and the one stream to it.
pub(super) struct Server {
    child: Child,
    /// Open for as long as the server is to run.
    stdin: Option<ChildStdin>,
    log: NamedTempFile,
    ask: mpsc::Sender<v1::AttachRequest>,
    answers: Streaming<v1::AttachResponse>,
    address: String,
    incarnation: u64,
    role_epoch: u64,
    legs: u64,
}

impl Server {
    /// Starts the program beside this one with these settings, `KEY=VALUE`, and waits until it is ready.
    pub(super) async fn start(model: &Path, role: &str, settings: &[String]) -> Result<Self, ServerError> {
        let program = program();
        let failed = |source| ServerError::Spawn { program: program.clone(), source };
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?.to_string();
        let log = NamedTempFile::new().map_err(failed)?;
        let own = [
            format!("instance_id={role}"),
            format!("model.path={}", model.display()),
            format!("model.name={NAME}"),
            format!("role={role}"),
            format!("listen=fd://{SOCKET}"),
            "process.log.level=warn".to_owned(),
        ];
        let mut command = Command::new(&program);
        command
            .arg("--supervised")
            .args(own.iter().chain(settings).flat_map(|setting| ["--set", setting.as_str()]))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log.reopen().map_err(failed)?)
            .kill_on_drop(true);
        let mapping = FdMapping { parent_fd: listener.into(), child_fd: SOCKET };
        command.fd_mappings(vec![mapping]).map_err(|error| failed(std::io::Error::other(error)))?;
        let mut child = command.spawn().map_err(failed)?;
        // Waiting for a child closes its standard input.
        let stdin = child.stdin.take();
        let (ask, mut answers) = attach(&mut child, &log, &address).await?;
        let (incarnation, role_epoch) = ready(&mut answers).await?;
        Ok(Self { child, stdin, log, ask, answers, address, incarnation, role_epoch, legs: 0 })
    }

    /// `host:port` of its gRPC services.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// The number that the next leg will have.
    pub(super) fn next_leg(&self) -> u64 {
        self.legs
    }

    /// What a leg's request is called.
    pub(super) fn request_id(leg: u64) -> String {
        format!("{NAME}-{leg}")
    }

    /// Sends a leg off, which is decoded greedily to exactly so many tokens.
    pub(super) async fn dispatch(
        &mut self,
        prompt_tokens: Vec<u32>,
        max_tokens: u32,
        work: Leg,
    ) -> Result<(), ServerError> {
        let leg = self.legs;
        self.legs += 1;
        let dispatch = v1::Dispatch {
            leg,
            request_id: Self::request_id(leg),
            incarnation: self.incarnation,
            role_epoch: self.role_epoch,
            model: NAME.to_owned(),
            prompt_tokens: Tokens::from(prompt_tokens).to_wire(),
            sampling: Some(v1::Sampling {
                top_p: 1.0,
                repetition_penalty: 1.0,
                max_tokens,
                ..v1::Sampling::default()
            }),
            work: Some(work),
            ..v1::Dispatch::default()
        };
        let sent = self.ask.send(v1::AttachRequest { frame: Some(Ask::Dispatch(dispatch)) }).await;
        sent.map_err(|_| ServerError::Refused("it is gone".to_owned()))
    }

    /// What the legs have come to since the last time; an error if one of them failed.
    pub(super) async fn step(&mut self) -> Result<Vec<v1::LegOutput>, ServerError> {
        loop {
            let Answer::Step(step) = next(&mut self.answers).await? else { continue };
            for leg in &step.legs {
                if let Some(v1::leg_output::End::Failed(detail)) = &leg.end {
                    return Err(ServerError::Refused(detail.message.clone()));
                }
            }
            return Ok(step.legs);
        }
    }

    /// What it has written to its log so far.
    pub(super) fn log(&self) -> Result<String, ServerError> {
        fs::read_to_string(self.log.path()).map_err(ServerError::Log)
    }

    /// Ends the server; one that does not end in time is killed.
    pub(super) async fn stop(mut self) {
        drop(self.stdin.take());
        // Whatever comes of it, dropping the child kills it.
        let _ = tokio::time::timeout(GRACE, self.child.wait()).await;
    }
}

/// Opens the stream as soon as the child answers.
async fn attach(
    child: &mut Child,
    log: &NamedTempFile,
    address: &str,
) -> Result<(mpsc::Sender<v1::AttachRequest>, Streaming<v1::AttachResponse>), ServerError> {
    loop {
        let (ask, asked) = mpsc::channel(64);
        let hello = v1::attach_request::Hello { coordinator_id: NAME.to_owned(), ..Default::default() };
        // A new channel holds at least one.
        let _ = ask.try_send(v1::AttachRequest { frame: Some(Ask::Hello(hello)) });
        let connecting = async {
            let mut client = InferenceClient::connect(format!("http://{address}")).await.ok()?;
            client.attach(tokio_stream::wrappers::ReceiverStream::new(asked)).await.ok()
        };
        tokio::select! {
            biased;
            _ = child.wait() => return Err(ServerError::Ended(last_words(log))),
            answered = connecting => if let Some(answers) = answered { return Ok((ask, answers.into_inner())) },
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until the server has loaded its model; its incarnation and the epoch of its role.
async fn ready(answers: &mut Streaming<v1::AttachResponse>) -> Result<(u64, u64), ServerError> {
    let mut incarnation = 0;
    loop {
        let role = match next(answers).await? {
            Answer::Welcome(welcome) => {
                incarnation = welcome.incarnation;
                welcome.role
            }
            Answer::Role(role) => Some(role),
            Answer::Step(_) | Answer::Load(_) => None,
        };
        if let Some(role) = role.filter(|role| role.phase() == v1::Phase::Ready) {
            return Ok((incarnation, role.epoch));
        }
    }
}

async fn next(answers: &mut Streaming<v1::AttachResponse>) -> Result<Answer, ServerError> {
    loop {
        match answers.message().await.map_err(ServerError::Call)? {
            Some(v1::AttachResponse { frame: Some(answer) }) => return Ok(answer),
            Some(_) => {}
            None => return Err(ServerError::Refused("it closed the stream".to_owned())),
        }
    }
}

fn last_words(log: &NamedTempFile) -> String {
    // A log that cannot be read says nothing.
    let words = fs::read_to_string(log.path()).unwrap_or_default();
    words.trim().lines().last().unwrap_or("it said nothing").to_owned()
}

/// A prompt of so many tokens that are plain text, the same for the same seed.
pub(super) fn prompt_tokens(vocabulary: u32, seed: u64, count: u32) -> Vec<u32> {
    let plain = u64::from(vocabulary).saturating_sub(PLAIN).max(1);
    let token = |at: u32| (PLAIN.min(u64::from(vocabulary) - 1) + mix(seed ^ mix(at.into())) % plain) as u32;
    (0..count).map(|at| token(at).min(vocabulary - 1)).collect()
}
