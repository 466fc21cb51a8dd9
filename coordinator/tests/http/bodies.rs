//! Request bodies that come slowly, grow, lie or never end: what memory they are granted, and that all is given back.

use std::time::Duration;

use crate::scripted::{Cluster, Instance, PATIENCE, other, served, until};
use baton_coordinator::prepare::Served;
use baton_proto::v1;
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use v1::FinishReason;

const KIB: usize = 1 << 10;
/// Of each body, what is not taken from the budget.
const FREE: usize = 16 * KIB;

/// A request whose body the test sends bit by bit.
pub(crate) struct Upload(TcpStream);

impl Upload {
    async fn begin(cluster: &Cluster, headers: &str, body: &[u8]) -> Self {
        Self::to(cluster, "/v1/completions", headers, body).await
    }

    pub(crate) async fn to(cluster: &Cluster, path: &str, headers: &str, body: &[u8]) -> Self {
        let address = cluster.url.strip_prefix("http://").expect("a URL");
        let mut stream = TcpStream::connect(address).await.expect("connects");
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("is sent");
        stream.write_all(body).await.expect("is sent");
        Self(stream)
    }

    /// One that announces so many bytes and sends the first of them.
    async fn announced(cluster: &Cluster, bytes: usize, body: &[u8]) -> Self {
        Self::begin(cluster, &format!("content-length: {bytes}"), body).await
    }

    async fn send(&mut self, body: &[u8]) {
        self.0.write_all(body).await.expect("is sent");
    }

    /// A chunk of a body that announces nothing.
    async fn send_chunk(&mut self, body: &[u8]) {
        self.send(format!("{:x}\r\n", body.len()).as_bytes()).await;
        self.send(body).await;
        self.send(b"\r\n").await;
    }

    /// The answer's status, head and body.
    pub(crate) async fn answer(mut self) -> (u16, String, Value) {
        let mut text = String::new();
        let read = timeout(PATIENCE, self.0.read_to_string(&mut text)).await;
        read.expect("an answer in time").expect("is read");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, head.to_ascii_lowercase(), serde_json::from_str(body).expect("is JSON"))
    }
}

/// A request for a model, as long as asked; tokens are bytes, and few of them.
fn request(model: &str, bytes: usize) -> String {
    let body = json!({"model": model, "prompt": "hi", "max_tokens": 1, "user": ""}).to_string();
    let padding = "u".repeat(bytes.saturating_sub(body.len()));
    body.replace(r#""user":"""#, &format!(r#""user":"{padding}""#))
}

/// Two models, a budget of 1 MiB.
async fn cluster() -> (Cluster, [Instance; 2]) {
    let roles = [("m", v1::Role::Mixed, 0), ("o", v1::Role::Mixed, 1)];
    Cluster::start_models(vec![served(), other()], roles, |config| {
        config.limits.max_body_bytes = 1024 * KIB;
        config.limits.max_held_body_bytes = 1024 * KIB;
    })
    .await
}

async fn finish(instance: &mut Instance) {
    let leg = instance.dispatch().await.leg;
    instance.finish(leg, 0, "x", FinishReason::Length);
}

fn reserved(cluster: &Cluster) -> usize {
    cluster.service.metrics.body_reserved.get().try_into().expect("is not negative")
}

async fn all_is_given_back(cluster: &Cluster) {
    cluster.at_rest().await;
    until("no body holds memory", || reserved(cluster) == 0).await;
}

#[tokio::test]
async fn slow_uploads_fill_the_budget_and_short_requests_go_on() {
    let (cluster, [mut tiny, mut another]) = cluster().await;
    let slow = request("tiny", 512 * KIB + FREE);
    let mut uploads = Vec::new();
    for _ in 0..2 {
        uploads.push(Upload::announced(&cluster, slow.len(), &slow.as_bytes()[..100]).await);
    }
    until("they have reserved all", || reserved(&cluster) == 1024 * KIB).await;

    let large = request("other", FREE + 1);
    let refused = cluster.post("/v1/completions", large.clone()).await.expect("ends");
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    let error: Value = refused.json().await.expect("is JSON");
    assert_eq!(error["error"]["code"], "queue_full");
    // Who asks before it sends is told before it has.
    let headers = format!("content-length: {}\r\nexpect: 100-continue", large.len());
    let (status, head, _) = Upload::begin(&cluster, &headers, b"").await.answer().await;
    assert_eq!((status, head.contains("retry-after: 1")), (429, true), "{head}");
    let shown = cluster.get("/metrics").await.text().await.expect("is read");
    for line in [
        "baton_coordinator_refusals_total{reason=\"bytes\"} 2",
        "baton_coordinator_body_reserved_bytes 1048576",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line} is not in {shown}");
    }

    for (model, instance) in [("tiny", &mut tiny), ("other", &mut another)] {
        let short = cluster.post("/v1/completions", request(model, FREE));
        finish(instance).await;
        assert_eq!(short.await.expect("ends").status(), 200, "{model}");
    }

    // One that arrives is tokenised, and its memory free.
    let mut upload = uploads.pop().expect("two");
    upload.send(&slow.as_bytes()[100..]).await;
    let leg = tiny.dispatch().await.leg;
    assert_eq!(reserved(&cluster), 512 * KIB, "while it is being answered");
    let freed = cluster.post("/v1/completions", large);
    finish(&mut another).await;
    assert_eq!(freed.await.expect("ends").status(), 200);
    tiny.finish(leg, 0, "x", FinishReason::Length);
    assert_eq!(upload.answer().await.0, 200);
    drop(uploads);
    all_is_given_back(&cluster).await;
}

#[tokio::test]
async fn a_body_without_a_length_takes_what_it_grows_to() {
    let (cluster, [mut tiny, _]) = cluster().await;
    let body = request("tiny", 900 * KIB);
    let (begin, end) = body.as_bytes().split_at(600 * KIB);
    let mut upload = Upload::begin(&cluster, "transfer-encoding: chunked", b"").await;
    upload.send_chunk(begin).await;
    until("it has reserved what has come", || reserved(&cluster) >= 600 * KIB - FREE).await;
    let mut second = Upload::begin(&cluster, "transfer-encoding: chunked", b"").await;
    second.send_chunk(begin).await;
    second.send_chunk(b"").await;
    let (status, _, error) = second.answer().await;
    assert_eq!((status, &error["error"]["code"]), (429, &json!("queue_full")), "in its midst");
    upload.send_chunk(end).await;
    upload.send_chunk(b"").await;
    finish(&mut tiny).await;
    assert_eq!(upload.answer().await.0, 200);
    // Its bound is the same as that of one that announces its length.
    let mut long = Upload::begin(&cluster, "transfer-encoding: chunked", b"").await;
    long.send_chunk(&[b' '; 1025 * KIB]).await;
    long.send_chunk(b"").await;
    assert_eq!(long.answer().await.0, 413);
    all_is_given_back(&cluster).await;
}

#[tokio::test]
async fn a_client_that_gives_up_gives_its_bytes_back() {
    let (cluster, _instances) = cluster().await;
    let announced = Upload::announced(&cluster, 1024 * KIB, &[b' '; 1000]).await;
    until("it has reserved all", || reserved(&cluster) == 1024 * KIB - FREE).await;
    drop(announced);
    all_is_given_back(&cluster).await;
    let mut growing = Upload::begin(&cluster, "transfer-encoding: chunked", b"").await;
    growing.send_chunk(&[b' '; 500 * KIB]).await;
    until("it has reserved what has come", || reserved(&cluster) >= 500 * KIB - FREE).await;
    drop(growing);
    all_is_given_back(&cluster).await;
}

#[tokio::test]
async fn a_length_that_is_not_true_is_an_error() {
    let (cluster, _instances) = cluster().await;
    // More than comes: what was reserved is given back when that is clear.
    let mut less = Upload::announced(&cluster, 512 * KIB, request("tiny", 100).as_bytes()).await;
    until("it has reserved all", || reserved(&cluster) == 512 * KIB - FREE).await;
    less.0.shutdown().await.expect("ends");
    all_is_given_back(&cluster).await;
    // Less than comes: it ends where it said.
    let (status, _, error) =
        Upload::announced(&cluster, 50, request("tiny", 100).as_bytes()).await.answer().await;
    assert_eq!((status, &error["error"]["code"]), (400, &json!("invalid_value")));
    // The same where frames have lengths of their own.
    let address = cluster.url.strip_prefix("http://").expect("a URL");
    let stream = TcpStream::connect(address).await.expect("connects");
    let (mut client, connection) = h2::client::handshake(stream).await.expect("greets");
    tokio::spawn(connection);
    for announced in [50, 200] {
        let request = http::Request::post(format!("{}/v1/completions", cluster.url))
            .header("content-length", announced)
            .body(())
            .expect("a request");
        let (response, mut body) = client.send_request(request, false).expect("is sent");
        body.send_data(Bytes::from(self::request("tiny", 100)), true).expect("is sent");
        let answered = timeout(PATIENCE, response).await.expect("in time");
        assert!(answered.map_or(true, |answer| answer.status() == 400), "{announced}");
    }
    all_is_given_back(&cluster).await;
}

#[tokio::test]
async fn a_body_that_does_not_arrive_in_time_is_408() {
    let (cluster, [_mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        config.limits.body_timeout = Duration::from_millis(200);
    })
    .await;
    let (status, head, error) = Upload::announced(&cluster, 512 * KIB, b"{").await.answer().await;
    assert_eq!((status, &error["error"]["code"]), (408, &json!("request_timeout")));
    assert_eq!(error["error"]["message"], "the request body did not arrive within 0.2 s");
    assert_eq!(error["error"]["type"], "invalid_request_error");
    assert!(head.contains("connection: close"), "{head}");
    all_is_given_back(&cluster).await;
}

#[tokio::test]
async fn a_body_that_is_refused_holds_no_room_while_it_is_thrown_away() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        config.limits.max_concurrent = 1;
        config.limits.max_queued = 0;
        config.limits.max_body_bytes = 1000;
    })
    .await;
    // It goes on sending for as long as it is listened to.
    let refused = Upload::announced(&cluster, 2000, b"{").await;
    until("it has arrived", || cluster.service.roster.list().len() == 1).await;
    until("its room is free", || cluster.service.gate.enter(|| None, || false).is_ok()).await;
    let served = cluster.post("/v1/completions", request("tiny", 100));
    finish(&mut mixed).await;
    assert_eq!(served.await.expect("ends").status(), 200);
    assert_eq!(cluster.service.roster.list().len(), 1, "the other is still listened to");
    assert_eq!(refused.answer().await.0, 413);
    all_is_given_back(&cluster).await;
}

#[tokio::test]
async fn who_sends_all_before_looking_sees_why_it_was_not_wanted() {
    let (cluster, [mut mixed]) = Cluster::start([("m", v1::Role::Mixed)], |config| {
        (config.limits.max_concurrent, config.limits.max_queued) = (1, 0);
    })
    .await;
    let served = Upload::announced(&cluster, request("tiny", 0).len(), request("tiny", 0).as_bytes()).await;
    let leg = mixed.dispatch().await.leg;
    // More than lies in sockets' buffers: whoever does not read it leaves the client writing.
    let long = vec![b'u'; 7 << 20];
    let length = format!("content-length: {}", long.len());
    // Who asks before they send is told at once.
    let asks = format!("{length}\r\nexpect: 100-continue");
    assert_eq!(Upload::to(&cluster, "/v1/completions", &asks, b"").await.answer().await.0, 429);
    for (path, status) in
        [("/v1/completions", 429), ("/v1/nowhere", 404), ("/v1/models", 405), ("/nowhere", 404)]
    {
        let (got, head, _) = Upload::to(&cluster, path, &length, &long).await.answer().await;
        assert_eq!((got, head.contains("retry-after")), (status, status == 429), "{path}");
    }
    mixed.finish(leg, 0, "x", FinishReason::Stop);
    assert_eq!(served.answer().await.0, 200);
}

/// What is kept of prompts until they are answered is bounded, and short ones come in all the same.
#[tokio::test]
async fn long_prompts_take_memory_until_they_are_answered() {
    let long = Served { context_tokens: 100_000, ..served() };
    let (cluster, [mut mixed]) = Cluster::start_models(vec![long], [("m", v1::Role::Mixed, 0)], |config| {
        config.limits.max_body_bytes = 16 * KIB;
        config.limits.max_held_prompt_bytes = 96 * KIB;
        config.placement.room = Duration::from_secs(600);
    })
    .await;
    let ask = |tokens: usize| {
        let body = json!({"model": "tiny", "prompt": vec![7; tokens], "max_tokens": 1});
        cluster.post("/v1/completions", body.to_string())
    };
    let (mut sent, mut legs, mut room) = (Vec::new(), Vec::new(), 1);
    while legs.len() < room {
        sent.push(ask(8_000));
        legs.push(mixed.dispatch().await.leg);
        let each = cluster.service.metrics.prompt_reserved.get() as usize / legs.len();
        // 4 bytes for each token, beyond 16 KiB, and their blocks' names.
        assert!((8_000 * 4 - FREE..8_000 * 5 - FREE).contains(&each), "{each} bytes");
        room = 96 * KIB / each;
    }
    assert!(room >= 4, "{room}");
    let refused = ask(8_000).await.expect("ends");
    assert!(refused.status() == 429 && refused.headers().contains_key("retry-after"), "{refused:?}");
    let error: Value = refused.json().await.expect("is JSON");
    let message = error["error"]["message"].as_str().unwrap_or_default();
    assert!(message.starts_with("the prompts and log probabilities of other requests take"), "{message}");
    sent.push(ask(3_000));
    legs.push(mixed.dispatch().await.leg);
    legs.into_iter().for_each(|leg| mixed.finish(leg, 0, "x", FinishReason::Length));
    for response in sent {
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn log_probabilities_take_memory_until_they_are_answered() {
    let long = Served { context_tokens: 100_000, ..served() };
    let (cluster, [mut mixed]) = Cluster::start_models(vec![long], [("m", v1::Role::Mixed, 0)], |config| {
        config.limits.max_body_bytes = 64 * KIB;
        config.limits.max_held_prompt_bytes = 512 * KIB;
    })
    .await;
    let ask = |tokens: u32, choices: u32, logprobs: Option<u32>| {
        let body = json!({"model": "tiny", "prompt": "hi", "max_tokens": tokens, "n": choices, "logprobs": logprobs});
        cluster.post("/v1/completions", body.to_string())
    };
    let reserved = || cluster.service.metrics.prompt_reserved.get() as usize;
    let first = ask(200, 2, Some(5));
    let leg = mixed.dispatch().await.leg;
    // 136 bytes each, and 600 as JSON has it, beyond 16 KiB.
    assert!((2 * 147_200 - FREE..2 * 147_400 - FREE).contains(&reserved()), "{} bytes", reserved());
    let plain = ask(90_000, 2, None);
    let plain_leg = mixed.dispatch().await.leg;
    assert!(reserved() < 2 * 147_400, "tokens alone take little");
    assert_eq!(ask(600, 1, Some(5)).await.expect("ends").status(), 429, "there is room, and not so much");
    let too_many = ask(10_000, 1, Some(5)).await.expect("ends");
    assert_eq!(too_many.status(), 400);
    let error: Value = too_many.json().await.expect("is JSON");
    assert_eq!(error["error"]["param"], "logprobs");
    let echoes = json!({"model": "tiny", "prompt": vec![7; 8_000], "max_tokens": 1, "n": 32, "echo": true});
    let echoes = cluster.post("/v1/completions", echoes.to_string()).await.expect("ends");
    assert_eq!(echoes.status(), 400);
    let error: Value = echoes.json().await.expect("is JSON");
    assert_eq!(error["error"]["param"], "echo");
    for (request, leg) in [(first, leg), (plain, plain_leg)] {
        request.abort();
        assert_eq!(mixed.cancelled().await.leg, leg);
    }
    until("it is given back", || reserved() == 0).await;
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_long_prompt_that_waits_gives_its_memory_back_as_it_leaves_the_line() {
    let long = Served { context_tokens: 100_000, ..served() };
    let (cluster, [mut mixed]) = Cluster::start_models(vec![long], [("m", v1::Role::Mixed, 0)], |config| {
        (config.limits.max_concurrent, config.limits.max_queued) = (1, 1);
    })
    .await;
    let ask = |tokens: usize, priority: i32| {
        let body = json!({"model": "tiny", "prompt": vec![7; tokens], "max_tokens": 1, "priority": priority});
        cluster.post("/v1/completions", body.to_string())
    };
    let kept = || cluster.service.metrics.prompt_reserved.get();
    let first = ask(10, 0);
    let leg = mixed.dispatch().await.leg;
    let outranked = ask(8_000, 5);
    until("it waits", || kept() > 0).await;
    let higher = ask(10, 0);
    assert_eq!(outranked.await.expect("ends").status(), 429);
    assert_eq!(kept(), 0);
    mixed.finish(leg, 0, "x", FinishReason::Length);
    finish(&mut mixed).await;
    for response in [first, higher] {
        assert_eq!(response.await.expect("ends").status(), 200);
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn a_body_in_an_encoding_of_its_own_is_refused_by_its_name() {
    let (cluster, [mut tiny, _other]) = cluster().await;
    let ask = |encoding: &str| {
        let body = request("tiny", 100);
        let request = cluster.client.post(format!("{}/v1/completions", cluster.url)).body(body);
        tokio::spawn(request.header("content-encoding", encoding).send())
    };
    let refused = ask("gzip").await.expect("ends").expect("is answered");
    assert_eq!(refused.status(), 415);
    let error: Value = refused.json().await.expect("is JSON");
    let error = &error["error"];
    assert_eq!(
        (&error["type"], &error["code"]),
        (&json!("invalid_request_error"), &json!("unsupported_media_type"))
    );
    assert!(error["message"].as_str().expect("text").contains("\"gzip\""), "{error}");
    let plain = ask("identity");
    finish(&mut tiny).await;
    assert_eq!(plain.await.expect("ends").expect("is answered").status(), 200);
    all_is_given_back(&cluster).await;
}
