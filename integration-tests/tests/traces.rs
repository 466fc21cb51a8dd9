//! One trace for each request, as a real collector receives it: through all services, below the caller's own span, with
//! parts that add up to the time to the first token that the client saw.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use baton_integration_tests::{
    Cluster, chat, eventually, metrics,
    process::{Service, free_address},
    required,
};
use futures::StreamExt;

/// The caller's, as W3C writes it.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const STATE: &str = "theirs=1";
/// What the coordinator does until the first token, in order.
const UNTIL_FIRST_TOKEN: [&str; 5] = ["read_body", "tokenise", "queue", "dispatch", "first_token"];
/// From a span's end until the collector shows it, the exporter's and its own batches included.
const SHOWN_BY: Duration = Duration::from_secs(30);

/// Of the time that the client saw: to connect, and until its own task runs again, on a busy machine.
const NOT_TOLD_MOST: Duration = Duration::from_millis(500);
/// Between the parts and the metric of the same time.
const ROUNDING_MOST: Duration = Duration::from_millis(1);

/// A collector that prints what it receives.
struct Collector {
    _process: Service,
    endpoint: String,
    log: std::path::PathBuf,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Span {
    service: String,
    trace: String,
    parent: String,
    state: String,
    id: String,
    name: String,
    /// Since 1970.
    start_nanos: u64,
    end_nanos: u64,
}

impl Span {
    fn nanos(&self) -> u64 {
        self.end_nanos - self.start_nanos
    }
}

impl Collector {
    fn start(folder: &Path) -> Self {
        let [grpc, http] = [(); 2].map(|()| free_address());
        let log = folder.join("collector.log");
        let mut command = Command::new(required("BATON_TEST_COLLECTOR"));
        command.args(["start", "--exporter", "blackhole", "--debug-log", "traces"]);
        command.args(["--debug-log-verbosity", "detailed", "--otlp-http-endpoint", &http]);
        command.args(["--otlp-grpc-endpoint", &grpc]);
        Self { _process: Service::start(&mut command, &log), endpoint: format!("http://{grpc}"), log }
    }

    /// All that it has shown so far.
    fn spans(&self) -> Vec<Span> {
        let (mut spans, mut service) = (Vec::<Span>::new(), String::new());
        for line in fs::read_to_string(&self.log).unwrap_or_default().lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("-> service.name: Str(") {
                service = name.trim_end_matches(')').to_owned();
            }
            if line.starts_with("Span #") {
                spans.push(Span { service: service.clone(), ..Span::default() });
            }
            let (Some(span), Some((key, value))) = (spans.last_mut(), line.split_once(':')) else { continue };
            let value = value.trim().to_owned();
            match key.trim() {
                "Trace ID" => span.trace = value,
                "Parent ID" => span.parent = value,
                "TraceState" => span.state = value,
                "ID" => span.id = value,
                "Name" => span.name = value,
                "Start time" => span.start_nanos = value.parse().expect("nanoseconds"),
                "End time" => span.end_nanos = value.parse().expect("nanoseconds"),
                _ => {}
            }
        }
        // The last may have been shown in part.
        spans.retain(|span| span.end_nanos > 0);
        spans
    }
}

/// Asks for a stream within the caller's trace. When the first token was seen.
async fn ask(cluster: &Cluster) -> Duration {
    let body = chat::request(cluster.model(), &chat::long_prompt(400), 24, true);
    let asked = Instant::now();
    let response = reqwest::Client::new()
        .post(format!("{}/v1/chat/completions", cluster.url()))
        .header("traceparent", format!("00-{TRACE}-{CALLER}-01"))
        .header("tracestate", STATE)
        .json(&body)
        .send()
        .await
        .expect("the coordinator answers");
    assert_eq!(response.status(), 200);
    let (mut pieces, mut text, mut seen) = (response.bytes_stream(), String::new(), None);
    while let Some(piece) = pieces.next().await {
        text.push_str(&String::from_utf8_lossy(&piece.expect("is read")));
        // The opening names a role, and may come long before.
        if text.contains(r#""delta":{"content":"#) {
            seen.get_or_insert(asked.elapsed());
        }
    }
    seen.expect("a token")
}

#[tokio::test]
async fn a_request_is_one_trace_whose_parts_add_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let collector = Collector::start(folder.path());
    let set = ["controller", "coordinator", "server"]
        .map(|service| format!("{service}.process.otlp.endpoint={}", collector.endpoint));
    let set: Vec<&str> = set.iter().flat_map(|setting| ["--set", setting]).collect();
    let cluster = Cluster::start(&set).await;
    let seen = ask(&cluster).await;

    // By name; those of legs by what they work at.
    let begun = Instant::now();
    let spans = eventually("all spans of the request", || async {
        assert!(begun.elapsed() < SHOWN_BY, "only these: {:#?}", collector.spans());
        let all: Vec<Span> = collector.spans().into_iter().filter(|span| span.trace == TRACE).collect();
        let has = |name: &str| all.iter().any(|span| span.name == name);
        let whole = ["request", "stream", "prefill", "hand_off", "kv_send", "kv_receive", "decode"];
        (whole.iter().all(|name| has(name)) && all.iter().filter(|span| span.name == "leg").count() == 2)
            .then_some(all)
    })
    .await;
    for span in &spans {
        assert_eq!(span.state, STATE, "{span:?}");
    }
    let by_id: BTreeMap<&str, &Span> = spans.iter().map(|span| (span.id.as_str(), span)).collect();
    let of = |name: &str| {
        let found = spans.iter().find(|span| span.name == name);
        found.unwrap_or_else(|| panic!("no {name} among {spans:#?}"))
    };
    let within = |name: &str| by_id.get(of(name).parent.as_str()).map(|span| span.name.as_str());

    let request = of("request");
    assert_eq!((request.parent.as_str(), request.service.as_str()), (CALLER, "baton-coordinator"));
    for part in UNTIL_FIRST_TOKEN.into_iter().chain(["stream"]) {
        assert_eq!(of(part).parent, request.id, "{part}");
    }
    for leg in spans.iter().filter(|span| span.name == "leg") {
        assert_eq!((leg.parent.as_str(), leg.service.as_str()), (request.id.as_str(), "baton-server"));
    }
    for part in [
        "await_turn",
        "prefill",
        "hand_off",
        "kv_send",
        "await_offer",
        "receive",
        "kv_receive",
        "join",
        "decode",
    ] {
        let found: Vec<_> = spans.iter().filter(|span| span.name == part).collect();
        assert!(found.iter().any(|span| by_id[span.parent.as_str()].name == "leg"), "{part}: {found:#?}");
    }
    assert_eq!(within("first_decode"), Some("leg"));

    // Without a gap between them, from when it came to the first token.
    let parts = UNTIL_FIRST_TOKEN.map(|part| {
        let ours = |span: &&Span| span.name == part && span.parent == request.id;
        spans.iter().find(ours).expect(part)
    });
    for pair in parts.windows(2) {
        assert_eq!(pair[0].end_nanos, pair[1].start_nanos, "{} and {}", pair[0].name, pair[1].name);
    }
    let sum = Duration::from_nanos(parts.iter().map(|part| part.nanos()).sum());
    assert!(sum <= seen, "{sum:?} of {seen:?}");
    assert!(seen - sum < NOT_TOLD_MOST, "{sum:?} of {seen:?}: something is not told");
    let metrics = reqwest::get(format!("{}/metrics", cluster.url())).await.expect("answers").text().await;
    let told = metrics::sum(&metrics.expect("text"), "baton_coordinator_time_to_first_token_seconds_sum", "");
    let told = Duration::from_secs_f64(told.expect("a request was answered"));
    assert!(told.abs_diff(sum) < ROUNDING_MOST, "{sum:?}, and the metric says {told:?}");
    let (prefill, first) = (of("prefill"), of("first_token"));
    assert!(prefill.start_nanos >= first.start_nanos && prefill.end_nanos <= first.end_nanos);
    cluster.stop().await;
}
