//! The yardstick Mooncake: its transfer engine over TCP, measured by its own `transfer_engine_bench`. The initiator writes
//! blocks into the target's memory, as a prefill does, out of a region that it has never touched, and says when a batch is
//! complete; nothing is checked.

use std::{path::PathBuf, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinHandle,
};

use crate::{
    error::BenchError,
    process::{cpu_seconds, ended_cpu_seconds, run, spawn, wait_for_line},
    report::Sample,
};

const WHAT: &str = "Mooncake's transfer_engine_bench";
const PATIENCE: Duration = Duration::from_secs(30);
/// Registered on each side, as large as our pools.
const BUFFER_BYTES: u64 = 256 << 20;
/// Its default. More of them at a time fail with small blocks.
const MOST_BLOCKS: u64 = 128;

/// A target that stands, until it is dropped.
pub(crate) struct Mooncake {
    program: PathBuf,
    pid: u32,
    segment: String,
    target: Child,
    words: JoinHandle<()>,
}

impl Mooncake {
    pub(crate) async fn start(program: PathBuf) -> Result<Self, BenchError> {
        let mut target = spawn(command(&program, "target").stdout(Stdio::null()).stderr(Stdio::piped()))?;
        let gone = || BenchError::said(WHAT, "nothing");
        let pid = target.id().ok_or_else(gone)?;
        let mut lines = BufReader::new(target.stderr.take().ok_or_else(gone)?).lines();
        // The port is its own choice: "... using P2P handshake, listening on 127.0.0.1:15239".
        let listening = |line: &str| Some(line.rsplit_once("listening on ")?.1.trim().to_owned());
        let segment = wait_for_line(WHAT, PATIENCE, &mut lines, listening).await?;
        let up = |line: &str| line.contains("numa node num").then_some(());
        wait_for_line(WHAT, PATIENCE, &mut lines, up).await?;
        let words = tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { program, pid, segment, target, words })
    }

    pub(crate) async fn stop(mut self) -> Result<(), BenchError> {
        self.target.kill().await.map_err(BenchError::io(format!("end {WHAT}")))?;
        let _ = self.words.await; // until what it wrote to is closed
        Ok(())
    }

    /// Writes blocks of this size for a second.
    pub(crate) async fn measure(&self, block_bytes: u64) -> Result<Sample, BenchError> {
        let before = ended_cpu_seconds()? + cpu_seconds(self.pid)?;
        let batch = (BUFFER_BYTES / block_bytes).min(MOST_BLOCKS);
        let output = run(
            // One thread: it waits for its batch by asking over and over, and more of them are only in each other's way.
            command(&self.program, "initiator").args([
                "--operation=write".to_owned(),
                "--threads=1".to_owned(),
                "--duration=1".to_owned(),
                format!("--segment_id={}", self.segment),
                format!("--block_size={block_bytes}"),
                format!("--batch_size={batch}"),
            ]),
            PATIENCE,
        )
        .await?;
        let words = String::from_utf8_lossy(&output.stderr);
        let (seconds, batches) = result(&words).ok_or_else(|| BenchError::said(WHAT, last_line(&words)))?;
        let cpu_seconds = ended_cpu_seconds()? + cpu_seconds(self.pid)? - before;
        Ok(Sample { bytes: batches * batch * block_bytes, seconds, cpu_seconds })
    }
}

fn command(program: &PathBuf, mode: &str) -> Command {
    let mut command = Command::new(program);
    // Peers find each other without a metadata service; the port given is not used then.
    command.args([
        &format!("--mode={mode}"),
        "--protocol=tcp",
        "--metadata_server=P2PHANDSHAKE",
        "--local_server_name=127.0.0.1:12345",
        &format!("--buffer_size={BUFFER_BYTES}"),
    ]);
    command
}

/// Seconds and batches of "Test completed: duration 1.01, batch count 116, throughput 0.97 GB/s".
fn result(words: &str) -> Option<(f64, u64)> {
    let line = words.lines().find(|line| line.contains("Test completed"))?;
    let after =
        |what: &str| line.split_once(what).map(|(_, rest)| rest.split(',').next().unwrap_or("").trim());
    let (seconds, batches) = (after("duration ")?.parse().ok()?, after("batch count ")?.parse().ok()?);
    (batches > 0).then_some((seconds, batches))
}

fn last_line(words: &str) -> String {
    words.lines().rfind(|line| !line.is_empty()).unwrap_or("nothing").to_owned()
}
