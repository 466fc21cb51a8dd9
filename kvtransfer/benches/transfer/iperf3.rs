//! The yardstick iperf3: one stream over loopback. It reads and writes the same small buffer over and over and looks at
//! nothing that it receives, so it shows what the kernel's part costs. It cannot send more than 1 MiB at a time.

use std::{net::TcpListener, path::PathBuf, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

use crate::{
    error::BenchError,
    process::{ended_cpu_seconds, run, spawn, wait_for_line, within},
    report::Sample,
};

/// It refuses a larger `--length`.
pub(crate) const MOST_AT_A_TIME: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const WHAT: &str = "iperf3";

pub(crate) struct Iperf3 {
    program: PathBuf,
}

#[derive(Deserialize)]
struct Said {
    end: End,
}

#[derive(Deserialize)]
struct End {
    sum_received: Sum,
}

#[derive(Deserialize)]
struct Sum {
    seconds: f64,
    bytes: u64,
}

impl Iperf3 {
    pub(crate) fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// Sends `bytes`, that many at a time or as many as it can, from a client to a server of its own.
    pub(crate) async fn measure(&self, at_a_time: u64, bytes: u64) -> Result<Sample, BenchError> {
        let cpu_before = ended_cpu_seconds()?;
        let port = free_port()?.to_string();
        let mut server = spawn(
            Command::new(&self.program)
                .args(["--server", "--one-off", "--forceflush", "--bind", "127.0.0.1", "--port", &port])
                .stdout(Stdio::piped())
                .stderr(Stdio::null()),
        )?;
        let Some(out) = server.stdout.take() else { return Err(BenchError::said(WHAT, "nothing")) };
        let mut lines = BufReader::new(out).lines();
        let up = |line: &str| line.starts_with("Server listening").then_some(());
        wait_for_line(WHAT, PATIENCE, &mut lines, up).await?;
        let (length, total) = (at_a_time.min(MOST_AT_A_TIME).to_string(), bytes.to_string());
        let client = run(
            Command::new(&self.program)
                .args(["--client", "127.0.0.1", "--port", &port, "--json"])
                .args(["--length", &length, "--bytes", &total]),
            PATIENCE,
        )
        .await?;
        // Its report is short; what of it is not read fits into the pipe.
        within(WHAT, PATIENCE, server.wait()).await?.map_err(BenchError::io("wait for iperf3"))?;
        let said = String::from_utf8_lossy(&client.stdout);
        let Said { end: End { sum_received: Sum { seconds, bytes } } } =
            serde_json::from_str(&said).map_err(|_| BenchError::said(WHAT, said))?;
        Ok(Sample { bytes, seconds, cpu_seconds: ended_cpu_seconds()? - cpu_before })
    }
}

/// Free a moment ago, at least; should it be taken meanwhile, the round fails.
fn free_port() -> Result<u16, BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(BenchError::io("find a free port"))?;
    Ok(listener.local_addr().map_err(BenchError::io("find a free port"))?.port())
}
