//! One of the two processes that move bytes: a node, told what to do on standard input, until that is closed.

use std::{
    io::Write,
    ops::Range,
    time::{Duration, Instant},
};

use baton_kvtransfer::{ExpectSpec, Incoming, KvNode, OfferSpec, Outgoing};
use baton_proto::PromptDigest;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines, Stdin},
    net::TcpListener,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    error::{BenchError, chain},
    pair::{RECEIVER, SENDER},
    pool,
    process::now_ns,
    protocol::{Answer, Item, Order, Setup, Span},
};

/// For a transfer as a whole.
const DEADLINE: Duration = Duration::from_secs(60);

/// Serves until the measuring process closes standard input, as it does when it ends, however it does.
pub(crate) async fn run(setup: &str) -> Result<(), BenchError> {
    let setup: Setup =
        serde_json::from_str(setup).map_err(|error| BenchError::said("--peer", error.to_string()))?;
    let stop = CancellationToken::new();
    let node = pool::node(&setup, stop.clone())?;
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(BenchError::io("listen"))?;
    let address = listener.local_addr().map_err(BenchError::io("listen"))?.to_string();
    let (service, stopped) = (node.handoff_service(), stop.clone());
    let serving = tokio::spawn(async move {
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = Server::builder().add_service(service);
        stopped.run_until_cancelled(server.serve_with_incoming(incoming)).await
    });
    let mut peer = Peer { node, layers: setup.layers, orders: BufReader::new(tokio::io::stdin()).lines() };
    answer(&Answer::Serving { address });
    let result = peer.obey().await;
    if let Err(error) = &result {
        answer(&Answer::Failed { why: chain(error) });
    }
    stop.cancel();
    peer.node.stopped().await;
    let _ = serving.await;
    Ok(())
}

/// A closed pipe means that nobody measures any more; the next order then says so.
fn answer(answer: &Answer) {
    if let Ok(line) = serde_json::to_string(answer) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

struct Peer {
    node: KvNode,
    layers: u32,
    orders: Lines<BufReader<Stdin>>,
}

impl Peer {
    async fn obey(&mut self) -> Result<(), BenchError> {
        while let Some(order) = self.next().await? {
            let spans = match order {
                Order::Receive { items, together } => self.receive(&items, together).await?,
                Order::Send { items, together, to } => self.send(&items, together, &to).await?,
                Order::ReceiveLate { item } => self.receive_late(item).await?,
                Order::SendLate { item, to } => self.send_late(item, &to).await?,
                Order::Seal => continue, // belongs to a `SendLate`
            };
            answer(&Answer::Done { spans });
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Order>, BenchError> {
        match self.orders.next_line().await.map_err(BenchError::io("read an order"))? {
            Some(line) => serde_json::from_str(&line)
                .map(Some)
                .map_err(|error| BenchError::said("an order", error.to_string())),
            None => Ok(None),
        }
    }

    async fn receive(&self, items: &[Item], together: bool) -> Result<Vec<Span>, BenchError> {
        if together {
            let mut all = Vec::new();
            for &item in items {
                all.push(self.expect(item)?);
            }
            answer(&Answer::Expecting);
            return gather(all.into_iter().map(sealed)).await;
        }
        let mut spans = Vec::new();
        for (nth, &item) in items.iter().enumerate() {
            let incoming = self.expect(item)?;
            if nth == 0 {
                answer(&Answer::Expecting);
            }
            spans.push(sealed(incoming).await?);
        }
        Ok(spans)
    }

    async fn send(&self, items: &[Item], together: bool, to: &str) -> Result<Vec<Span>, BenchError> {
        let layers = 0..self.layers;
        let (mut all, mut spans) = (Vec::new(), Vec::new());
        for &item in items {
            let (outgoing, from_ns) = (self.offer(item, to)?, now_ns());
            ready(&outgoing, item, layers.clone());
            outgoing.seal(0);
            let finish = finished(outgoing, from_ns);
            match together {
                true => all.push(finish),
                false => spans.push(finish.await?),
            }
        }
        spans.extend(gather(all).await?);
        Ok(spans)
    }

    async fn receive_late(&self, item: Item) -> Result<Vec<Span>, BenchError> {
        let early = u64::from(self.layers - 1) * u64::from(item.blocks);
        let landed = self.node.stats().slices_received + early;
        let incoming = self.expect(item)?;
        answer(&Answer::Expecting);
        let by = Instant::now() + DEADLINE;
        while self.node.stats().slices_received < landed && Instant::now() < by {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        answer(&Answer::Landed);
        Ok(vec![sealed(incoming).await?])
    }

    async fn send_late(&mut self, item: Item, to: &str) -> Result<Vec<Span>, BenchError> {
        let outgoing = self.offer(item, to)?;
        ready(&outgoing, item, 0..self.layers - 1);
        let Some(Order::Seal) = self.next().await? else { return Ok(Vec::new()) };
        let from_ns = now_ns();
        ready(&outgoing, item, self.layers - 1..self.layers);
        outgoing.seal(0);
        Ok(vec![finished(outgoing, from_ns).await?])
    }

    fn expect(&self, item: Item) -> Result<Incoming, BenchError> {
        Ok(self.node.expect(ExpectSpec {
            id: item.id(),
            sender: pool::instance(SENDER)?,
            sender_incarnation: None,
            prompt_tokens: item.blocks,
            prompt_digest: PromptDigest::of(&[]),
            blocks: blocks(item).collect(),
            held: Vec::new(),
            deadline: Instant::now() + DEADLINE,
        })?)
    }

    fn offer(&self, item: Item, to: &str) -> Result<Outgoing, BenchError> {
        Ok(self.node.offer(OfferSpec {
            id: item.id(),
            peer: to.to_owned(),
            receiver: pool::instance(RECEIVER)?,
            receiver_incarnation: None,
            prompt_tokens: item.blocks,
            prompt_digest: PromptDigest::of(&[]),
            blocks: blocks(item).collect(),
            priority: 0,
            deadline: Instant::now() + DEADLINE,
        })?)
    }
}

fn blocks(item: Item) -> Range<u32> {
    item.first_block..item.first_block + item.blocks
}

fn ready(outgoing: &Outgoing, item: Item, layers: Range<u32>) {
    let progress = outgoing.progress();
    layers.for_each(|layer| progress.ready(layer, 0..item.blocks));
}

async fn sealed(mut incoming: Incoming) -> Result<Span, BenchError> {
    let from_ns = now_ns();
    incoming.sealed().await?;
    let to_ns = now_ns();
    incoming.close().await;
    Ok(Span { from_ns, to_ns })
}

async fn finished(mut outgoing: Outgoing, from_ns: u64) -> Result<Span, BenchError> {
    outgoing.finished().await?;
    let to_ns = now_ns();
    outgoing.close().await;
    Ok(Span { from_ns, to_ns })
}

/// Waits for all of them at a time.
async fn gather(
    all: impl IntoIterator<Item = impl Future<Output = Result<Span, BenchError>> + Send + 'static>,
) -> Result<Vec<Span>, BenchError> {
    let mut tasks = JoinSet::new();
    all.into_iter().for_each(|one| drop(tasks.spawn(one)));
    tasks.join_all().await.into_iter().collect()
}
