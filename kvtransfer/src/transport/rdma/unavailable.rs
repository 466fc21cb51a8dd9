//! What a machine lacks that RDMA needs.

/// Why there is no RDMA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unavailable {
    #[error(
        "the RDMA library cannot be used ({0}); install rdma-core (Debian: libibverbs1 and ibverbs-providers)"
    )]
    Library(String),
    #[error("there is no RDMA device, or this process may not see it (/dev/infiniband)")]
    NoDevice,
    #[error("no RDMA port can be used: {}", .0.join("; "))]
    NoPort(Vec<String>),
}
