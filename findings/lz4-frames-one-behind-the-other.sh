#!/usr/bin/env bash
# lz4_flex 0.14.0 with feature `frame`, flate2 1.1.5, zstd 0.14.0 (crates.io); lz4, gzip and zstd of the command line.
#
# One would expect: a reader decodes a file of several frames one behind the other, as the format allows and the commands
# `lz4 -d`, `gzip -d` and `zstd -d` do. `read_to_end` gives all bytes.
# What happens: lz4_flex's `FrameDecoder` and flate2's `GzDecoder` end after the first frame with Ok and no error, so
# `read_to_end` gives a part of the data. zstd's `Decoder` goes on through all frames. (flate2 has `MultiGzDecoder`.)
#
# Output seen (two frames of 5 bytes each):
#     lz4_flex: 5 bytes
#     flate2 GzDecoder: 5 bytes
#     flate2 MultiGzDecoder: 10 bytes
#     zstd: 10 bytes
# For a reader of compressed cores (parallel compressors write many frames): decode again while there is input left.
set -euo pipefail
for tool in cargo cc; do command -v $tool >/dev/null || { echo "needs $tool"; exit 2; }; done
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
mkdir src
cat > Cargo.toml <<'T'
[package]
name = "frames"
version = "0.1.0"
edition = "2021"
[dependencies]
flate2 = "=1.1.5"
lz4_flex = { version = "=0.14.0", features = ["frame"] }
zstd = { version = "=0.14.0", default-features = false }
[workspace]
T
cat > src/main.rs <<'R'
use std::io::{Read, Write};
fn length(mut reader: impl Read) -> usize {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap()
}
fn main() {
    let twice = |frame: Vec<u8>| [frame.clone(), frame].concat();
    let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
    lz4.write_all(b"hello").unwrap();
    let lz4 = twice(lz4.finish().unwrap());
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"hello").unwrap();
    let gz = twice(gz.finish().unwrap());
    let zstd = twice(zstd::bulk::compress(b"hello", 1).unwrap());
    println!("lz4_flex: {} bytes", length(lz4_flex::frame::FrameDecoder::new(&lz4[..])));
    println!("flate2 GzDecoder: {} bytes", length(flate2::read::GzDecoder::new(&gz[..])));
    println!("flate2 MultiGzDecoder: {} bytes", length(flate2::read::MultiGzDecoder::new(&gz[..])));
    println!("zstd: {} bytes", length(zstd::Decoder::new(&zstd[..]).unwrap()));
}
R
cargo run --quiet > seen
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
lz4_flex: 5 bytes
flate2 GzDecoder: 5 bytes
flate2 MultiGzDecoder: 10 bytes
zstd: 10 bytes
T
