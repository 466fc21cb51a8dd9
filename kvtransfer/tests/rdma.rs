//! Whole transfers over RDMA. They need a machine with RoCE ports to themselves and are ignored elsewhere:
//! `deploy/emulated/roce` makes such a machine (`deploy/run test-emulated`).

mod support;

use std::process::Command;

use baton_kvtransfer::TransportConfig;
use baton_proto::TransferId;
use support::*;

const FROM: [u32; 5] = [7, 3, 60, 22, 0];
const TO: [u32; 5] = [1, 50, 2, 49, 3];

/// Network devices of the ports, as the emulated machine names them.
const NETWORK: &str = "BATON_TEST_RDMA_NETWORK";

fn over_rdma_or_tcp(name: &str) -> Peer {
    let transports = vec![TransportConfig::Rdma, TransportConfig::Tcp { connections: 1 }];
    Peer::start_with(name, Setup { transports, ..Setup::default() })
}

/// One whole transfer, checked byte for byte; false if it failed.
async fn transfer(prefill: &Peer, decode: &Peer, seed: u64) -> bool {
    let id = TransferId::generate();
    let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &TO)).expect("room");
    let mut outgoing = prefill.node.offer(offer_spec(id, decode, &FROM)).expect("room");
    for layer in 0..LAYERS {
        prefill.fill_layer(seed, layer, &FROM, 0..5);
        outgoing.progress().ready(layer, 0..5);
    }
    outgoing.seal(3);
    let sealed = within("an end", 60, incoming.sealed()).await;
    let whole = sealed.is_ok() && decode.holds(seed, &TO);
    assert_eq!(whole, sealed.is_ok(), "what is sealed is whole");
    let _ = within("an end", 60, outgoing.finished()).await;
    assert_eq!((incoming.close().await, outgoing.close().await), (TO.to_vec(), FROM.to_vec()));
    whole
}

fn received(peer: &Peer) -> Vec<(&'static str, u64)> {
    let by_transport = peer.node.stats().by_transport;
    by_transport.iter().map(|one| (one.kind.name(), one.slices_received)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs RoCE ports"]
async fn caches_cross_over_rdma_and_over_tcp_once_the_ports_are_down() {
    let (prefill, decode) = (over_rdma_or_tcp("prefill-0"), over_rdma_or_tcp("decode-0"));
    let slices = 5 * u64::from(LAYERS);
    for seed in [1, 2] {
        assert!(transfer(&prefill, &decode, seed).await);
    }
    assert_eq!(received(&decode), [("rdma", 2 * slices), ("tcp", 0)]);
    let network = std::env::var(NETWORK).expect("the network devices of the ports");
    let set = |state: &str| {
        for device in network.split(' ') {
            let done = Command::new("ip").args(["link", "set", device, state]).status().expect("ip");
            assert!(done.success(), "ip link set {device} {state}");
        }
    };
    set("down");
    // What is under way over RDMA fails, soon; then TCP carries on.
    let mut failed = 0;
    while !transfer(&prefill, &decode, 3 + failed).await {
        failed += 1;
        assert!(failed < 5, "TCP does not take over");
    }
    set("up");
    let by_tcp = received(&decode)[1].1;
    assert_eq!(by_tcp, slices, "{failed} transfers failed first");
    prefill.idle().await;
    decode.idle().await;
}
