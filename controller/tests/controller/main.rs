//! The controller as a whole: real gRPC over loopback, its embedded store and a real etcd, scripted servers.

mod api_keys;
mod cluster;
mod coordinators;
mod operators;
mod processes;
mod sessions;
mod takeover;
mod takeovers;
