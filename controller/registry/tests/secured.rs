//! An etcd that lets nobody in without a certificate, or without a password.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use baton_registry::{EtcdSettings, KeyRange, Store, StoreError, Txn, testing::EtcdServer};
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};

const SOON: Duration = Duration::from_secs(20);

/// Who signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    /// Writes its own certificate and one that it signs for `ip` with its key: `NAME-ca.pem`, `NAME.pem`, `NAME.key`.
    fn issue(&self, directory: &Path, name: &str, ip: Ipv4Addr) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::IpAddress(ip.into())];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        let write = |ending: &str, what: String| {
            std::fs::write(directory.join(format!("{name}{ending}")), what).expect("a file");
        };
        write("-ca.pem", self.0.pem());
        write(".pem", certificate.pem());
        write(".key", key.serialize_pem());
    }
}

/// Settings that trust `ca` and show the certificate of `name`.
fn settings(directory: &Path, endpoint: &str, ca: &str, name: &str) -> EtcdSettings {
    let file = |name: String| directory.join(name).display().to_string();
    let own = |ending: &str| if name.is_empty() { String::new() } else { file(format!("{name}{ending}")) };
    EtcdSettings {
        endpoints: vec![endpoint.to_owned()],
        ca_file: file(format!("{ca}-ca.pem")),
        cert_file: own(".pem"),
        key_file: own(".key"),
        ..EtcdSettings::default()
    }
}

async fn answer(settings: &EtcdSettings) -> Result<(), StoreError> {
    settings.validate().expect("good settings");
    let store = settings.open().expect("the files are there");
    store.range(KeyRange::exact("/up")).await.map(|_| ())
}

#[tokio::test]
async fn etcd_is_reached_by_tls_and_strangers_are_not_let_in() {
    let directory = tempfile::tempdir().expect("a directory");
    let (at, authority, stranger) = (directory.path(), Authority::new(), Authority::new());
    // Members that one process starts have one address, for which certificates can be made before.
    let probe = EtcdServer::start().await;
    authority.issue(at, "etcd", probe.ip());
    authority.issue(at, "controller", probe.ip());
    stranger.issue(at, "stranger", probe.ip());
    let etcd = EtcdServer::start_tls(&at.join("etcd-ca.pem"), &at.join("etcd.pem"), &at.join("etcd.key"));
    let good = settings(at, &etcd.endpoint(), "etcd", "controller");
    let up = async { while answer(&good).await.is_err() {} };
    tokio::time::timeout(SOON, up).await.expect("etcd answers by TLS");

    let store = good.open().expect("good");
    store.txn(Txn::new().put("/a", "1", None)).await.expect("written");
    for (what, ca, name) in [
        ("no certificate", "etcd", ""),
        ("a stranger's certificate", "etcd", "stranger"),
        ("an etcd that nobody vouches for", "stranger", "controller"),
    ] {
        let refused = answer(&settings(at, &etcd.endpoint(), ca, name)).await;
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{what}: {refused:?}");
    }
    let plain = EtcdSettings { endpoints: vec![etcd.endpoint()], ..EtcdSettings::default() };
    assert!(answer(&plain).await.is_err(), "without TLS");
    assert!(answer(&good).await.is_ok(), "and the good one still gets in");
}

/// Certificates come to their end, and authorities change: what is in the files by then counts, without a restart.
#[tokio::test]
async fn files_that_have_changed_count_once_etcd_is_connected_to_anew() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = directory.path();
    let probe = EtcdServer::start().await;
    let started = |authority: &Authority| {
        authority.issue(at, "etcd", probe.ip());
        authority.issue(at, "controller", probe.ip());
        EtcdServer::start_tls(&at.join("etcd-ca.pem"), &at.join("etcd.pem"), &at.join("etcd.key"))
    };
    let mut etcd = started(&Authority::new());
    let store = settings(at, &etcd.endpoint(), "etcd", "controller").open().expect("the files are there");
    let answers = || async { while store.range(KeyRange::exact("/up")).await.is_err() {} };
    tokio::time::timeout(SOON, answers()).await.expect("etcd answers");

    // Another authority signs both.
    let next = Authority::new();
    next.issue(at, "etcd", probe.ip());
    etcd.start_again();
    let refused = store.range(KeyRange::exact("/up")).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "etcd is another by now: {refused:?}");
    next.issue(at, "controller", probe.ip());
    tokio::time::timeout(SOON, answers()).await.expect("etcd answers again");
}

#[tokio::test]
async fn a_user_with_its_password_may_do_what_its_role_allows() {
    let etcd = EtcdServer::start().await;
    let mut admin = etcd_client::Client::connect([etcd.endpoint()], None).await.expect("reached");
    for user in ["root", "baton"] {
        admin.user_add(user, format!("{user}'s password"), None).await.expect("a user");
        admin.role_add(user).await.expect("a role");
        admin.user_grant_role(user, user).await.expect("granted");
    }
    let own = etcd_client::Permission::read_write("/baton/").with_prefix();
    admin.role_grant_permission("baton", own).await.expect("granted");
    admin.auth_enable().await.expect("enabled");

    let directory = tempfile::tempdir().expect("a directory");
    let user = |password: &str| {
        let file = directory.path().join("password");
        std::fs::write(&file, password).expect("a file");
        let (user, password_file) = ("baton".to_owned(), file.display().to_string());
        let endpoints = vec![etcd.endpoint()];
        EtcdSettings { endpoints, user, password_file, ..EtcdSettings::default() }.open().expect("good")
    };
    let store = user("baton's password\n");
    store.txn(Txn::new().put("/baton/a", "1", None)).await.expect("its own");
    let other = store.txn(Txn::new().put("/other", "1", None)).await;
    assert!(matches!(other, Err(StoreError::Refused(_))), "{other:?}");
    let wrong = user("a guess").range(KeyRange::exact("/baton/a")).await;
    assert!(matches!(wrong, Err(StoreError::Refused(_) | StoreError::Invalid(_))), "{wrong:?}");

    // The password is changed, and then the file.
    let root = etcd_client::ConnectOptions::new().with_user("root", "root's password");
    let mut admin = etcd_client::Client::connect([etcd.endpoint()], Some(root)).await.expect("reached");
    admin.user_change_password("baton", "another").await.expect("changed");
    let refused = store.txn(Txn::new().put("/baton/a", "2", None)).await;
    assert!(matches!(refused, Err(StoreError::Refused(_) | StoreError::Invalid(_))), "{refused:?}");
    std::fs::write(directory.path().join("password"), "another").expect("a file");
    store.txn(Txn::new().put("/baton/a", "2", None)).await.expect("the file has changed");
    admin.user_change_password("baton", "a third").await.expect("changed");
    std::fs::write(directory.path().join("password"), "a third").expect("a file");
    store.txn(Txn::new().put("/baton/a", "3", None)).await.expect("nobody noticed");

    let nobody = etcd.store().range(KeyRange::exact("/baton/a")).await;
    assert!(matches!(nobody, Err(StoreError::Refused(_) | StoreError::Invalid(_))), "{nobody:?}");
}
