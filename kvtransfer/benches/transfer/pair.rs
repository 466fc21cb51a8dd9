//! Two peers, and the work that they do together.

use std::{process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::{
    error::BenchError,
    process::{cpu_seconds, peak_rss_bytes, within},
    protocol::{Answer, Item, Order, Setup, Span},
    report::Sample,
};

pub(crate) const SENDER: &str = "sender";
pub(crate) const RECEIVER: &str = "receiver";

/// For any one answer.
const PATIENCE: Duration = Duration::from_secs(90);

/// A sender and a receiver, with pools alike.
pub(crate) struct Pair {
    sender: Peer,
    receiver: Peer,
    setup: Setup,
}

impl Pair {
    pub(crate) async fn start(setup: Setup) -> Result<Self, BenchError> {
        let sender = Peer::start(SENDER, &setup).await?;
        let receiver = Peer::start(RECEIVER, &setup).await?;
        Ok(Self { sender, receiver, setup })
    }

    /// Moves at least `bytes`, transfer after transfer, each as large as the pool.
    pub(crate) async fn stream(&mut self, bytes: u64) -> Result<Sample, BenchError> {
        let (pool, blocks) = (self.setup.pool_bytes(), self.setup.blocks);
        let items: Vec<Item> = (0..bytes.div_ceil(pool)).map(|_| Item::new(0, blocks)).collect();
        let bytes = pool * items.len() as u64;
        let cpu_before = self.cpu_seconds()?;
        let sent = self.run(items, false).await?;
        let cpu_seconds = self.cpu_seconds()? - cpu_before;
        let from_ns = sent.iter().map(|span| span.from_ns).min().unwrap_or(0);
        let to_ns = sent.iter().map(|span| span.to_ns).max().unwrap_or(0);
        Ok(Sample { bytes, seconds: (to_ns - from_ns) as f64 / 1e9, cpu_seconds })
    }

    /// Offers that many transfers at a time; the seconds that each took.
    pub(crate) async fn crowd(&mut self, sessions: u32) -> Result<Vec<f64>, BenchError> {
        let blocks = self.setup.blocks / sessions;
        let items = (0..sessions).map(|nth| Item::new(nth * blocks, blocks)).collect();
        let sent = self.run(items, true).await?;
        Ok(sent.iter().map(|span| (span.to_ns - span.from_ns) as f64 / 1e9).collect())
    }

    /// The sender's spans.
    async fn run(&mut self, items: Vec<Item>, together: bool) -> Result<Vec<Span>, BenchError> {
        let to = self.receiver.address.clone();
        self.receiver.order(&Order::Receive { items: items.clone(), together }).await?;
        self.receiver.expecting().await?;
        self.sender.order(&Order::Send { items, together, to }).await?;
        let sent = self.sender.done().await?;
        self.receiver.done().await?;
        Ok(sent)
    }

    /// Seconds from the moment that the last layer of some blocks is ready, and the transfer sealed, to that at which the
    /// receiver knows it complete.
    pub(crate) async fn seal_to_sealed(&mut self, blocks: u32) -> Result<f64, BenchError> {
        let (item, to) = (Item::new(0, blocks), self.receiver.address.clone());
        self.receiver.order(&Order::ReceiveLate { item }).await?;
        self.receiver.expecting().await?;
        self.sender.order(&Order::SendLate { item, to }).await?;
        match self.receiver.answer().await? {
            Answer::Landed => {}
            other => return Err(self.receiver.unexpected(&other)),
        }
        self.sender.order(&Order::Seal).await?;
        let (sent, received) = (self.sender.done().await?, self.receiver.done().await?);
        let seconds = |(sent, received): (&Span, &Span)| (received.to_ns - sent.from_ns) as f64 / 1e9;
        let waited = sent.first().zip(received.first()).map(seconds);
        waited.ok_or_else(|| BenchError::said("the peers", "no times"))
    }

    /// Ends both, and waits until the kernel has added up what they used.
    pub(crate) async fn stop(self) -> Result<(), BenchError> {
        self.sender.stop().await?;
        self.receiver.stop().await
    }

    /// Of both.
    fn cpu_seconds(&self) -> Result<f64, BenchError> {
        Ok(cpu_seconds(self.sender.pid)? + cpu_seconds(self.receiver.pid)?)
    }

    /// Of the sender and the receiver.
    pub(crate) fn peak_rss_bytes(&self) -> Result<[u64; 2], BenchError> {
        Ok([peak_rss_bytes(self.sender.pid)?, peak_rss_bytes(self.receiver.pid)?])
    }
}

/// A child that runs a node. Killed when dropped.
struct Peer {
    name: &'static str,
    child: Child,
    pid: u32,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Peer {
    async fn start(name: &'static str, setup: &Setup) -> Result<Self, BenchError> {
        let setup = Setup { name: name.into(), ..setup.clone() };
        let setup =
            serde_json::to_string(&setup).map_err(|error| BenchError::said(name, error.to_string()))?;
        let program = std::env::current_exe().map_err(BenchError::io("find this program"))?;
        let mut child = Command::new(&program)
            .args(["--peer", &setup])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| BenchError::Start { program, source })?;
        let gone = || BenchError::said(name, "nothing");
        let pid = child.id().ok_or_else(gone)?;
        let orders = child.stdin.take().ok_or_else(gone)?;
        let answers = BufReader::new(child.stdout.take().ok_or_else(gone)?).lines();
        let mut peer = Self { name, child, pid, orders, answers, address: String::new() };
        match peer.answer().await? {
            Answer::Serving { address } => peer.address = address,
            other => return Err(peer.unexpected(&other)),
        }
        Ok(peer)
    }

    /// It ends when there are no more orders.
    async fn stop(mut self) -> Result<(), BenchError> {
        drop(self.orders);
        let ended = within(self.name, PATIENCE, self.child.wait()).await?;
        ended.map(drop).map_err(BenchError::io(format!("wait for the {}", self.name)))
    }

    async fn order(&mut self, order: &Order) -> Result<(), BenchError> {
        let line =
            serde_json::to_string(order).map_err(|error| BenchError::said(self.name, error.to_string()))?;
        let written = self.orders.write_all(format!("{line}\n").as_bytes()).await;
        written.map_err(BenchError::io(format!("tell the {} what to do", self.name)))
    }

    async fn answer(&mut self) -> Result<Answer, BenchError> {
        let line = within(self.name, PATIENCE, self.answers.next_line()).await?;
        let line = line.map_err(BenchError::io(format!("hear the {}", self.name)))?.unwrap_or_default();
        serde_json::from_str(&line).map_err(|_| BenchError::said(self.name, line))
    }

    async fn expecting(&mut self) -> Result<(), BenchError> {
        match self.answer().await? {
            Answer::Expecting => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn done(&mut self) -> Result<Vec<Span>, BenchError> {
        match self.answer().await? {
            Answer::Done { spans } => Ok(spans),
            other => Err(self.unexpected(&other)),
        }
    }

    fn unexpected(&self, answer: &Answer) -> BenchError {
        let words = match answer {
            Answer::Failed { why } => why.clone(),
            other => format!("{other:?}"),
        };
        BenchError::said(self.name, words)
    }
}
