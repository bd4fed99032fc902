//! Generates the client from the contract at each build that finds it changed.

use std::error::Error;

const PROTO: &str = "../../proto";
const SERVICE: &str = "layertap/v1/feature_service.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}/layertap/v1");
    // protox is a protobuf compiler in Rust: nobody needs to have a protoc.
    let files = protox::compile([SERVICE], [PROTO])?;
    tonic_prost_build::configure()
        .build_server(false)
        // `Bytes` shares the received message; the default `Vec<u8>` would be a copy of it.
        .bytes(".layertap.v1.Tensor.data")
        .compile_fds(files)?;
    Ok(())
}
