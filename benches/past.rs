//! Reading the past: the time that `diff` and `history` take, compared with their targets.
//!
//! `cargo bench --bench past`. It compares two snapshots of 4 GiB that differ in one page. It reads
//! the history of a counter over 10,000 snapshots of 1 MiB, each of which changed it, and over
//! 1,000 snapshots of 1 GiB.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use stillframe::diff::DiffOptions;
use stillframe::source::SourceExt;
use stillframe::track::DirtyRanges;
use stillframe::{AddressRange, CaptureOptions, Store};

const PAGE_BYTES: usize = 4096;
const ROUNDS: usize = 11;

fn main() {
    diff();
    history(1 << 20, 10_000);
    history(1 << 30, 1_000);
}

fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir_in(
        std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
    );
    let dir = dir.expect("the bench directory can be written");
    let store = Store::options().create(dir.path().join("store")).unwrap();
    (dir, store)
}

/// Memory in which no two pages are equal and none is zeros.
fn memory(length: usize) -> Vec<u8> {
    let mut memory = vec![0u8; length];
    for (page, number) in memory.chunks_mut(PAGE_BYTES).zip(1u64..) {
        page[..8].copy_from_slice(&number.to_le_bytes());
    }
    memory
}

fn diff() {
    let (_dir, store) = new_store();
    let mut memory = memory(4 << 30);
    let process = store.process("p");
    let before = process.capture(&memory, &CaptureOptions::default()).unwrap().id;
    let at = memory.len() / 3 / PAGE_BYTES * PAGE_BYTES;
    memory[at..at + PAGE_BYTES].fill(7);
    let after = process.capture(&memory, &CaptureOptions::default()).unwrap().id;
    let took = median(|| {
        let diff = store.diff(before, after, &DiffOptions::default()).unwrap();
        assert!((1..=PAGE_BYTES as u64).contains(&diff.differing_bytes));
    });
    println!("diff of two snapshots of 4 GiB, one page differs: {took:?} (target 10 ms)");
}

fn history(length: usize, snapshots: usize) {
    let (_dir, store) = new_store();
    let mut memory = memory(length);
    let at = length / 3 / PAGE_BYTES * PAGE_BYTES + 128;
    let range = AddressRange::with_length(at as u64, 8).unwrap();
    let changes = DirtyRanges::new(length as u64);
    for count in 1..=snapshots as u64 {
        memory[at..at + 8].copy_from_slice(&count.to_le_bytes());
        changes.mark(range).unwrap();
        let source = memory.tracked_by(&changes);
        store.process("p").capture(&source, &CaptureOptions::default()).unwrap();
    }
    let took = median(|| assert_eq!(store.history("p", range).unwrap().count(), snapshots));
    println!(
        "history of 8 bytes over {snapshots} snapshots of {} MiB, all of which changed them: {took:?}, {:?} each",
        length >> 20,
        took / u32::try_from(snapshots).unwrap()
    );
    let elsewhere = AddressRange::with_length(0, 8).unwrap();
    let took = median(|| assert_eq!(store.history("p", elsewhere).unwrap().count(), 1));
    println!(
        "    of 8 bytes that none changed: {took:?}, {:?} each",
        took / u32::try_from(snapshots).unwrap()
    );
}

fn median(mut work: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let started = Instant::now();
            work();
            started.elapsed()
        })
        .collect();
    times.sort();
    times[ROUNDS / 2]
}
