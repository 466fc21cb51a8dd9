//! Answers that clients read late, or never: what they hold, and until when.

use std::time::Duration;

use baton_coordinator::prepare::Served;
use baton_proto::v1;
use bytes::Bytes;
use h2::RecvStream;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::scripted::{Cluster, Instance, events, served, until};

const PROMPT_TOKENS: usize = 90_000;

async fn cluster(request_timeout: Duration) -> (Cluster, Instance) {
    let long = Served { context_tokens: 100_000, ..served() };
    let configure = |config: &mut baton_coordinator::CoordinatorConfig| {
        config.limits.request_timeout = request_timeout;
    };
    let (cluster, [mixed]) = Cluster::start_models(vec![long], [("m", v1::Role::Mixed, 0)], configure).await;
    (cluster, mixed)
}

/// Asks for answers that begin with a long prompt, over a connection that takes no more than 1 KiB before it is read.
async fn ask(cluster: &Cluster, mixed: &mut Instance, n: u32, stream: bool) -> http::Response<RecvStream> {
    let address = cluster.url.strip_prefix("http://").expect("a URL");
    let connection = TcpStream::connect(address).await.expect("connects");
    let mut builder = h2::client::Builder::new();
    let greeting = builder.initial_window_size(1024).handshake::<_, Bytes>(connection);
    let (mut client, connection) = greeting.await.expect("greets");
    tokio::spawn(connection);
    let request = http::Request::post(format!("{}/v1/completions", cluster.url)).body(()).expect("a request");
    let (response, mut body) = client.send_request(request, false).expect("is sent");
    let prompt = "p".repeat(PROMPT_TOKENS);
    let asked =
        json!({"model": "tiny", "prompt": prompt, "max_tokens": 1, "n": n, "echo": true, "stream": stream});
    body.send_data(asked.to_string().into(), true).expect("is sent");
    let leg = mixed.dispatch().await.leg;
    for choice in 0..n {
        mixed.of_choice((leg, choice), 0, "x", Some(v1::FinishReason::Length));
    }
    response.await.expect("a head")
}

/// The whole body, unless it breaks off.
async fn read(response: http::Response<RecvStream>) -> Result<String, h2::Error> {
    let (mut body, mut whole) = (response.into_body(), Vec::new());
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        whole.extend_from_slice(&chunk);
    }
    Ok(String::from_utf8(whole).expect("is UTF-8"))
}

#[tokio::test]
async fn an_answer_that_nobody_reads_holds_its_memory_until_the_deadline_and_no_seat() {
    let (cluster, mut mixed) = cluster(Duration::from_secs(6)).await;
    let reserved = || cluster.service.metrics.prompt_reserved.get();
    let whole = ask(&cluster, &mut mixed, 2, false).await;
    let length: i64 = whole.headers()["content-length"].to_str().expect("text").parse().expect("a number");
    until("the seat is given back", || cluster.service.metrics.in_flight.get() == 0).await;
    assert_eq!((length > 2 * PROMPT_TOKENS as i64, reserved()), (true, length), "as much as is written");
    until("the memory is, too", || reserved() == 0).await;
    assert!(read(whole).await.is_err(), "the rest is not there any more");

    for n in [2, 1] {
        let stream = ask(&cluster, &mut mixed, n, true).await;
        assert!(reserved() > i64::from(n) * PROMPT_TOKENS as i64);
        until("it is given back", || reserved() == 0).await;
        let told = read(stream).await.expect("ends");
        assert!(
            told.contains("deadline_exceeded") && !told.contains("[DONE]"),
            "{}",
            &told[told.len() - 300..]
        );
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_long_answer_is_whole_however_slowly_it_is_read() {
    let (cluster, mut mixed) = cluster(Duration::from_secs(60)).await;
    let whole = read(ask(&cluster, &mut mixed, 2, false).await).await.expect("is whole");
    let whole: Value = serde_json::from_str(&whole).expect("is JSON");
    let stream = read(ask(&cluster, &mut mixed, 2, true).await).await.expect("is whole");
    let events = events(&stream);
    assert_eq!(events.last(), Some(&"[DONE]"));
    let expected = format!("{}x", "p".repeat(PROMPT_TOKENS));
    for index in 0..2 {
        assert_eq!(whole["choices"][index]["text"], expected);
        let text = |event: &&str| {
            let chunk: Value = serde_json::from_str(event).expect("is JSON");
            let choice = &chunk["choices"][0];
            (choice["index"] == index).then(|| choice["text"].as_str().unwrap_or_default().to_owned())
        };
        assert_eq!(events[..events.len() - 1].iter().filter_map(text).collect::<String>(), expected);
    }
    cluster.at_rest().await;
}
