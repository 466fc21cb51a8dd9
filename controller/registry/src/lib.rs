//! The state of a Baton cluster: one Store contract over etcd, memory or a remote controller.
