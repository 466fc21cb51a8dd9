//! A node that has stopped leaves nothing behind: its pool goes with the last handle, and what peers were lent of it.

use std::sync::Arc;

use baton_kvtransfer::TransportConfig;
use baton_proto::TransferId;

use crate::support::*;

#[tokio::test]
async fn a_stopped_node_lets_go_of_its_pool() {
    let (tcp, shm) = (TransportConfig::Tcp { connections: 2 }, TransportConfig::Shm);
    for transports in [vec![tcp.clone()], vec![shm.clone()], vec![shm, tcp]] {
        let setup = || Setup { transports: transports.clone(), ..Setup::default() };
        let (prefill, decode) =
            (Peer::start_with("prefill-0", setup()), Peer::start_with("decode-0", setup()));
        let id = TransferId::generate();
        let mut incoming = decode.node.expect(expect_spec(id, &prefill.name, &[1])).expect("room");
        let mut outgoing = prefill.node.offer(offer_spec(id, &decode, &[2])).expect("room");
        (0..LAYERS).for_each(|layer| outgoing.progress().ready(layer, 0..1));
        outgoing.seal(1);
        within("sealed", 10, incoming.sealed()).await.expect("whole");
        within("finished", 10, outgoing.finished()).await.expect("released");
        drop((incoming, outgoing));
        for peer in [prefill, decode] {
            peer.stop.cancel();
            within("its end", 10, peer.node.stopped()).await;
            let pool = Arc::downgrade(&peer.pool);
            drop(peer);
            until(&format!("the pool over {transports:?} is free"), || pool.strong_count() == 0).await;
        }
    }
}
