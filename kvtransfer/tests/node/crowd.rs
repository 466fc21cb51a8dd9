//! A thousand transfers at a time over one link, new ones coming as others end: each gets on as fast as the others, and what
//! is on its way at a time is bounded by the connections' credit, not by how many there are.

use std::{sync::Arc, time::Duration};

use crate::support::{
    caches::{self, Dtype::*, assert_holds, panel},
    *,
};
use baton_kvtransfer::{ExpectSpec, KvLayout, Limits, NodeStats, OfferSpec, TransportConfig};
use baton_proto::TransferId;
use tokio::time::Instant;

/// At a time.
const SESSIONS: u32 = 1000;
/// One after the other in each session. Whoever serves the newest first makes the oldest wait for those of all rounds.
const ROUNDS: u32 = 3;
const BLOCKS_EACH: u32 = 4;
/// Two blocks of a layer.
const FRAME_SLICES: usize = 2;
/// The longest may take so many times as long as the median.
const SPREAD: f64 = 3.0;

/// Two nodes, and how many tokens' blocks a transfer has.
struct Crowd {
    prefill: Peer,
    decode: Peer,
    tokens: u32,
    here: u32,
    there: u32,
}

impl Crowd {
    fn start(transport: TransportConfig, from: KvLayout, to: KvLayout, tokens: u32) -> Arc<Self> {
        let (here, there) = (tokens.div_ceil(from.block_tokens), tokens.div_ceil(to.block_tokens));
        let frame_bytes = FRAME_SLICES * from.slice_bytes as usize;
        let setup = |layout, each| Setup {
            layout,
            blocks: SESSIONS * each,
            limits: Limits { frame_bytes, staging_bytes: STAGING_BYTES, ..limits() },
            transports: vec![transport.clone()],
            ..Setup::default()
        };
        let prefill = Peer::start_with("prefill-0", setup(from, here));
        let decode = Peer::start_with("decode-0", setup(to, there));
        Arc::new(Self { prefill, decode, tokens, here, there })
    }

    /// The transfers of one session; how long each took, from its offer to its release.
    async fn session(self: Arc<Self>, nth: u32) -> Vec<Duration> {
        let here: Vec<_> = (nth * self.here..(nth + 1) * self.here).collect();
        let there: Vec<_> = (nth * self.there..(nth + 1) * self.there).collect();
        let mut took = Vec::new();
        for _ in 0..ROUNDS {
            let id = TransferId::generate();
            let (expect, offer) =
                (expect_spec(id, &self.prefill.name, &there), offer_spec(id, &self.decode, &here));
            let (prompt_tokens, deadline) = (self.tokens, in_secs(60));
            let expect = ExpectSpec { prompt_tokens, deadline, ..expect };
            let mut incoming = self.decode.node.expect(expect).expect("room");
            let since = Instant::now();
            let offer = OfferSpec { prompt_tokens, deadline, ..offer };
            let mut outgoing = self.prefill.node.offer(offer).expect("room");
            (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..self.here));
            outgoing.seal(nth);
            within("released", 60, outgoing.finished()).await.expect("whole");
            took.push(since.elapsed());
            within("sealed", 60, incoming.sealed()).await.expect("whole");
            assert_eq!(within("the fence", 10, incoming.close()).await, there);
            assert_eq!(within("the fence", 10, outgoing.close()).await, here);
        }
        took
    }

    /// All sessions at a time. Nobody starves; what both nodes say of themselves afterwards.
    async fn run(self: &Arc<Self>) -> [NodeStats; 2] {
        let sessions: Vec<_> = (0..SESSIONS).map(|nth| tokio::spawn(self.clone().session(nth))).collect();
        let mut took = Vec::new();
        for session in sessions {
            took.extend(session.await.expect("no panic"));
        }
        took.sort_unstable();
        let (median, longest) = (took[took.len() / 2].as_secs_f64(), took[took.len() - 1].as_secs_f64());
        println!("median {median:.3} s, longest {longest:.3} s");
        assert!(longest <= SPREAD * median, "somebody starves: {longest:.3} s, median {median:.3} s");
        self.prefill.idle().await;
        self.decode.idle().await;
        [self.prefill.node.stats(), self.decode.node.stats()]
    }

    /// No more is on its way than so many frames out and in, and no queue has more than one entry of a transfer or a few.
    fn assert_bounded(&self, [here, there]: &[NodeStats; 2], frames_out: u64, frames_in: u64) {
        let frame_bytes = FRAME_SLICES as u64 * here.bytes_sent / here.slices_sent;
        let (sent, received) = (&here.by_transport[0], &there.by_transport[0]);
        let (out, most_out) = (sent.sending_bytes_peak, frames_out * frame_bytes);
        assert!(out >= frame_bytes && out <= most_out, "{out} bytes on their way out, not {most_out}");
        let (come, most_in) = (received.receiving_bytes_peak, frames_in * frame_bytes);
        assert!(come >= frame_bytes && come <= most_in, "{come} bytes on their way in, not {most_in}");
        // A link that had nobody wait would show nothing.
        let in_line = here.outbox_peak;
        assert!(in_line > u64::from(SESSIONS / 2) && in_line <= u64::from(SESSIONS), "{in_line} in line");
        // Of a transfer: its offer, a renewal and its seal; its accept, a renewal and its release.
        for queued in [here.control_queue_peak, there.control_queue_peak] {
            assert!(queued > 0 && queued <= 3 * u64::from(SESSIONS), "{queued} messages waited");
        }
        assert!(there.staging_bytes_peak <= STAGING_BYTES as u64, "{} staged", there.staging_bytes_peak);
    }
}

/// Enough for a few frames.
const STAGING_BYTES: usize = 256 << 10;

async fn alike(transport: TransportConfig, frames_out: u64, frames_in: u64) {
    let crowd = Crowd::start(transport, layout(), layout(), BLOCKS_EACH * BLOCK_TOKENS);
    let all: Vec<_> = (0..SESSIONS * BLOCKS_EACH).collect();
    crowd.prefill.fill(7, &all);
    let stats = crowd.run().await;
    assert!(crowd.decode.holds(7, &all));
    crowd.assert_bounded(&stats, frames_out, frames_in);
    assert_eq!(stats[1].staging_bytes_peak, 0, "nothing is mapped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_transfers_over_tcp_share_one_link_fairly_within_its_credit() {
    // A frame for each connection, at both ends.
    alike(TransportConfig::Tcp { connections: 2 }, 2, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_transfers_over_shared_memory_share_one_link_fairly_within_its_credit() {
    // Four frames are announced on each of two connections, and one of them copied.
    alike(TransportConfig::Shm, 8, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_transfers_that_are_mapped_share_one_link_fairly_within_its_staging_memory() {
    const TOKENS: usize = 24;
    let (from, to) = (panel(Bf16, 8), panel(Bf16, 16));
    let transport = TransportConfig::Tcp { connections: 2 };
    let crowd = Crowd::start(transport, from.layout(), to.layout(), TOKENS as u32);
    let blocks = |nth: u32, each: u32| (nth * each..(nth + 1) * each).collect::<Vec<_>>();
    for nth in 0..SESSIONS {
        caches::fill(&crowd.prefill.pool, from, u64::from(nth), &blocks(nth, crowd.here), TOKENS);
    }
    let stats = crowd.run().await;
    for nth in 0..SESSIONS {
        let there = blocks(nth, crowd.there);
        assert_holds(&crowd.decode.pool, (to, from), u64::from(nth), &there, TOKENS, &[]);
    }
    crowd.assert_bounded(&stats, 2, 2);
    assert!(stats[1].staging_bytes_peak > 0, "all of it was mapped");
}
