//! Stores and memory that several modules of these tests use.

use std::path::Path;

use stillframe::{RegionSize, Store};

use crate::noise::noise;

/// A store in a temporary directory.
pub(crate) fn new_store(region_bytes: u32) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let size = RegionSize::new(region_bytes).unwrap();
    let store = Store::options().region_size(size).create(dir.path().join("store")).unwrap();
    (dir, store)
}

/// Noise, zeros, and some repeated noise.
pub(crate) fn mixed_memory(length: usize) -> Vec<u8> {
    let mut memory = noise(length, 3);
    memory[length / 4..length / 3].fill(0);
    memory.copy_within(..length / 8, length / 2);
    memory
}

/// Flips a bit of noise that is stored in a pack.
pub(crate) fn damage(store: &Path, stored: &[u8]) {
    for pack in std::fs::read_dir(store.join("packs")).unwrap() {
        let path = pack.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(64).position(|window| window == &stored[..64]) {
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
            return;
        }
    }
    panic!("the bytes are in no pack");
}

/// Writes a line to standard output, past the test harness.
pub(crate) fn say(what: &str) {
    use std::io::Write;
    std::io::stdout().write_all(format!("{what}\n").as_bytes()).unwrap();
}
