//! Answers that clients read late, or never: what becomes of them, what they hold, and until when.

use std::time::Duration;

use baton_coordinator::prepare::Served;
use baton_proto::{ApiError, ErrorCode, v1};
use bytes::Bytes;
use h2::{RecvStream, client::ResponseFuture};
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
};
use v1::FinishReason;

use crate::{
    drains::{at_once, drain},
    scripted::{Cluster, Instance, bytes, consumed, events, merge, served, until},
    stalls::either,
};

const PROMPT_TOKENS: usize = 90_000;
/// Of each request, what is not reserved.
const FREE: i64 = 16 << 10;

async fn cluster(request_timeout: Duration) -> (Cluster, Instance) {
    let long = Served { context_tokens: 100_000, ..served() };
    let configure = |config: &mut baton_coordinator::CoordinatorConfig| {
        config.limits.request_timeout = request_timeout;
    };
    let (cluster, [mixed]) = Cluster::start_models(vec![long], [("m", v1::Role::Mixed, 0)], configure).await;
    (cluster, mixed)
}

/// What asks for answers that begin with a long prompt.
fn asked(more: Value) -> String {
    let mut body =
        json!({"model": "tiny", "prompt": "p".repeat(PROMPT_TOKENS), "max_tokens": 1, "echo": true});
    merge(&mut body, more);
    body.to_string()
}

/// Sends it over a connection that takes no more than 1 KiB before it is read.
async fn send(cluster: &Cluster, more: Value) -> ResponseFuture {
    send_to(cluster, "/v1/completions", asked(more)).await
}

async fn send_to(cluster: &Cluster, path: &str, asked: String) -> ResponseFuture {
    let address = cluster.url.strip_prefix("http://").expect("a URL");
    let connection = TcpStream::connect(address).await.expect("connects");
    let mut builder = h2::client::Builder::new();
    let greeting = builder.initial_window_size(1024).handshake::<_, Bytes>(connection);
    let (mut client, connection) = greeting.await.expect("greets");
    tokio::spawn(connection);
    let request = http::Request::post(format!("{}{path}", cluster.url)).body(()).expect("a request");
    let (response, mut body) = client.send_request(request, false).expect("is sent");
    body.send_data(asked.into(), true).expect("is sent");
    response
}

/// Asks for answers of one token each.
async fn ask(cluster: &Cluster, mixed: &mut Instance, n: u32, stream: bool) -> http::Response<RecvStream> {
    let response = send(cluster, json!({"n": n, "stream": stream})).await;
    let leg = mixed.dispatch().await.leg;
    for choice in 0..n {
        mixed.of_choice((leg, choice), 0, "x", Some(FinishReason::Length));
    }
    response.await.expect("a head")
}

/// Sends it over HTTP/1.1, and takes no more than the kernel does.
async fn send_plainly(cluster: &Cluster, more: Value) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("is set");
    let address = cluster.url.strip_prefix("http://").and_then(|address| address.parse().ok());
    let mut stream = socket.connect(address.expect("an address")).await.expect("connects");
    let body = asked(more);
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.expect("is sent");
    stream.write_all(body.as_bytes()).await.expect("is sent");
    stream
}

/// The last event's error, after others that are whole.
fn error_of(told: &str) -> Value {
    let whole = |event| serde_json::from_str(event).expect("a whole event");
    let events: Vec<Value> = events(told).into_iter().map(whole).collect();
    events.last().expect("an event")["error"]["code"].clone()
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
        assert_eq!(error_of(&read(stream).await.expect("ends")), "deadline_exceeded");
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn log_probabilities_take_no_more_once_they_are_written_than_was_reserved_for_them() {
    const TOKENS: usize = 1_500;
    let (cluster, mut mixed) = cluster(Duration::from_secs(60)).await;
    let reserved = || cluster.service.metrics.prompt_reserved.get();
    for (path, field, prompt, logprobs) in [
        ("/v1/chat/completions", "messages", json!([{"role": "user", "content": "hi"}]), json!(true)),
        ("/v1/completions", "prompt", json!("hi"), json!(5)),
    ] {
        let chat = logprobs == json!(true);
        let mut asked = json!({"model": "tiny", field: prompt, "max_tokens": TOKENS, "logprobs": logprobs});
        let most = if chat { 20 } else { 5 };
        if chat {
            asked["top_logprobs"] = most.into();
        }
        let response = send_to(&cluster, path, asked.to_string()).await;
        let leg = mixed.dispatch().await.leg;
        let before = reserved();
        let (top_tokens, top_logprobs) = (128..128 + most).map(|token| (token, -12.345_678)).unzip();
        let scored = v1::TokenLogprobs { logprob: -12.345_678, top_tokens, top_logprobs };
        let end = v1::Finished { reason: v1::FinishReason::Length.into(), ..Default::default() };
        let (text, end) = ("x".repeat(TOKENS), Some(v1::leg_output::End::Finished(end)));
        mixed.scored(leg, 0, &text, vec![scored; TOKENS], end);
        let response = response.await.expect("a head");
        let length = response.headers()["content-length"].to_str().expect("text").parse::<i64>();
        let length = length.expect("a number");
        assert_eq!(reserved(), length, "{path}");
        assert!(length <= before + FREE, "{length} bytes are written, {before} were reserved: {path}");
        let whole: Value = serde_json::from_str(&read(response).await.expect("is whole")).expect("is JSON");
        assert_eq!(whole["usage"]["completion_tokens"], TOKENS);
        until("it is given back", || reserved() == 0).await;
    }
    cluster.at_rest().await;
}

#[tokio::test]
async fn an_answer_that_fails_at_once_and_that_nobody_reads_is_let_go_at_the_deadline() {
    let (cluster, mut mixed) = cluster(Duration::from_secs(6)).await;
    let response = send(&cluster, json!({"max_tokens": 2, "stream": true})).await;
    let leg = mixed.dispatch().await.leg;
    let failed = ApiError::new(ErrorCode::InvalidArgument, "as scripted").into();
    mixed.scored(leg, 0, "x", Vec::new(), Some(v1::leg_output::End::Failed(failed)));
    let response = response.await.expect("a head");
    assert_eq!((response.status(), cluster.service.metrics.in_flight.get()), (http::StatusCode::OK, 1));
    cluster.at_rest().await;
    assert_eq!(error_of(&read(response).await.expect("ends")), "deadline_exceeded");
}

#[tokio::test]
async fn an_answer_that_nobody_reads_is_counted_and_stopped() {
    let (cluster, mut mixed) = cluster(Duration::from_secs(60)).await;
    // More than the kernel takes of it by itself: a control character is six letters.
    let prompt = "\u{1}".repeat(PROMPT_TOKENS);
    let asked = json!({"prompt": prompt, "max_tokens": 9, "n": 8, "stop": "END", "stream": true});
    for plainly in [false, true] {
        let asked = asked.clone();
        let (plain, other) = match plainly {
            true => (Some(send_plainly(&cluster, asked).await), None),
            false => (None, Some(send(&cluster, asked).await)),
        };
        let leg = mixed.dispatch().await.leg;
        (0..8).for_each(|choice| mixed.of_choice((leg, choice), 0, "a", None));
        consumed(&cluster, 8).await;
        mixed.of_choice((leg, 0), 1, "bc", None);
        consumed(&cluster, 10).await;
        mixed.of_choice((leg, 3), 1, "bcEND", None);
        let cancelled = mixed.cancelled().await;
        assert_eq!((cancelled.leg, cancelled.choice), (leg, Some(3)));
        consumed(&cluster, 15).await;
        drop((plain, other));
        assert_eq!(mixed.cancelled().await.reason, "client_gone");
        cluster.at_rest().await;
    }
}

#[tokio::test]
async fn an_answer_that_nobody_reads_leaves_an_instance_that_drains_and_is_whole() {
    let long = Served { context_tokens: 100_000, ..served() };
    let roles = ["a", "b"].map(|id| (id, v1::Role::Mixed, 0));
    let (cluster, [mut a, mut b]) = Cluster::start_models(vec![long], roles, at_once).await;
    let response = send(&cluster, json!({"max_tokens": 6, "stream": true})).await;
    let (drained, other, first) = either(&mut a, &mut b).await;
    drained.tokens(first.leg, 0, "a");
    consumed(&cluster, 1).await;
    let response = response.await.expect("a head");
    drained.tokens(first.leg, 1, "bc");
    drain(drained);
    let resumed = other.dispatch().await;
    assert_eq!(resumed.generated_tokens, bytes("abc"));
    let handed = drained.dispatch().await;
    drained.finish(handed.leg, 3, "d", FinishReason::HandedOff);
    other.finish(resumed.leg, 4, "ef", FinishReason::Length);
    consumed(&cluster, 6).await;
    let told = read(response).await.expect("is whole");
    let events = events(&told);
    assert_eq!(
        (text_of(&events, 0), events.last()),
        (format!("{}abcdef", "p".repeat(PROMPT_TOKENS)), Some(&"[DONE]"))
    );
    cluster.at_rest().await;
}

#[tokio::test]
async fn tokens_that_have_gathered_are_told_some_at_a_time() {
    let (cluster, mut mixed) = cluster(Duration::from_secs(60)).await;
    let text: String = (0..300).map(|at| char::from(b'a' + (at % 26) as u8)).collect();
    let scored = |byte: u8| v1::TokenLogprobs { logprob: -f32::from(byte), ..Default::default() };
    let response = send(
        &cluster,
        json!({"prompt": "hi", "echo": false, "max_tokens": 300, "logprobs": 0, "stream": true}),
    )
    .await;
    let leg = mixed.dispatch().await.leg;
    mixed.scored(leg, 0, &text, text.bytes().map(scored).collect(), None);
    mixed.finish(leg, 300, "", FinishReason::Length);
    let told = read(response.await.expect("a head")).await.expect("is whole");
    let events = events(&told);
    assert_eq!(text_of(&events, 0), text);
    let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let lists = chunks.filter_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array().cloned());
    let lists: Vec<_> = lists.collect();
    assert!(
        lists.iter().all(|list| list.len() <= 64),
        "{:?}",
        lists.iter().map(Vec::len).collect::<Vec<_>>()
    );
    let tokens = lists.iter().flatten().filter_map(Value::as_str);
    assert_eq!(tokens.collect::<String>(), text);
    cluster.at_rest().await;
}

/// The text of a choice, of a stream's events.
fn text_of(events: &[&str], index: usize) -> String {
    let chunks = events.iter().filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let choices = chunks.map(|chunk| chunk["choices"][0].clone()).filter(|choice| choice["index"] == index);
    choices.filter_map(|choice| choice["text"].as_str().map(str::to_owned)).collect()
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
        assert_eq!(text_of(&events, index), expected);
    }
    cluster.at_rest().await;
}
