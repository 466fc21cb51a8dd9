//! The worker, the floor and the client as this process has them: children that are asked and answer by lines.

use std::{process::Stdio, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::error::BenchError;

/// Longest wait for an answer; the longest line takes a minute.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) struct Asked {
    name: &'static str,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    child: Child,
}

impl Asked {
    /// Starts this program once more, as `name`.
    pub(crate) fn start(name: &'static str) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::io("find this program"))?;
        let started = Command::new(&program)
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = started.map_err(|source| BenchError::Start { program, source })?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(BenchError::said(name, "it has no standard input"));
        };
        Ok(Self { name, orders, answers: BufReader::new(answers).lines(), child })
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    pub(crate) async fn tell(&mut self, order: &impl Serialize) -> Result<(), BenchError> {
        let line = serde_json::to_string(order).unwrap_or_default() + "\n";
        self.orders
            .write_all(line.as_bytes())
            .await
            .map_err(BenchError::io(format!("tell the {} something", self.name)))
    }

    pub(crate) async fn ask<T: DeserializeOwned>(&mut self, order: &impl Serialize) -> Result<T, BenchError> {
        self.tell(order).await?;
        let line = timeout(PATIENCE, self.answers.next_line()).await;
        let line =
            line.map_err(|_| BenchError::Late { what: format!("the {}", self.name), limit: PATIENCE })?;
        let line = line.map_err(BenchError::io(format!("read what the {} says", self.name)))?;
        let line = line.ok_or_else(|| BenchError::said(self.name, "nothing"))?;
        serde_json::from_str(&line).map_err(|error| BenchError::said(self.name, error.to_string()))
    }
}
