#!/usr/bin/env bash
# sled 0.34.7 (crates.io), strace 6.1, Linux 6.18, ext4.
#
# One would expect: after `Db::flush()` has returned Ok, a power failure cannot take the value.
# What happens: flush calls sync_file_range(2) on the log file `db`, and neither fsync nor fdatasync on any file.
# sync_file_range writes out pages that are there; it does not make the file's new length or a new file's name durable,
# and it does not flush the cache of the disk. A value of 1,000,000 bytes goes to a file of its own under `blobs/`,
# which no call syncs at all: flush answers Ok(16), the length of the pointer to it.
# (The manual page of sync_file_range says of itself that it is no means of data integrity.)
#
# Output seen:
#     100 bytes: sync_file_range 1, fsync or fdatasync 0, syncs of blobs 0
#     1000000 bytes: sync_file_range 1, fsync or fdatasync 0, syncs of blobs 0, files in blobs 1
# For a store: call fsync on files of your own before you acknowledge anything.
set -euo pipefail
for tool in cargo strace; do command -v $tool >/dev/null || { echo "needs $tool"; exit 2; }; done
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
mkdir src
cat > Cargo.toml <<'T'
[package]
name = "flush"
version = "0.1.0"
edition = "2021"
[dependencies]
sled = "=0.34.7"
[workspace]
T
cat > src/main.rs <<'R'
fn main() {
    let bytes: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let db = sled::Config::new().path("db-dir").flush_every_ms(None).open().unwrap();
    db.flush().unwrap();
    eprintln!("BEGIN");
    db.insert(b"key", vec![7u8; bytes]).unwrap();
    db.flush().unwrap();
    eprintln!("END");
    std::process::exit(0); // no Drop: only what flush did
}
R
cargo build --quiet
calls() { sed -n '/BEGIN/,/END/p' trace | grep -E "$1" | grep -vc unfinished || true; }
seen=
for bytes in 100 1000000; do
    rm -rf db-dir
    strace -f -y -o trace -e trace=write,sync_file_range,fsync,fdatasync target/debug/flush $bytes 2>/dev/null
    line="$bytes bytes: sync_file_range $(calls ' sync_file_range\('), fsync or fdatasync $(calls ' (fsync|fdatasync)\('), syncs of blobs $(calls ' (sync_file_range|fsync|fdatasync)\([0-9]+<[^>]*/blobs/')"
    [ ! -d db-dir/blobs ] || [ -z "$(ls db-dir/blobs)" ] || line+=", files in blobs $(ls db-dir/blobs | wc -l)"
    echo "$line"; seen+="$line"$'\n'
done
[ "$seen" = "100 bytes: sync_file_range 1, fsync or fdatasync 0, syncs of blobs 0
1000000 bytes: sync_file_range 1, fsync or fdatasync 0, syncs of blobs 0, files in blobs 1
" ] || { echo "changed"; exit 1; }
