//! Real handshakes over real sockets, with certificates made here: who is let in, who is not, and what they are told.

use std::{
    fs,
    net::TcpListener as StdListener,
    path::Path,
    time::{Instant, SystemTime},
};

use rcgen::{CertificateParams, KeyPair, SanType, date_time_ymd};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, rustls};
use tokio_stream::StreamExt;
use tonic::{
    Code, Status, Streaming,
    service::Routes,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};

use super::{testing::Authority, *};
use crate::{
    Closed, HealthHandle,
    error::one_line,
    grpc::{self, GrpcOptions},
    seats::{SETTLES_WITHIN, Why},
};

const SOON: Duration = Duration::from_secs(20);
const DOMAIN: &str = "test";
const CONTROLLER: &str = "spiffe://test/baton/controller/c-0";
const COORDINATOR: &str = "spiffe://test/baton/coordinator/e-0";
const SERVER: &str = "spiffe://test/baton/server/s-0";

/// What the port under test takes: calls of coordinators, checks of health standing in for them.
const DOOR: Door = Door {
    calls: &[("/grpc.health.v1.Health/", Allowed::Roles(&[Role::Coordinator]))],
    without_certificate: false,
};

impl Authority {
    fn tls(&self, folder: &Path, uri: &str) -> Tls {
        open(&self.issue(folder, uri, |_| {}), uri)
    }
}

/// As a process of the URI's role does, but that nothing looks whether the files change.
fn open(config: &TlsConfig, uri: &str) -> Tls {
    let owner = Owner::Service(uri.parse::<Identity>().expect("good").role);
    let credentials = Credentials::read(config.clone(), owner).expect("good files");
    Tls { credentials: Some(Arc::new(credentials)), counts: Counts::default() }
}

/// A controller's port.
struct Port {
    address: String,
    tls: Tls,
    closed: Closed,
    shutdown: CancellationToken,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Port {
    fn serve(tls: Tls, door: Door) -> Self {
        Self::with(tls, door, grpc::CONNECTIONS)
    }

    fn with(tls: Tls, door: Door, connections: usize) -> Self {
        let listener = StdListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let (shutdown, closed) = (CancellationToken::new(), Closed::default());
        let options = GrpcOptions {
            health: HealthHandle::default(),
            services: Vec::new(),
            descriptors: tonic_health::pb::FILE_DESCRIPTOR_SET,
            tls: tls.clone(),
            door,
            shutdown: shutdown.clone(),
            drain: Duration::ZERO,
            keep_alive: grpc::KeepAlive::default(),
            connections,
            frame_bytes: grpc::FRAME_BYTES,
            closed: closed.clone(),
        };
        tokio::spawn(grpc::serve(listener, Routes::default(), options));
        Self { address, tls, closed, shutdown }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(format!("http://{}", self.address)).expect("good")
    }

    fn refused(&self, why: &'static str) -> u64 {
        self.tls.counts.refused.get_or_create(&super::Why { why }).get()
    }

    /// Checks the health of a controller here, as this caller.
    async fn check(&self, caller: &Tls) -> Result<(), Status> {
        check(caller.dial(Role::Controller).connect_lazy(&self.endpoint())).await
    }

    /// A stream that stands, and the first of it.
    async fn watch(&self, caller: &Tls) -> Streaming<HealthCheckResponse> {
        let channel = caller.dial(Role::Controller).connect(self.endpoint()).await.expect("it connects");
        let watched = HealthClient::new(channel).watch(HealthCheckRequest::default()).await;
        let mut stream = watched.expect("it is let in").into_inner();
        stream.next().await.expect("a first").expect("a status");
        stream
    }
}

async fn check(channel: Channel) -> Result<(), Status> {
    let call = async { HealthClient::new(channel).check(HealthCheckRequest::default()).await.map(drop) };
    timeout(SOON, call).await.expect("an answer in time")
}

fn told(refused: Result<(), Status>) -> String {
    one_line(&refused.expect_err("it is refused"))
}

#[tokio::test]
async fn the_role_of_a_certificate_decides() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let of = |uri| ours.tls(folder.path(), uri);
    let port = Port::serve(of(CONTROLLER), DOOR);
    port.check(&of(COORDINATOR)).await.expect("coordinators are let in");
    port.check(&of("spiffe://test/baton/coordinator")).await.expect("without a name, too");

    let status = port.check(&of(SERVER)).await.expect_err("a server is not");
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(
        status.message(),
        format!("/grpc.health.v1.Health/Check is for coordinators, not for {SERVER}")
    );
    assert_eq!(port.refused("role"), 1);

    // Of another cluster of the same authority; it names the controller itself, so as to get that far.
    let elsewhere = of("spiffe://elsewhere/baton/coordinator");
    let text = told(port.check(&elsewhere).await);
    assert!(text.contains("spiffe://elsewhere/baton/controller was asked for"), "{text}");
}

#[tokio::test]
async fn who_is_dialled_has_to_be_who_was_asked_for() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let caller = ours.tls(folder.path(), COORDINATOR);
    let port = Port::serve(ours.tls(folder.path(), SERVER), DOOR);
    let dialled = async |dial: Dial| dial.connect(port.endpoint()).await.map(drop);
    dialled(caller.dial(Role::Server)).await.expect("a server, whichever");
    dialled(caller.dial(Role::Server).named("s-0")).await.expect("that server");
    for (dial, wanted) in [
        (caller.dial(Role::Controller), "spiffe://test/baton/controller"),
        (caller.dial(Role::Server).named("s-1"), "spiffe://test/baton/server/s-1"),
    ] {
        let text = one_line(&dialled(dial).await.expect_err("somebody else"));
        assert!(text.ends_with(&format!("the other side is {SERVER}, and {wanted} was asked for")), "{text}");
    }
}

#[tokio::test]
async fn strangers_are_refused_in_the_handshake() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let port = Port::serve(ours.tls(folder.path(), CONTROLLER), DOOR);

    // Signed by somebody else, who believes our authority, too.
    let theirs = Authority::new();
    let stranger = theirs.issue(folder.path(), COORDINATOR, |_| {});
    fs::write(&stranger.ca_file, ours.pem.clone() + &theirs.pem).expect("a file");
    let text = told(port.check(&open(&stranger, COORDINATOR)).await);
    assert!(text.contains("UnknownCA") || text.contains("DecryptError"), "{text}");

    let expires = SystemTime::now() + Duration::from_secs(2);
    let expiring = ours.issue(folder.path(), COORDINATOR, |params| params.not_after = expires.into());
    let expired = open(&expiring, COORDINATOR);
    while SystemTime::now() < expires + Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let text = told(port.check(&expired).await);
    assert!(text.contains("CertificateExpired"), "{text}");

    let nobody = TlsConfig { ca_file: expiring.ca_file, ..TlsConfig::default() };
    let nobody = Tls::of_operator(&nobody, Some(DOMAIN.into())).expect("good files");
    let text = told(port.check(&nobody).await);
    assert!(text.contains("CertificateRequired"), "{text}");
    assert_eq!(port.refused("handshake"), 3);

    // And we believe no controller that a stranger signed for.
    let folder = tempfile::tempdir().expect("a folder");
    let text = told(port.check(&Authority::new().tls(folder.path(), COORDINATOR)).await);
    assert!(text.contains("invalid peer certificate"), "{text}");
}

#[tokio::test]
async fn where_tokens_will_do_a_certificate_is_not_needed_for_what_is_open() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let config = ours.issue(folder.path(), CONTROLLER, |_| {});
    let nobody = TlsConfig { ca_file: config.ca_file.clone(), ..TlsConfig::default() };
    let nobody = Tls::of_operator(&nobody, Some(DOMAIN.into())).expect("good files");
    let port = Port::serve(open(&config, CONTROLLER), Door { without_certificate: true, ..DOOR });
    let status = port.check(&nobody).await.expect_err("health is for coordinators here");
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    assert!(status.message().ends_with("by their certificate: no certificate was shown"), "{status}");
    let open = Door { calls: &[], without_certificate: true };
    Port::serve(port.tls.clone(), open).check(&nobody).await.expect("health is for anyone here");
}

#[tokio::test]
async fn who_shows_only_a_token_shows_it_to_no_other_cluster() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let config = ours.issue(folder.path(), CONTROLLER, |_| {});
    let token = TlsConfig { ca_file: config.ca_file.clone(), ..TlsConfig::default() };
    assert!(matches!(Tls::of_operator(&token, None), Err(TlsError::NoDomain)));
    let port = Port::serve(open(&config, CONTROLLER), Door { calls: &[], without_certificate: true });
    port.check(&Tls::of_operator(&token, Some(DOMAIN.into())).expect("good files")).await.expect("is ours");
    let elsewhere = Tls::of_operator(&token, Some("elsewhere".into())).expect("good files");
    let text = told(port.check(&elsewhere).await);
    let wanted =
        format!("the other side is {CONTROLLER}, and spiffe://elsewhere/baton/controller was asked for");
    assert!(text.contains(&wanted), "{text}");
    // A certificate says it as well, and is not gainsaid.
    let admin = ours.issue(folder.path(), "spiffe://test/baton/admin/alice", |_| {});
    port.check(&Tls::of_operator(&admin, None).expect("good files")).await.expect("is ours");
    let error = Tls::of_operator(&admin, Some("elsewhere".into())).map(drop).expect_err("two domains");
    assert!(
        error.to_string().ends_with("is of the trust domain test, and elsewhere was asked for"),
        "{error}"
    );
}

#[tokio::test]
async fn plaintext_and_tls_say_so_to_each_other() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let port = Port::serve(ours.tls(folder.path(), CONTROLLER), DOOR);
    let text = told(port.check(&Tls::plaintext()).await);
    assert!(text.contains("this port speaks mutual TLS"), "{text}");
    assert_eq!(port.refused("plaintext"), 1);
    let plaintext = Port::serve(Tls::plaintext(), Door::default());
    let text = told(plaintext.check(&ours.tls(folder.path(), COORDINATOR)).await);
    assert!(text.contains("the other side does not speak TLS"), "{text}");
    plaintext.check(&Tls::plaintext()).await.expect("without TLS nobody is asked");
}

#[tokio::test]
async fn nothing_below_tls_1_3_is_spoken() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let port = Port::serve(ours.tls(folder.path(), CONTROLLER), DOOR);
    let shake = async |version| {
        let mut roots = rustls::RootCertStore::empty();
        let pem = rustls::pki_types::pem::PemObject::from_pem_slice(ours.pem.as_bytes());
        roots.add(pem.expect("a certificate")).expect("an authority");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let tcp = TcpStream::connect(&port.address).await.expect("it connects");
        let name = "127.0.0.1".try_into().expect("an address");
        TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await
            .map(drop)
            .expect_err("refused")
            .to_string()
    };
    let old = shake(&rustls::version::TLS12).await;
    assert!(old.contains("ProtocolVersion"), "{old}");
    // With the version in use it gets as far as the certificate, which is for no host.
    let new = shake(&rustls::version::TLS13).await;
    assert!(new.contains("invalid peer certificate"), "{new}");
}

#[tokio::test]
async fn changed_files_are_for_new_connections_and_old_streams_go_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let (old, new) = (Authority::new(), Authority::new());
    let (theirs, ours) = (folder.path().join("theirs"), folder.path().join("ours"));
    for folder in [&theirs, &ours] {
        fs::create_dir(folder).expect("a folder");
    }
    let (port, caller) = (Port::serve(old.tls(&ours, CONTROLLER), DOOR), old.tls(&theirs, COORDINATOR));
    let mut standing = port.watch(&caller).await;

    // Both go over to another authority, one after the other.
    let config = new.issue(&ours, CONTROLLER, |_| {});
    let held = port.tls.credentials.clone().expect("TLS");
    assert!(held.refresh().expect("good files").is_some());
    let text = told(port.check(&caller).await);
    assert!(text.contains("invalid peer certificate"), "{text}");
    new.issue(&theirs, COORDINATOR, |_| {});
    assert!(caller.credentials.as_ref().expect("TLS").refresh().expect("good files").is_some());
    port.check(&caller).await.expect("both know the new authority");
    let silent = timeout(Duration::from_millis(50), standing.next()).await;
    assert!(silent.is_err(), "the stream of before goes on, and there is nothing new: {silent:?}");

    // What cannot be used is told by name, and changes nothing.
    fs::write(&config.key_file, KeyPair::generate().expect("a key").serialize_pem()).expect("a file");
    let error = held.refresh().expect_err("another's key").to_string();
    let start = format!("tls.key_file: {} is not the key of ", config.key_file.display());
    assert!(error.starts_with(&start), "{error}");
    port.check(&caller).await.expect("the files of before are in use");
}

#[tokio::test(start_paused = true)]
async fn files_are_followed() {
    let (folder, metrics) = (tempfile::tempdir().expect("a folder"), Metrics::new("test"));
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let until =
        |day: u8| move |params: &mut CertificateParams| params.not_after = date_time_ymd(2090, 1, day);
    let config = Authority::new().issue(folder.path(), SERVER, until(1));
    let tls = Tls::start(&config, Role::Server, || Counts::register(&metrics), &shutdown, &tasks)
        .expect("good files");
    let shown = |day: u8| {
        let until = date_time_ymd(2090, 1, day).unix_timestamp();
        let line =
            format!("baton_tls_certificate_expiry_timestamp_seconds{{file=\"tls.cert_file\"}} {until}\n");
        assert!(metrics.render().contains(&line), "{line}{}", metrics.render());
    };
    shown(1);
    let held = || tls.credentials.as_ref().expect("TLS").current();
    let before = held();
    Authority::new().issue(folder.path(), SERVER, |params| {
        params.subject_alt_names =
            vec![SanType::URI("spiffe://test/baton/server".try_into().expect("ASCII"))];
        until(2)(params);
    });
    let taken = async {
        while Arc::ptr_eq(&held(), &before) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    timeout(LOOK_EVERY * 10, taken).await.expect("what has changed is taken");
    assert!(metrics.render().contains("baton_tls_reloads_total{outcome=\"taken\"} 1"));
    assert!(metrics.render().contains("baton_tls_reloads_total{outcome=\"failed\"} 0"));
    shown(2);
    fs::write(&config.key_file, "no key").expect("a file");
    tokio::time::sleep(LOOK_EVERY * 4).await;
    assert!(metrics.render().contains("baton_tls_reloads_total{outcome=\"failed\"} 1"), "told once");
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_certificate_that_something_else_shows_is_followed() {
    let (folder, metrics) = (tempfile::tempdir().expect("a folder"), Metrics::new("test"));
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let (setting, file) = ("store.etcd.cert_file", folder.path().join("etcd.pem"));
    let start = |counts| watch(setting, &file, counts, &shutdown, &tasks);
    let error = start(Counts::default()).expect_err("there is no file").to_string();
    assert!(error.starts_with("store.etcd.cert_file: ") && error.contains("etcd.pem"), "{error}");
    let until = |day: u8| {
        let made = Authority::new().issue(folder.path(), SERVER, move |params| {
            params.not_after = date_time_ymd(2090, 1, day);
        });
        fs::copy(made.cert_file, &file).expect("a file");
    };
    let shown = |day: u8| {
        let until = date_time_ymd(2090, 1, day).unix_timestamp();
        let line =
            format!("_certificate_expiry_timestamp_seconds{{file=\"store.etcd.cert_file\"}} {until}\n");
        metrics.render().contains(&line)
    };
    until(1);
    start(Counts::register(&metrics)).expect("a certificate");
    assert!(shown(1), "{}", metrics.render());
    until(2);
    let renewed = async |day: u8| {
        let comes = async {
            while !shown(day) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        timeout(LOOK_EVERY * 10, comes).await.expect("the new end is told");
    };
    renewed(2).await;
    // No PEM, and PEM of what is no certificate.
    for (failed, bad) in
        [(1, "no certificate"), (2, "-----BEGIN CERTIFICATE-----\nAQI=\n-----END CERTIFICATE-----\n")]
    {
        fs::write(&file, bad).expect("a file");
        tokio::time::sleep(LOOK_EVERY * 4).await;
        assert!(shown(2), "{bad}: what is none changes nothing");
        let line = format!("baton_tls_reloads_total{{outcome=\"failed\"}} {failed}\n");
        assert!(metrics.render().contains(&line), "{bad}: {}", metrics.render());
    }
    until(3);
    renewed(3).await;
    assert!(metrics.render().contains("baton_tls_reloads_total{outcome=\"taken\"} 2\n"));
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
}

#[tokio::test]
async fn those_that_say_nothing_keep_nobody_out() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let (tls, caller) = (ours.tls(folder.path(), CONTROLLER), ours.tls(folder.path(), COORDINATOR));
    let port = Port::with(tls, DOOR, 4);
    // A call stands all the while, by one who is known.
    let mut standing = port.watch(&caller).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(&port.address).await.expect("it connects"));
    }
    tokio::time::sleep(SETTLES_WITHIN).await;
    let began = Instant::now();
    port.check(&caller).await.expect("it is let in beside them");
    assert!(began.elapsed() < handshake::HANDSHAKE_WITHIN / 2, "{:?}", began.elapsed());
    // The first of them has made room; the last has the time that anybody has, and no more.
    for stream in &mut silent {
        let gone = timeout(SOON, stream.read(&mut [0])).await.expect("it is closed");
        assert_eq!(gone.expect("in order"), 0);
    }
    assert_eq!((port.closed.of(Why::Stranger), port.refused("slow")), (1, 2));
    let silent = timeout(Duration::from_millis(50), standing.next()).await;
    assert!(silent.is_err(), "the stream goes on, and there is nothing new: {silent:?}");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let good = ours.issue(folder.path(), SERVER, |_| {});
    let read = |config: &TlsConfig, own| {
        let error = Credentials::read(config.clone(), Owner::Service(own)).map(drop).expect_err("refused");
        error.to_string()
    };
    let cert = good.cert_file.display().to_string();
    let text = read(&good, Role::Controller);
    assert!(text.contains(&cert) && text.contains("`deploy/certificates issue controller NAME`"), "{text}");
    let text = read(&TlsConfig { ca_file: "/absent/ca".into(), ..good.clone() }, Role::Server);
    assert!(text.starts_with("tls.ca_file: /absent/ca cannot be read: "), "{text}");
    let text = read(&TlsConfig { key_file: good.cert_file.clone(), ..good.clone() }, Role::Server);
    assert!(text.starts_with(&format!("tls.key_file: {cert} holds no key: ")), "{text}");
    let text = read(&TlsConfig { cert_file: good.key_file.clone(), ..good.clone() }, Role::Server);
    assert!(text.ends_with("holds no certificate (PEM)"), "{text}");
    let text = read(&TlsConfig { cert_file: good.ca_file.clone(), ..good.clone() }, Role::Server);
    assert!(text.contains("it names no role"), "{text}");

    let stranger = Authority::new();
    let unknown =
        TlsConfig { ca_file: stranger.issue(folder.path(), COORDINATOR, |_| {}).ca_file, ..good.clone() };
    let text = read(&unknown, Role::Server);
    assert!(text.starts_with(&format!("tls.cert_file: {cert} would be believed by nobody")), "{text}");
    assert!(text.ends_with(": none of them has signed it"), "{text}");
    let over = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let text = read(&ours.issue(folder.path(), COORDINATOR, over), Role::Coordinator);
    assert!(text.ends_with(": it has expired"), "{text}");

    assert_eq!(TlsConfig::default().validate(), Ok(()));
    assert_eq!(good.validate(), Ok(()));
    let half = TlsConfig { key_file: PathBuf::new(), ..good };
    assert_eq!(half.validate().expect_err("half of it").key, "tls.key_file");
}

#[test]
fn alerts_and_dashboards_ask_for_metrics_that_there_are() {
    let asking = concat!(
        include_str!("../../../alerts/baton.rules.yaml"),
        include_str!("../../../dashboards/control-plane.json"),
    );
    let metrics = Metrics::new("test");
    let counts = Counts::register(&metrics);
    assert!(metrics.render().contains("{outcome=\"failed\"} 0"), "the first failure is an increase");
    counts.refused("role");
    counts.shows(&Shown { file: "tls.cert_file", named: String::new(), until: Some(UnixTime::now()) });
    let exported = metrics.render();
    let words = asking.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let asked: Vec<_> = words.filter(|word| word.starts_with("baton_tls_")).collect();
    assert!(!asked.is_empty());
    for metric in asked {
        assert!(
            exported.contains(&format!("# TYPE {} ", metric.trim_end_matches("_total"))),
            "nobody exports {metric}"
        );
    }
}
