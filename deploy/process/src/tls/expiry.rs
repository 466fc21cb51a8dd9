//! Until when a certificate is believed: what is to be renewed before.

use std::time::Duration;

use tokio_rustls::rustls::{
    crypto::ring,
    pki_types::{CertificateDer, TrustAnchor, UnixTime},
};
use webpki::{EndEntityCert, Error, KeyUsage};

/// Later than any certificate ends.
const NEVER: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));

/// By whoever believes `anchors`, which themselves do not end: they are believed for being there. Without any, as long as all
/// of `chain` lasts. Of two ways to an anchor it may be the one that ends sooner. `None`: it is no certificate.
pub(super) fn believed_until(
    chain: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    usage: KeyUsage,
) -> Option<UnixTime> {
    let (own, between) = chain.split_first()?;
    let own = EndEntityCert::try_from(own).ok()?;
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let mut until = None;
    // Whoever verifies says which certificate had ended: each time another one, that ends sooner.
    for _ in chain {
        let at = until.unwrap_or(NEVER);
        match own.verify_for_usage(algorithms, anchors, between, at, usage, None, None) {
            Err(Error::CertExpired { not_after, .. }) => until = Some(not_after),
            _ => break,
        }
    }
    until
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
    use webpki::anchor_from_trusted_cert;

    use super::*;

    fn params(until: i32, authority: Option<&str>) -> CertificateParams {
        let mut params = CertificateParams::new(vec!["x.example".to_owned()]).expect("a name");
        params.not_after = date_time_ymd(until, 1, 1);
        if let Some(name) = authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params
    }

    /// Of a certificate that one between it and the authority has signed, each with the year in which it ends.
    fn until(own: i32, between: i32, authority: i32, believed: bool) -> Option<UnixTime> {
        let [root_key, between_key, own_key] = [(); 3].map(|()| KeyPair::generate().expect("a key"));
        let root = params(authority, Some("root")).self_signed(&root_key).expect("signed");
        let root_signs = Issuer::new(params(authority, Some("root")), root_key);
        let middle = params(between, Some("between")).signed_by(&between_key, &root_signs).expect("signed");
        let middle_signs = Issuer::new(params(between, Some("between")), between_key);
        let own = params(own, None).signed_by(&own_key, &middle_signs).expect("signed");
        let chain = [own.der().clone(), middle.der().clone()];
        let anchor = anchor_from_trusted_cert(root.der()).expect("an authority");
        let anchors = if believed { vec![anchor] } else { vec![] };
        believed_until(&chain, &anchors, KeyUsage::server_auth())
    }

    fn year(year: i32) -> Option<UnixTime> {
        let seconds = date_time_ymd(year, 1, 1).unix_timestamp().try_into().expect("after 1970");
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }

    #[test]
    fn the_first_that_ends_of_a_chain_ends_it() {
        assert_eq!(until(2090, 2095, 2099, true), year(2090));
        assert_eq!(until(2095, 2090, 2099, true), year(2090));
        assert_eq!(until(2095, 2097, 2090, true), year(2095), "an authority is believed for being there");
        assert_eq!(until(2010, 2090, 2099, true), year(2010), "and one that has ended");
        assert_eq!(until(2095, 2090, 2099, false), year(2090), "nobody is known who believes it");
    }

    #[test]
    fn what_is_no_certificate_has_no_end() {
        assert_eq!(believed_until(&[], &[], KeyUsage::server_auth()), None);
        assert_eq!(believed_until(&[CertificateDer::from(&[1, 2][..])], &[], KeyUsage::server_auth()), None);
    }
}
