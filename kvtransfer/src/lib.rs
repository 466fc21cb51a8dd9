//! Moves KV caches between instances: layouts, sessions, leases, transports.
