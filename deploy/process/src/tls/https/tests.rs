//! Clients over real sockets: who is let in, what they speak, and what becomes of changed files.

use std::{fs, io, net::TcpListener as StdListener};

use axum::routing::get;
use rcgen::{CertificateParams, SanType};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsConnector, client,
    rustls::{ClientConfig, pki_types::CertificateDer},
};

use super::{
    super::{LOOK_EVERY, handshake::HANDSHAKE_WITHIN, testing::Authority},
    *,
};
use crate::{
    Closed, HealthHandle, Metrics,
    http::{Port, router, serve},
    seats::{SETTLES_WITHIN, Why},
};

const SOON: std::time::Duration = std::time::Duration::from_secs(20);

/// A port whose certificate is for this machine.
struct Served {
    _folder: TempDir,
    ours: Authority,
    config: HttpsConfig,
    metrics: Metrics,
    closed: Closed,
    address: String,
    shutdown: CancellationToken,
    /// An answer for `/never` is being made, and is not made any more.
    asked: Arc<Notify>,
    left: CancellationToken,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn here() -> SanType {
    SanType::IpAddress("127.0.0.1".parse().expect("an address"))
}

impl Served {
    /// `clients`: who signs for those that are let in.
    fn start(clients: Option<&Authority>) -> Self {
        Self::with(clients, 100)
    }

    fn with(clients: Option<&Authority>, connections: usize) -> Self {
        let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
        let path = |name: &str| folder.path().join(name);
        let mut config =
            HttpsConfig { cert_file: path("crt"), key_file: path("key"), client_ca_file: PathBuf::new() };
        if let Some(clients) = clients {
            config.client_ca_file = path("client-ca");
            fs::write(&config.client_ca_file, &clients.pem).expect("a file");
        }
        write(&config, &ours);
        let (metrics, shutdown) = (Metrics::new("test"), CancellationToken::new());
        let https = Https::start(&config, || Counts::register(&metrics), &shutdown, &TaskTracker::new())
            .expect("good files");
        let listener = StdListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("is bound").to_string();
        let (asked, left) = (Arc::new(Notify::new()), CancellationToken::new());
        let (begun, held) = (asked.clone(), left.clone());
        let never = get(async move || {
            let _held = held.drop_guard();
            begun.notify_one();
            std::future::pending::<()>().await
        });
        let routes = router(metrics.clone(), HealthHandle::default()).route("/never", never);
        let closed = Closed::default();
        let port = Port { https, connections, closed: closed.clone(), ..Port::of_observers(routes) };
        tokio::spawn(serve(listener, port, shutdown.clone(), SOON));
        Self { _folder: folder, ours, config, metrics, closed, address, shutdown, asked, left }
    }

    /// Connects as a client that believes these authorities' signatures and shows what they have signed for it.
    async fn connect(
        &self,
        believes: &Authority,
        shows: Option<&Authority>,
        speaks: &str,
    ) -> io::Result<client::TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(of_pem(&believes.pem)).expect("an authority");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .expect("has it")
            .with_root_certificates(roots);
        let mut config = match shows {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let name = SanType::DnsName("a-client".try_into().expect("a name"));
                let (certificate, key) = authority.sign(name, |_| {});
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
                builder.with_client_auth_cert(vec![of_pem(&certificate)], key).expect("a pair")
            }
        };
        config.alpn_protocols = vec![speaks.into()];
        let tcp = TcpStream::connect(&self.address).await?;
        let name = "127.0.0.1".try_into().expect("an address");
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    }

    /// The same, and asks.
    async fn ask(&self, believes: &Authority, shows: Option<&Authority>, speaks: &str) -> io::Result<String> {
        let mut stream = self.connect(believes, shows, speaks).await?;
        let agreed = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        if agreed.as_deref() == Some(b"h2") {
            return Ok("h2".to_owned());
        }
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        timeout(SOON, stream.read_to_string(&mut answer)).await.expect("in time")?;
        Ok(answer)
    }
}

/// Has them hold what this authority signs.
fn write(config: &HttpsConfig, authority: &Authority) {
    let (certificate, key) = authority.sign(here(), |_: &mut CertificateParams| {});
    fs::write(&config.key_file, key).expect("a file");
    fs::write(&config.cert_file, certificate).expect("a file");
}

fn of_pem(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate")
}

#[tokio::test]
async fn clients_are_served_and_need_no_certificate() {
    let served = Served::start(None);
    let answer = served.ask(&served.ours, None, "http/1.1").await.expect("is served");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(served.ask(&served.ours, None, "h2").await.expect("is served"), "h2");
}

#[tokio::test]
async fn a_client_that_has_left_is_missed_whatever_it_had_sent_behind_its_request() {
    let served = Served::start(None);
    let mut stream = served.connect(&served.ours, None, "http/1.1").await.expect("connects");
    stream.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n\r\n").await.expect("is sent");
    served.asked.notified().await;
    drop(stream);
    timeout(SOON, served.left.cancelled()).await.expect("nobody misses it");
}

#[tokio::test]
async fn whoever_shows_none_of_the_wanted_certificates_is_turned_away() {
    let (theirs, others) = (Authority::new(), Authority::new());
    let served = Served::start(Some(&theirs));
    let answer = served.ask(&served.ours, Some(&theirs), "http/1.1").await.expect("is served");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for shown in [None, Some(&others)] {
        let error = served.ask(&served.ours, shown, "http/1.1").await.expect_err("is refused");
        assert!(error.to_string().contains("alert"), "{error}");
    }
    let told = served.metrics.render();
    assert!(told.contains(r#"baton_tls_refused_total{why="handshake"} 2"#), "{told}");
}

#[tokio::test]
async fn those_that_say_nothing_keep_nobody_out() {
    let served = Served::with(None, 8);
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(&served.address).await.expect("it connects"));
    }
    sleep(SETTLES_WITHIN).await;
    let asked = std::time::Instant::now();
    let answer = served.ask(&served.ours, None, "http/1.1").await.expect("is served beside them");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(asked.elapsed() < HANDSHAKE_WITHIN / 2, "{:?}", asked.elapsed());
    let gone = timeout(SOON, silent[0].read(&mut [0])).await.expect("the first has made room");
    assert_eq!(gone.expect("in order"), 0);
    assert_eq!(served.closed.of(Why::Stranger), 1);
}

#[tokio::test]
async fn plain_http_is_told_what_to_do() {
    let served = Served::start(None);
    let mut stream = TcpStream::connect(&served.address).await.expect("connects");
    stream.write_all(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("is sent");
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.expect("in time").expect("is read");
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with("https://\n"), "{answer}");
}

#[tokio::test]
async fn changed_files_are_for_new_connections_and_bad_ones_for_none() {
    let (served, new) = (Served::start(None), Authority::new());
    write(&served.config, &new);
    let begun = tokio::time::Instant::now();
    while served.ask(&new, None, "http/1.1").await.is_err() {
        assert!(begun.elapsed() < SOON, "the new certificate is never shown");
        tokio::time::sleep(LOOK_EVERY / 20).await;
    }
    let ends = r#"baton_tls_certificate_expiry_timestamp_seconds{file="https.cert_file"} "#;
    assert!(served.metrics.render().contains(ends));
    fs::write(&served.config.cert_file, "no certificate").expect("a file");
    while !served.metrics.render().contains(r#"baton_tls_reloads_total{outcome="failed"} 1"#) {
        assert!(begun.elapsed() < SOON, "nobody looks");
        tokio::time::sleep(LOOK_EVERY / 20).await;
    }
    served.ask(&new, None, "http/1.1").await.expect("what was read before stays in use");
}

#[test]
fn what_is_wrong_with_files_names_the_key_and_the_file() {
    let (folder, ours) = (tempfile::tempdir().expect("a folder"), Authority::new());
    let path = |name: &str| folder.path().join(name);
    let good =
        HttpsConfig { cert_file: path("crt"), key_file: path("key"), client_ca_file: path("client-ca") };
    write(&good, &ours);
    fs::write(&good.client_ca_file, &ours.pem).expect("a file");
    fs::write(path("other"), ours.sign(here(), |_| {}).1).expect("a file");
    fs::write(path("empty"), "").expect("a file");
    read(&good).expect("good files");
    let why = |config: HttpsConfig| read(&config).err().expect("is wrong").to_string();
    let none = why(HttpsConfig { cert_file: path("none"), ..good.clone() });
    assert!(none.starts_with("https.cert_file: ") && none.contains("none cannot be read"), "{none}");
    let other = why(HttpsConfig { key_file: path("other"), ..good.clone() });
    assert!(other.starts_with("https.key_file: ") && other.contains("other is not the key of"), "{other}");
    let empty = why(HttpsConfig { client_ca_file: path("empty"), ..good });
    assert!(empty.starts_with("https.client_ca_file: ") && empty.contains("holds no certificate"), "{empty}");
}
