//! Drives real Baton processes with real clients, a real etcd and faults.
