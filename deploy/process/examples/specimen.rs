//! A process with nothing but the life that every Baton process has; the crate's tests start it and watch it live and
//! die. `mode` says how it behaves.

use std::{process::ExitCode, time::Duration};

use baton_process::{
    Closed, CommonArgs, Listen, Process, ProcessConfig, ProcessError, ServiceConfig, Tls, grpc, http,
    tls::Door,
};
use clap::Parser;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tonic::service::Routes;

/// Shows what baton-process does for a process.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Specimen {
    /// "serve", "panic" (an essential task does), "stuck" (ignores the shutdown).
    mode: String,
    http: Listen,
    grpc: Listen,
    process: ProcessConfig,
}

impl Default for Specimen {
    fn default() -> Self {
        let (http, grpc) = (Listen::loopback(), Listen::loopback());
        Self { mode: "serve".to_owned(), http, grpc, process: ProcessConfig::default() }
    }
}

impl ServiceConfig for Specimen {
    const EXAMPLE: &'static str = "mode = \"stuck\"\n";

    fn process(&self) -> &ProcessConfig {
        &self.process
    }
}

fn main() -> ExitCode {
    baton_process::run("specimen", Args::parse().common, Vec::new(), specimen)
}

async fn specimen(process: Process<Specimen>) -> Result<(), ProcessError> {
    let (http, grpc) = (process.config.http.bind()?, process.config.grpc.bind()?);
    let address = |listener: &std::net::TcpListener| listener.local_addr().map_err(ProcessError::Http);
    println!("http {}\ngrpc {}", address(&http)?, address(&grpc)?);
    let router = http::router(process.metrics.clone(), process.health.clone());
    process.essential.serve(
        "http",
        http::serve(http, http::Port::of_observers(router), process.shutdown.clone(), process.drain()),
    );
    let options = grpc::GrpcOptions {
        health: process.health.clone(),
        services: vec!["baton.v1.Inference"],
        descriptors: baton_proto::FILE_DESCRIPTOR_SET,
        tls: Tls::plaintext(),
        door: Door::default(),
        shutdown: process.shutdown.clone(),
        drain: process.drain(),
        keep_alive: grpc::KeepAlive::default(),
        connections: grpc::CONNECTIONS,
        frame_bytes: grpc::FRAME_BYTES,
        closed: Closed::of_grpc(&process.metrics),
    };
    process.essential.serve("grpc", grpc::serve(grpc, Routes::default(), options));
    if process.config.mode == "panic" {
        process.essential.serve("doomed", async {
            tokio::task::yield_now().await;
            if std::process::id() > 0 {
                panic!("as the test asked");
            }
            Ok::<(), ProcessError>(())
        });
    }
    tracing::info_span!(target: "baton_specimen", "getting ready").in_scope(|| process.health.set_ready());
    println!("ready");
    if process.config.mode == "stuck" {
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    process.shutdown.cancelled().await;
    Ok(())
}
