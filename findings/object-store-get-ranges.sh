#!/usr/bin/env bash
# object_store 0.14.2 (crates.io), features `fs`.
#
# One would expect: `get_ranges` is several `get_range`, and the in-memory and the local store answer alike.
# What happens: a range that reaches past the end is cut to what is there by `get_range` on both and by `get_ranges` in
# memory, but `get_ranges` on local files fails: the trait's default merges and cuts, the local store has its own.
# An empty range at the beginning of an empty object is an error on both. Deleting a key that is not there is Ok in memory
# and NotFound on local files.
#
# Output seen:
#     memory: get_range 2 bytes; get_ranges 2 and 2 bytes; empty range of an empty object error; delete of nothing ok
#     local: get_range 2 bytes; get_ranges error; empty range of an empty object error; delete of nothing error
# For a store that merges neighbouring ranges: ask for no byte that is not there, and test on more than `InMemory`.
set -euo pipefail
command -v cargo >/dev/null || { echo "needs cargo"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
mkdir src objects
cat > Cargo.toml <<'T'
[package]
name = "ranges"
version = "0.1.0"
edition = "2021"
[dependencies]
object_store = { version = "=0.14.2", features = ["fs"] }
tokio = { version = "=1.48.0", features = ["rt", "macros"] }
[workspace]
T
cat > src/main.rs <<'R'
use object_store::{local::LocalFileSystem, memory::InMemory, path::Path, ObjectStore, ObjectStoreExt};
async fn ask(name: &str, store: &dyn ObjectStore) {
    let (five, empty, nothing) = (Path::from("five"), Path::from("empty"), Path::from("nothing"));
    store.put(&five, "01234".into()).await.unwrap();
    store.put(&empty, "".into()).await.unwrap();
    let one = store.get_range(&five, 3..10).await.map_or("error".into(), |b| format!("{} bytes", b.len()));
    let many = store.get_ranges(&five, &[0..2, 3..10]).await;
    let many = many.map_or("error".into(), |b| format!("{} and {} bytes", b[0].len(), b[1].len()));
    let none = store.get_range(&empty, 0..0).await.map_or("error", |_| "ok");
    let gone = store.delete(&nothing).await.map_or("error", |()| "ok");
    println!("{name}: get_range {one}; get_ranges {many}; empty range of an empty object {none}; delete of nothing {gone}");
}
#[tokio::main(flavor = "current_thread")]
async fn main() {
    ask("memory", &InMemory::new()).await;
    ask("local", &LocalFileSystem::new_with_prefix("objects").unwrap()).await;
}
R
cargo run --quiet | tee seen
diff - seen <<'T' || { echo "changed"; exit 1; }
memory: get_range 2 bytes; get_ranges 2 and 2 bytes; empty range of an empty object error; delete of nothing ok
local: get_range 2 bytes; get_ranges error; empty range of an empty object error; delete of nothing error
T
