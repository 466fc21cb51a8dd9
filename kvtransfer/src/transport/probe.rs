//! What a host can do: for each kind of transport, what it would use, or why it cannot be had.

use std::path::Path;

use super::{TransportKind, ascend, shm};

/// Whether slices can travel in one way on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportProbe {
    pub kind: TransportKind,
    /// What it would use, or why it cannot be had; one line for people.
    pub found: Result<String, String>,
}

/// Looks at all kinds, the best first. Ascend's libraries are looked for in `libraries` only, if that is given. Opens
/// libraries and devices, which may take a moment; changes nothing.
pub fn probe(libraries: Option<&Path>) -> Vec<TransportProbe> {
    let ascend = ascend::probe(&libraries.map_or_else(ascend::Search::system, ascend::Search::only));
    let library = |found: Result<&Path, &ascend::Unavailable>| match found {
        Ok(file) => Ok(file.display().to_string()),
        Err(why) => Err(why.to_string()),
    };
    let found = |kind| match kind {
        TransportKind::Tcp => Ok("any network".into()),
        TransportKind::Shm => {
            shm::probe().map(|()| "this host's processes".into()).map_err(|error| error.to_string())
        }
        TransportKind::Rdma => rdma(),
        TransportKind::Hixl => library(ascend.hixl.as_ref().map(|hixl| hixl.file.as_path())),
        TransportKind::Hccl => library(ascend.hccl.as_ref().map(|hccl| hccl.file.as_path())),
    };
    TransportKind::ALL.map(|kind| TransportProbe { kind, found: found(kind) }).to_vec()
}

#[cfg(all(feature = "rdma", target_os = "linux", target_pointer_width = "64"))]
fn rdma() -> Result<String, String> {
    let ports = super::rdma::probe().map_err(|why| why.to_string())?;
    Ok(ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
}

#[cfg(not(all(feature = "rdma", target_os = "linux", target_pointer_width = "64")))]
fn rdma() -> Result<String, String> {
    Err("this build has none (feature `rdma`, 64-bit Linux)".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_what_it_uses_or_a_reason() {
        let nowhere = Path::new("/nonexistent");
        let found = probe(Some(nowhere));
        assert_eq!(found.iter().map(|one| one.kind).collect::<Vec<_>>(), TransportKind::ALL);
        for TransportProbe { kind, found } in found {
            match kind {
                TransportKind::Tcp | TransportKind::Shm => assert!(found.is_ok(), "{kind}: {found:?}"),
                TransportKind::Hixl | TransportKind::Hccl => {
                    let why = found.expect_err("not there");
                    assert!(why.contains("/nonexistent"), "{kind}: {why}");
                }
                TransportKind::Rdma => assert!(!found.unwrap_or_else(|why| why).is_empty()),
            }
        }
    }
}
