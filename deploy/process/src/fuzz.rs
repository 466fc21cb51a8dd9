//! What the target `files` in `integration-tests/fuzz` calls: what operators give a process, and certificates and traces of
//! whoever comes.

use std::path::Path;

use ::http::{HeaderMap, HeaderValue};
use tokio_rustls::rustls::pki_types::CertificateDer;

use crate::{access, duration, telemetry::TraceContext, tls};

/// The first byte says what the rest is; other crates take the others.
pub fn files(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    match kind % 8 {
        0 => {
            let Some(actors) = access::tokens_of(&text) else { return };
            assert!(actors.len() <= text.lines().count());
            assert!(
                actors
                    .iter()
                    .all(|actor| !actor.name.is_empty() && !actor.name.contains(char::is_whitespace))
            );
        }
        1 => {
            if let Ok(identity) = text.parse::<tls::Identity>() {
                assert_eq!(identity.to_string(), text, "one name has one spelling");
            }
        }
        2 => certificate(rest),
        3 => {
            let Ok(taken) = duration::parse(&text) else { return };
            assert_eq!(duration::parse(&duration::format(taken)), Ok(taken));
        }
        4 => trace(rest),
        _ => {}
    }
}

/// A certificate in DER, as a peer shows it, or in PEM, as it stands in a file.
fn certificate(bytes: &[u8]) {
    if bytes.starts_with(b"-----BEGIN") {
        if let Ok(read) = tls::fuzz_certificates(bytes, Path::new("ca.pem")) {
            assert!(!read.is_empty());
            read.iter().for_each(|one| _ = tls::fuzz_identity(one));
        }
        return;
    }
    if let Ok(identity) = tls::fuzz_identity(&CertificateDer::from(bytes)) {
        assert_eq!(identity.to_string().parse(), Ok(identity));
    }
}

/// Headers `traceparent` and `tracestate`, parted by a line's end, of a request that is taken into a trace.
fn trace(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    for (name, value) in ["traceparent", "tracestate"].into_iter().zip(bytes.split(|&byte| byte == b'\n')) {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.insert(name, value);
        }
    }
    let context = TraceContext::sent(&headers);
    assert_eq!(TraceContext::new(context.parent(), context.state()), context, "what goes on is taken, too");
    context.adopt(&tracing::Span::none());
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_is_taken() {
        baton_fuzz::replay("files", super::files);
    }
}
