//! Streams over a connection that the test reads byte by byte: which of them go past the connection's task, and that
//! nothing is lost, doubled or out of turn where they do not.
//!
//! Who wrote a chunk shows in its length: hyper writes hexadecimal digits in capitals, what goes past it in small letters.

use std::time::Duration;

use baton_coordinator::CoordinatorConfig;
use baton_proto::v1;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use v1::FinishReason;

use crate::scripted::{Cluster, Instance, PATIENCE, chat_text, events, until};

/// One connection.
struct Wire {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Wire {
    async fn open(cluster: &Cluster) -> Self {
        let address = cluster.url.strip_prefix("http://").expect("a URL").parse().expect("an address");
        let socket = TcpSocket::new_v4().expect("a socket");
        // So that whoever does not read soon makes itself felt.
        socket.set_recv_buffer_size(4 << 10).expect("a small buffer");
        Self { stream: socket.connect(address).await.expect("connects"), read: Vec::new() }
    }

    async fn ask(&mut self, bodies: &[Value]) {
        let request = |body: &Value| {
            let body = body.to_string();
            format!(
                "POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        let requests: String = bodies.iter().map(request).collect();
        self.stream.write_all(requests.as_bytes()).await.expect("is written");
    }

    /// Up to and with `end`, without it.
    async fn until(&mut self, end: &str) -> String {
        let found = async {
            loop {
                let at = self.read.windows(end.len()).position(|window| window == end.as_bytes());
                if let Some(at) = at {
                    return at;
                }
                let read = self.stream.read_buf(&mut self.read).await.expect("is read");
                assert_ne!(read, 0, "the connection ended after {:?}", String::from_utf8_lossy(&self.read));
            }
        };
        let at = timeout(PATIENCE, found).await.expect("more in time");
        let line = self.read.drain(..at + end.len()).take(at).collect();
        String::from_utf8(line).expect("text")
    }

    async fn head(&mut self) {
        let head = self.until("\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    }

    /// The next chunk, as its length is written and what it holds; empty at the end.
    async fn chunk(&mut self) -> (String, String) {
        let length = self.until("\r\n").await;
        let bytes = usize::from_str_radix(&length, 16).expect("a length");
        while self.read.len() < bytes + 2 {
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await.expect("more in time");
            assert_ne!(read.expect("is read"), 0, "the connection ended within a chunk");
        }
        let text = self.read.drain(..bytes).collect();
        assert_eq!(self.read.drain(..2).collect::<Vec<_>>(), b"\r\n");
        (length, String::from_utf8(text).expect("text"))
    }

    /// What is left of an answer.
    async fn rest(&mut self) -> String {
        let mut all = String::new();
        loop {
            match self.chunk().await {
                (_, text) if text.is_empty() => return all,
                (_, text) => all += &text,
            }
        }
    }
}

fn asked(tokens: usize, more: &[(&str, Value)]) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": true,
        "max_tokens": tokens});
    more.iter().for_each(|(field, value)| body[*field] = value.clone());
    body
}

async fn one() -> (Cluster, Instance) {
    let (cluster, [mixed]) = Cluster::start([("m", v1::Role::Mixed)], |_| {}).await;
    (cluster, mixed)
}

#[tokio::test]
async fn tokens_go_past_the_connections_task_and_first_and_last_through_it() {
    let (cluster, mut mixed) = one().await;
    let mut wire = Wire::open(&cluster).await;
    // Lengths of all kinds, so that some are written with letters.
    let steps: Vec<String> = (1..=16).map(|length| "x".repeat(length)).collect();
    let whole = steps.concat();
    wire.ask(&[asked(whole.len() + 1, &[])]).await;
    let leg = mixed.dispatch().await.leg;
    let (mut position, mut body, mut lettered) = (0, String::new(), 0);
    for (number, step) in steps.iter().enumerate() {
        mixed.tokens(leg, position, step);
        position += step.len() as u32;
        if number == 0 {
            wire.head().await;
        }
        let (length, text) = wire.chunk().await;
        body += &text;
        if number > 0 {
            assert!(
                !length.contains(|c: char| c.is_ascii_uppercase()),
                "step {number} went through the task"
            );
            lettered += usize::from(length.contains(|c: char| c.is_ascii_lowercase()));
        }
    }
    assert!(lettered > 0, "no length tells who wrote it");
    mixed.finish(leg, position, "y", FinishReason::Length);
    body += &wire.rest().await;
    assert_eq!(chat_text(&events(&body)), whole + "y");
    cluster.at_rest().await;
}

#[tokio::test]
async fn who_reads_late_gets_everything() {
    const CHOICES: u32 = 16;
    const TOKENS: u32 = 400;
    let (cluster, mut mixed) = one().await;
    let mut wire = Wire::open(&cluster).await;
    wire.ask(&[asked(TOKENS as usize, &[("n", json!(CHOICES))])]).await;
    let leg = mixed.dispatch().await.leg;
    for position in 0..TOKENS {
        for choice in 0..CHOICES {
            let end = (position + 1 == TOKENS).then_some(FinishReason::Length);
            mixed.of_choice((leg, choice), position, &text_at(choice, position), end);
        }
        // Everything else has its turn, and nobody reads.
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    until("it has ended", || {
        cluster.service.roster.list().iter().all(|card| card.completion_tokens() >= TOKENS)
    })
    .await;
    wire.head().await;
    let body = wire.rest().await;
    let mut texts = vec![String::new(); CHOICES as usize];
    for event in events(&body).iter().filter_map(|event| serde_json::from_str::<Value>(event).ok()) {
        for choice in event["choices"].as_array().expect("choices") {
            let index = choice["index"].as_u64().expect("an index") as usize;
            texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        }
    }
    for (choice, text) in (0..).zip(texts) {
        let expected: String = (0..TOKENS).map(|position| text_at(choice, position)).collect();
        assert!(text == expected, "choice {choice} has {} of {TOKENS} tokens", text.len());
    }
    cluster.at_rest().await;
}

fn text_at(choice: u32, position: u32) -> String {
    char::from(b'a' + ((choice + position) % 26) as u8).to_string()
}

#[tokio::test]
async fn requests_that_follow_at_once_are_answered_in_turn() {
    let (cluster, mut mixed) = one().await;
    let mut wire = Wire::open(&cluster).await;
    wire.ask(&[asked(4, &[]), asked(3, &[])]).await;
    for text in ["abcd", "xyz"] {
        let leg = mixed.dispatch().await.leg;
        let (last, first) = (text.len() - 1, &text[..1]);
        mixed.tokens(leg, 0, first);
        wire.head().await;
        let (_, mut body) = wire.chunk().await;
        for at in 1..last {
            mixed.tokens(leg, at as u32, &text[at..=at]);
            body += &wire.chunk().await.1;
        }
        mixed.finish(leg, last as u32, &text[last..], FinishReason::Length);
        body += &wire.rest().await;
        assert_eq!(chat_text(&events(&body)), text);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_stream_goes_on_while_the_coordinator_drains_and_its_connection_closes_then() {
    let (cluster, mut mixed) = one().await;
    let mut wire = Wire::open(&cluster).await;
    wire.ask(&[asked(4, &[])]).await;
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "a");
    wire.head().await;
    let (_, mut body) = wire.chunk().await;
    let service = cluster.shut_down().await;
    for (position, text) in [(1, "b"), (2, "c")] {
        mixed.tokens(leg, position, text);
        body += &wire.chunk().await.1;
    }
    mixed.finish(leg, 3, "d", FinishReason::Length);
    body += &wire.rest().await;
    assert_eq!(chat_text(&events(&body)), "abcd");
    let more = timeout(PATIENCE, wire.stream.read_u8()).await.expect("ends in time");
    assert!(more.is_err(), "the connection stays");
    until("nothing is held", || service.metrics.in_flight.get() == 0).await;
}

#[tokio::test]
async fn what_a_drain_has_no_more_time_for_is_told_so() {
    let patient = |config: &mut CoordinatorConfig| {
        (config.carry.patience, config.limits.placement_timeout) =
            (Duration::from_secs(30), Duration::from_secs(30));
        config.limits.max_concurrent = 2;
    };
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], patient).await;
    let stream = cluster.chat(json!({"stream": true}));
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "a");
    let stream = stream.await.expect("ends");
    let whole = cluster.chat(json!({}));
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "b");
    let waiting = cluster.chat(json!({}));
    until("it waits in line", || cluster.service.metrics.queued.get() == 1).await;
    let service = cluster.shut_down().await;
    let body = timeout(PATIENCE, stream.text()).await.expect("ends in time").expect("is not cut");
    let events = events(&body);
    let last: Value = serde_json::from_str(events.last().expect("an event")).expect("is JSON");
    assert_eq!(
        (chat_text(&events[..events.len() - 1]).as_str(), last["error"]["type"].as_str()),
        ("a", Some("server_error"))
    );
    let answer = timeout(PATIENCE, whole).await.expect("ends in time").expect("is answered");
    assert_eq!(answer.status(), 502);
    let answer = timeout(PATIENCE, waiting).await.expect("ends in time").expect("is answered");
    assert_eq!(answer.status(), 503);
    until("nothing is held", || service.metrics.in_flight.get() == 0).await;
}

#[tokio::test]
async fn a_stream_that_has_nothing_to_tell_is_sent_comments() {
    const COMMENT: &str = ": waiting\n\n";
    let often = |config: &mut CoordinatorConfig| {
        config.limits.stream_comment_after = Duration::from_millis(20);
    };
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], often).await;
    let response = cluster.chat(json!({"stream": true}));
    let leg = mixed.dispatch().await.leg;
    mixed.tokens(leg, 0, "a");
    let mut response = response.await.expect("ends");
    let mut body = String::new();
    while body.matches(COMMENT).count() < 3 {
        let chunk = timeout(PATIENCE, response.chunk()).await.expect("a comment comes").expect("is read");
        body.push_str(std::str::from_utf8(&chunk.expect("it has not ended")).expect("UTF-8"));
    }
    // Past the connection's task again, which has written the comments.
    for (position, text) in (1..).zip(["b", "c", "d"]) {
        mixed.tokens(leg, position, text);
    }
    mixed.finish(leg, 4, "e", FinishReason::Stop);
    body.push_str(&response.text().await.expect("is read"));
    let told = body.replace(COMMENT, "");
    let events = events(&told);
    assert_eq!((chat_text(&events).as_str(), events.last()), ("abcde", Some(&"[DONE]")));
    cluster.at_rest().await;
}
