//! The cost of a further snapshot: how long the memory is paused, how long it takes until the
//! snapshot is durable, and the CPU time; compared with an algorithm that scans the whole memory in
//! cells of 512 bytes.
//!
//! `cargo bench --bench tracking [GIBIBYTES]`, 4 by default. The memory is private and anonymous,
//! once in pages of 4 KiB and once in huge pages. Between snapshots, 1 % of its pages, scattered,
//! are written. The store is in `STILLFRAME_BENCH_DIR`, or in the build directory.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut};
use stillframe::{CaptureOptions, CaptureStats, LiveMemory, RegionSize, Store};

#[path = "common/journal.rs"]
mod journal;

const PAGE_BYTES: usize = 4096;
const ROUNDS: usize = 5;

fn main() {
    let gibibytes: usize = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(4);
    let length = gibibytes << 30;
    let mut random = 7;
    for huge in [false, true] {
        let mut memory = MmapMut::map_anon(length).unwrap();
        memory.advise(if huge { Advice::HugePage } else { Advice::NoHugePage }).unwrap();
        fill(&mut memory);
        println!("\n{gibibytes} GiB in {} pages", if huge { "huge" } else { "4 KiB" });
        faults(&mut memory, huge);
        for region_bytes in [4096, 16 * 1024] {
            snapshots(&mut memory, &mut random, region_bytes);
        }
        if huge {
            scan_by_cells(&memory);
        }
    }
}

/// Pages that LZ4 compresses to a quarter, all different.
fn fill(memory: &mut [u8]) {
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for page in memory.chunks_mut(PAGE_BYTES) {
        let (first, rest) = page.split_at_mut(1024);
        first.chunks_mut(8).for_each(|word| word.copy_from_slice(&next(&mut random).to_le_bytes()));
        rest.chunks_mut(1024).for_each(|part| part.copy_from_slice(first));
    }
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}

/// Writes 64 bytes into 1 % of the pages.
fn scatter(memory: &mut [u8], random: &mut u64) {
    let pages = memory.len() / PAGE_BYTES;
    for _ in 0..pages / 100 {
        let page = usize::try_from(next(random)).unwrap() % pages;
        for word in memory[page * PAGE_BYTES + 512..][..64].chunks_mut(8) {
            word.copy_from_slice(&next(random).to_le_bytes());
        }
    }
}

/// The cost of protection to the writer: the first write to each page, with and without protection.
fn faults(memory: &mut MmapMut, huge: bool) {
    let (_dir, store) = new_store(65_536);
    let part_bytes = memory.len() / 4;
    let live = LiveMemory::new(memory.as_ptr(), part_bytes).track_writes().unwrap();
    let capture = || store.process("p").capture(&live, &CaptureOptions::default()).unwrap();
    capture();
    let mut write_all = || {
        let started = Instant::now();
        memory[..part_bytes].iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte ^= 1);
        started.elapsed().as_nanos() as f64 / (part_bytes / PAGE_BYTES) as f64
    };
    let split = write_all();
    let plain = write_all();
    capture();
    let again = write_all();
    let first = if huge { "the first ever, which splits huge pages" } else { "the first ever" };
    println!(
        "  a write to a page: {plain:.0} ns; to a protected one: {again:.0} ns ({first}: {split:.0} ns)"
    );
}

fn snapshots(memory: &mut MmapMut, random: &mut u64, region_bytes: u32) {
    let (_dir, store) = new_store(region_bytes);
    let live = LiveMemory::new(memory.as_ptr(), memory.len()).track_writes().unwrap();
    println!("  regions of {} KiB", region_bytes / 1024);
    let process = store.process("tracked");
    let capture = || process.start_capture(&live, &CaptureOptions::default()).unwrap().wait().unwrap();
    report("first", 1, || {}, capture);
    report("nothing written", ROUNDS, || {}, capture);
    report("1 % of pages written", ROUNDS, || scatter(memory, random), capture);
    let untracked = LiveMemory::new(memory.as_ptr(), memory.len());
    let rescan = || store.process("tracked").capture(&untracked, &CaptureOptions::default()).unwrap();
    report("1 % written, rescan", 2, || scatter(memory, random), rescan);
}

/// Prints the medians of some captures, each after `before`, and the best: other programs can only
/// add time.
fn report(what: &str, rounds: usize, mut before: impl FnMut(), capture: impl Fn() -> CaptureStats) {
    let mut found: Vec<(Duration, Duration, Duration, CaptureStats)> = (0..rounds)
        .map(|_| {
            before();
            let (started, cpu) = (Instant::now(), cpu_time());
            let taken = capture();
            (taken.paused, started.elapsed(), cpu_time() - cpu, taken)
        })
        .collect();
    let mut median = |key: fn(&(Duration, Duration, Duration, CaptureStats)) -> Duration| {
        found.sort_by_key(key);
        let milliseconds = |it| key(it).as_secs_f64() * 1e3;
        format!("{:7.1} (best {:.1})", milliseconds(&found[found.len() / 2]), milliseconds(&found[0]))
    };
    let (paused, total, cpu) = (median(|it| it.0), median(|it| it.1), median(|it| it.2));
    let taken = &found[0].3;
    println!(
        "    {what:22} still {paused} ms, durable {total} ms, CPU {cpu} ms, {:6} regions, {:5.1} MB, {}",
        taken.changed_regions,
        taken.added_bytes as f64 / 1e6,
        taken.tracking
    );
}

/// The scan of the journal's algorithm, on one core as in the original, without writing anything.
fn scan_by_cells(memory: &[u8]) {
    let mut scan = journal::Scan::new(journal::CELL_BYTES);
    for what in ["first", "full scan"] {
        let (started, cpu) = (Instant::now(), cpu_time());
        let changed = scan.dirty(0, memory).len();
        let (total, cpu) = (started.elapsed().as_secs_f64(), (cpu_time() - cpu).as_secs_f64());
        println!(
            "  journal, cells of {} B, {what}: {:.0} ms, CPU {:.0} ms, {:.2} GB/s, {changed} extents",
            journal::CELL_BYTES,
            total * 1e3,
            cpu * 1e3,
            memory.len() as f64 / total / 1e9
        );
    }
}

fn cpu_time() -> Duration {
    rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).try_into().unwrap()
}

fn new_store(region_bytes: u32) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir_in(
        std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
    );
    let dir = dir.expect("the bench directory can be written");
    let size = RegionSize::new(region_bytes).unwrap();
    let store = Store::options().region_size(size).create(dir.path().join("store")).unwrap();
    (dir, store)
}
