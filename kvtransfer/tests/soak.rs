//! Many transfers at a time over transports with faults: each ends the same way on both sides, whole and right or with a
//! reason, and every block comes back once.

mod support;

use std::sync::Arc;

use baton_kvtransfer::{Faults, Limits, TransportConfig};
use baton_proto::{ErrorCode, TransferId};
use support::*;

const ROUNDS: u32 = 40;
/// At a time, each with blocks of its own.
const TOGETHER: u32 = 8;
const EACH: u32 = BLOCKS / TOGETHER;

fn over(transport: TransportConfig, faults: Faults) -> Setup {
    // Paths break all the time here: links do not give up for that.
    let limits = Limits { connect_attempts: 1000, ..limits() };
    let faulty = TransportConfig::Faulty(Box::new(transport), faults);
    Setup { transports: vec![faulty], limits, ..Setup::default() }
}

/// How a transfer ended, as both sides agree.
async fn transfer(prefill: Arc<Peer>, decode: Arc<Peer>, lane: u32, seed: u64) -> Result<(), ErrorCode> {
    let from: Vec<u32> = (lane * EACH..(lane + 1) * EACH).rev().collect();
    let to: Vec<u32> = (lane * EACH..(lane + 1) * EACH).collect();
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &to)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &from)).expect("room");
    prefill.fill(seed, &from);
    (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..EACH));
    outgoing.seal(lane + 1);
    let there = within("an end there", 30, incoming.sealed()).await;
    let here = within("an end here", 30, outgoing.finished()).await;
    if there.is_ok() {
        assert!(decode.holds(seed, &to), "what is sealed is what was sent");
    }
    assert_eq!(there.is_ok(), here.is_ok(), "{there:?} there, {here:?} here");
    assert_eq!(within("the fence", 10, incoming.close()).await, to);
    assert_eq!(within("the fence", 10, outgoing.close()).await, from);
    there.map(|_| ()).map_err(|error| error.code())
}

async fn soak(transport: TransportConfig, seed: u64) {
    let faults = Faults { seed, closed: 0.4, broken: 0.03, damaged: 0.002 };
    let prefill = Arc::new(Peer::start_with("prefill-0", over(transport.clone(), faults)));
    let decode = Arc::new(Peer::start_with("decode-0", over(transport, faults)));
    let (mut whole, mut damaged, mut broken) = (0, 0, 0);
    for round in 0..ROUNDS {
        let lanes = (0..TOGETHER).map(|lane| {
            let seed = u64::from(round * TOGETHER + lane);
            tokio::spawn(transfer(prefill.clone(), decode.clone(), lane, seed))
        });
        for ended in lanes.collect::<Vec<_>>() {
            match ended.await.expect("no panic") {
                Ok(()) => whole += 1,
                Err(ErrorCode::KvDamaged) => damaged += 1,
                Err(ErrorCode::HandoffFailed | ErrorCode::InstanceLost) => broken += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
    }
    println!("{whole} whole, {damaged} damaged, {broken} broken");
    assert_eq!(whole + damaged + broken, ROUNDS * TOGETHER);
    assert!(whole > 0 && damaged > 0 && broken > 0, "{whole} whole, {damaged} damaged, {broken} broken");
    prefill.idle().await;
    decode.idle().await;
    let (here, there) = (prefill.node.stats().by_transport[0], decode.node.stats().by_transport[0]);
    assert!(here.failed > 0 && there.damaged > 0 && there.interrupted > 0, "{here:?} {there:?}");
    assert!(prefill.reclaimed_blocks().is_empty() && decode.reclaimed_blocks().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_over_faulty_tcp_end_whole_or_with_a_reason() {
    soak(TransportConfig::Tcp { connections: 2 }, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_over_faulty_shared_memory_end_whole_or_with_a_reason() {
    soak(TransportConfig::Shm, 2).await;
}
