//! Which transport carries a link's slices: the best that both sides have and that works, the next one where it fails.
//!
//! A path over another than the best is not for good. After a while ([`Limits::better_path`](super::Limits), longer each
//! time) a better one is tried again. It takes over in the midst of transfers: from then on all slices go by it, and the
//! old path stays until the transfers are over that it may have carried some of.

use std::{collections::HashSet, time::Duration};

use baton_proto::{TransferId, v1};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Node, backoff::Backoff};
use crate::transport::{Destination, LinkPass, Observed, Outbox, Path, Transport, TransportKind};

/// Before the second attempt to open a path.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// A path that stood for so long had nothing wrong with its transport.
const SOUND: Duration = Duration::from_secs(60);

/// A better path is tried again after at most so many times the first pause.
const LONGEST_AGAIN: u32 = 30;
/// Between two looks at whether a path that was left has transfers.
const LOOK: Duration = Duration::from_millis(20);

/// Keeps a data path to one peer open.
pub(super) struct Route {
    choices: Vec<Choice>,
    pass: LinkPass,
    outbox: Outbox,
    /// Before a better path is tried again.
    again: Duration,
    left: Option<Left>,
}

/// A path that stands.
struct Standing {
    /// Of the choices.
    at: usize,
    path: Path,
    /// What it takes slices from.
    outbox: Outbox,
    since: Instant,
}

/// A path that another has taken the place of.
struct Left {
    _path: Path,
    /// Those that there were then. It is kept until they are over.
    transfers: HashSet<TransferId>,
}

/// A transport that both sides have.
struct Choice {
    kind: TransportKind,
    address: String,
    /// Failures since it last stood for long.
    failures: u32,
}

impl Route {
    /// Over what the peer's welcome offers and this node has, in this node's order; none in common is an error. Slices that
    /// are `mapped` by the receiver take transports only that can bring them into any memory.
    pub(super) fn new(
        node: &Node,
        (endpoints, mapped): (&[v1::DataEndpoint], bool),
        pass: LinkPass,
        outbox: Outbox,
    ) -> Result<Self, String> {
        let offered = |transport: &Observed| {
            let kind = transport.kind();
            let endpoint = endpoints.iter().find(|endpoint| endpoint.transport == kind.name())?;
            Some(Choice { kind, address: endpoint.address.clone(), failures: 0 })
        };
        let able = |transport: &&Observed| transport.kind().brings(mapped);
        let choices: Vec<_> = node.transports.iter().filter(able).filter_map(offered).collect();
        if choices.is_empty() {
            let names = |kinds: Vec<&str>| kinds.join(", ");
            let ours = names(node.transports.iter().map(|transport| transport.kind().name()).collect());
            let theirs = names(endpoints.iter().map(|endpoint| endpoint.transport.as_str()).collect());
            let only =
                if mapped { "; of tcp and shm, which bring slices that are mapped on arrival" } else { "" };
            return Err(format!("no transport in common: this node has {ours}, the peer {theirs}{only}"));
        }
        Ok(Self { choices, pass, outbox, again: node.limits.better_path, left: None })
    }

    /// Opens a path, and the next one whenever it breaks, until `stop`; else why none can be had any more. `transfers` are
    /// those of the link at the moment.
    pub(super) async fn keep(
        mut self,
        node: &Node,
        stop: &CancellationToken,
        transfers: &(impl Fn() -> HashSet<TransferId> + Sync),
    ) -> String {
        let (mut attempts, mut backoff) = (0, Backoff::new(FIRST_PAUSE));
        loop {
            match self.open(node, stop).await {
                Ok(standing) => {
                    attempts = 0;
                    let sent = self.outbox.sent();
                    self.stand(standing, node, stop, transfers).await;
                    if self.outbox.sent() > sent {
                        backoff.reset(); // it was of use
                    }
                }
                Err(why) => {
                    attempts += 1;
                    if attempts >= node.limits.connect_attempts {
                        return why;
                    }
                }
            }
            backoff.pause().await;
        }
    }

    /// Until the path breaks, or the better one that has taken its place.
    async fn stand(
        &mut self,
        mut standing: Standing,
        node: &Node,
        stop: &CancellationToken,
        transfers: &(impl Fn() -> HashSet<TransferId> + Sync),
    ) {
        let why = loop {
            tokio::select! {
                biased;
                why = standing.path.broken() => break why.to_owned(),
                () = over(&self.left, transfers), if self.left.is_some() => {
                    self.left = None;
                    continue;
                }
                () = sleep(self.again), if standing.at > 0 && self.left.is_none() => {}
            }
            let longest = node.limits.better_path.saturating_mul(LONGEST_AGAIN);
            self.again = self.again.saturating_mul(2).min(longest);
            let better = tokio::select! {
                biased;
                why = standing.path.broken() => break why.to_owned(),
                better = self.try_in_order((0..standing.at).collect(), node, stop) => better,
            };
            if let Ok(better) = better {
                let (from, to) = (self.choices[standing.at].kind, self.choices[better.at].kind);
                tracing::info!(%from, %to, "a better data path can be had again");
                standing.outbox.close(); // before looking at which transfers it may have carried
                let old = std::mem::replace(&mut standing, better);
                self.left = Some(Left { _path: old.path, transfers: transfers() });
            }
        };
        let choice = &mut self.choices[standing.at];
        if standing.since.elapsed() >= SOUND {
            choice.failures = 0;
            if standing.at == 0 {
                self.again = node.limits.better_path;
            }
        }
        choice.failures += 1;
        tracing::debug!(transport = %choice.kind, %why, "data path broke");
    }

    /// Tries those first that have failed least.
    async fn open(&mut self, node: &Node, stop: &CancellationToken) -> Result<Standing, String> {
        let mut order: Vec<usize> = (0..self.choices.len()).collect();
        order.sort_by_key(|&at| self.choices[at].failures);
        self.try_in_order(order, node, stop).await
    }

    /// The first of these that opens.
    async fn try_in_order(
        &mut self,
        order: Vec<usize>,
        node: &Node,
        stop: &CancellationToken,
    ) -> Result<Standing, String> {
        let mut reasons = Vec::new();
        for at in order {
            let choice = &mut self.choices[at];
            let Some(transport) = node.transports.iter().find(|it| it.kind() == choice.kind) else {
                continue;
            };
            let to = Destination { address: choice.address.clone(), pass: self.pass.clone() };
            let outbox = self.outbox.another();
            match transport.open(to, outbox.clone(), &node.lifetime.tasks, stop).await {
                Ok(path) => {
                    tracing::debug!(transport = %choice.kind, address = %choice.address, "data path open");
                    return Ok(Standing { at, path, outbox, since: Instant::now() });
                }
                Err(error) => {
                    choice.failures += 1;
                    tracing::info!(transport = %choice.kind, %error, "data path cannot be opened");
                    reasons.push(format!("{}: {error}", choice.kind));
                }
            }
        }
        Err(format!("no data path to the peer ({})", reasons.join("; ")))
    }
}

/// Resolves once none of the transfers is left.
async fn over(left: &Option<Left>, transfers: &(impl Fn() -> HashSet<TransferId> + Sync)) {
    while left.as_ref().is_some_and(|left| !left.transfers.is_disjoint(&transfers())) {
        sleep(LOOK).await;
    }
}
