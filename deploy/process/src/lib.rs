//! How every Baton process starts, is observed and stops. Knows nothing of language models.
//!
//! A binary's `main` parses its flags and calls [`run`]; everything else is handed to it in a [`Process`]. The modules
//! stand in the order a process meets them: flags and configuration ([`args`], [`config`], [`reference`]), logs and traces
//! ([`telemetry`]), files that change ([`follow`]), signals (`signals`), the life itself ([`run`]), its sockets ([`listen`]), who it is to others and they
//! to it ([`tls`]), who of the people may ask and change ([`access`]), what it serves ([`grpc`], [`http`]), and what it shows
//! of itself ([`health`], [`metrics`]). [`prefetch`] is for who goes through much memory.

pub mod access;
pub mod args;
pub mod config;
pub mod duration;
mod error;
mod essential;
pub mod follow;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod grpc;
pub mod health;
pub mod http;
mod life;
pub mod listen;
pub mod metrics;
mod nearest;
pub mod open_files;
pub mod prefetch;
pub mod reference;
mod seats;
mod settings;
mod signals;
pub mod telemetry;
pub mod tls;
mod underway;

pub use args::CommonArgs;
pub use error::{ConfigError, ProcessError, one_line};
pub use essential::Essential;
pub use health::{Health, HealthHandle};
pub use life::{PANIC_LOGGED, Process, run};
pub use listen::{Listen, ListenError};
pub use metrics::Metrics;
pub use seats::Closed;
pub use settings::{
    Invalid, LogConfig, LogFormat, OtlpConfig, ProcessConfig, ServiceConfig, ShutdownConfig, Unserved,
};
pub use tls::{Https, HttpsConfig, Tls, TlsConfig, TlsError};
