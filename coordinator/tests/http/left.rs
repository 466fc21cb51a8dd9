//! Clients that leave while they are answered, whatever they had sent behind their request.

use std::time::Duration;

use baton_proto::v1;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::Instant};

use crate::scripted::{Cluster, until};

/// From when its client has left until its legs are cancelled, mostly: this machine may be slow now and then.
const WITHIN: Duration = Duration::from_millis(100);

fn asked(stream: bool) -> String {
    let body = json!({"model": "tiny", "prompt": "hi", "max_tokens": 9, "stream": stream}).to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    head + &body
}

#[tokio::test]
async fn whoever_leaves_is_missed_at_once_whatever_follows_the_request() {
    let (cluster, mut prefill, mut decode) = Cluster::pair().await;
    let next = asked(false);
    // With the request; and once it is being answered, in pieces of which the last are not read any more.
    let cases: [(&str, &[&str]); 5] =
        [("", &[]), ("\r\n", &[]), (&next, &[]), ("", &["\r\n", "\r\n"]), ("\r\n", &[&next, &next])];
    let mut took = Vec::new();
    for stream in [false, true] {
        for (with, behind) in cases {
            let address = cluster.url.strip_prefix("http://").expect("a URL");
            let mut client = TcpStream::connect(address).await.expect("connects");
            client.write_all((asked(stream) + with).as_bytes()).await.expect("is sent");
            let (p, d) = (prefill.dispatch().await, decode.dispatch().await);
            for piece in behind {
                client.write_all(piece.as_bytes()).await.expect("is sent");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let left = Instant::now();
            drop(client);
            assert_eq!((prefill.cancelled().await.leg, decode.cancelled().await.leg), (p.leg, d.leg));
            took.push(left.elapsed());
            cluster.at_rest().await;
        }
    }
    took.sort();
    assert!(took[took.len() / 2] < WITHIN, "{took:?}");
}

#[tokio::test]
async fn whoever_leaves_while_the_coordinator_drains_is_missed_too() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    let address = cluster.url.strip_prefix("http://").expect("a URL");
    let mut client = TcpStream::connect(address).await.expect("connects");
    client.write_all((asked(true) + "\r\n").as_bytes()).await.expect("is sent");
    let leg = mixed.dispatch().await.leg;
    let service = cluster.shut_down().await;
    drop(client);
    assert_eq!(mixed.cancelled().await.leg, leg);
    until("nothing is held", || service.metrics.in_flight.get() == 0).await;
}
