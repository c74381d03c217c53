#!/usr/bin/env bash
# zstd 0.14.0 (crates.io, with the libzstd that it builds).
#
# One would expect: `stream::encode_all(&bytes[..])`, which is handed all the bytes at once, writes their length into the
# frame as `bulk::compress` and the command `zstd FILE` do.
# What happens: it never does, not even for 1 KiB. The frame then does not say how much memory decoding it takes, and
# `zstd_safe::get_frame_content_size` answers Ok(None).
#
# Output seen:
#     1024 bytes: encode_all None, bulk Some(1024)
#     131072 bytes: encode_all None, bulk Some(131072)
#     1048576 bytes: encode_all None, bulk Some(1048576)
# For a store: keep the plain length beside the frame and bound the decoder by it.
set -euo pipefail
for tool in cargo cc; do command -v $tool >/dev/null || { echo "needs $tool"; exit 2; }; done
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
mkdir src
cat > Cargo.toml <<'T'
[package]
name = "length"
version = "0.1.0"
edition = "2021"
[dependencies]
zstd = { version = "=0.14.0", default-features = false }
[workspace]
T
cat > src/main.rs <<'R'
use zstd::zstd_safe::get_frame_content_size as told;
fn main() {
    for length in [1usize << 10, 128 << 10, 1 << 20] {
        let bytes = vec![7u8; length];
        let stream = zstd::stream::encode_all(&bytes[..], 1).unwrap();
        let bulk = zstd::bulk::compress(&bytes, 1).unwrap();
        println!("{length} bytes: encode_all {:?}, bulk {:?}", told(&stream).unwrap(), told(&bulk).unwrap());
    }
}
R
cargo run --quiet | tee seen
diff - seen <<'T' || { echo "changed"; exit 1; }
1024 bytes: encode_all None, bulk Some(1024)
131072 bytes: encode_all None, bulk Some(131072)
1048576 bytes: encode_all None, bulk Some(1048576)
T
