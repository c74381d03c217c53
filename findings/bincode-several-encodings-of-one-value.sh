#!/usr/bin/env bash
# bincode 2.0.1 (crates.io), `config::standard()`.
#
# One would expect: a value has one encoding, so the hash of a value's bytes names the value, and re-encoding what was
# decoded gives the bytes back.
# What happens: the decoder takes integers that are written longer than they need be. Four byte strings decode to the
# same u64 without an error, and each re-encodes to the shortest one. The standard configuration has no strict mode.
#
# Output seen:
#     [5] -> 5, encoded again [5]
#     [251, 5, 0] -> 5, encoded again [5]
#     [252, 5, 0, 0, 0] -> 5, encoded again [5]
#     [253, 5, 0, 0, 0, 0, 0, 0, 0] -> 5, encoded again [5]
# For a content-addressed store: the id is the hash of the stored bytes and never of a re-encoded value; two ids may
# decode to one record.
set -euo pipefail
command -v cargo >/dev/null || { echo "needs cargo"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
mkdir src
cat > Cargo.toml <<'T'
[package]
name = "encodings"
version = "0.1.0"
edition = "2021"
[dependencies]
bincode = "=2.0.1"
[workspace]
T
cat > src/main.rs <<'R'
fn main() {
    let config = bincode::config::standard();
    for bytes in [&[5u8][..], &[251, 5, 0], &[252, 5, 0, 0, 0], &[253, 5, 0, 0, 0, 0, 0, 0, 0]] {
        let (value, used): (u64, usize) = bincode::decode_from_slice(bytes, config).unwrap();
        assert_eq!(used, bytes.len());
        println!("{bytes:?} -> {value}, encoded again {:?}", bincode::encode_to_vec(value, config).unwrap());
    }
}
R
cargo run --quiet | tee seen
diff - seen <<'T' || { echo "changed"; exit 1; }
[5] -> 5, encoded again [5]
[251, 5, 0] -> 5, encoded again [5]
[252, 5, 0, 0, 0] -> 5, encoded again [5]
[253, 5, 0, 0, 0, 0, 0, 0, 0] -> 5, encoded again [5]
T
