//! Compiles the protos without a protoc, and keeps the descriptor set for gRPC reflection.

use prost::Message;
use std::{env, error::Error, fs, path::PathBuf};

const PROTOS: [&str; 8] =
    ["common", "inference", "handoff", "kv_cache", "control", "state", "store", "admin"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=protos");
    let files = PROTOS.map(|name| format!("protos/baton/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["protos"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("baton.v1.fds"), descriptors.encode_to_vec())?;
    // Maps in order: one message has one encoding.
    let build = tonic_prost_build::configure().bytes(".").btree_map(".");
    build.codec_path("crate::codec::MessageCodec").compile_fds(descriptors)?;
    Ok(())
}
