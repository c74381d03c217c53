//! How close a restore comes to the machine's limit, and how much faster it is than replaying a
//! journal.
//!
//! `cargo bench --bench restore`. The memory is that of `throughput`. The limit is decoding the
//! same blocks from memory into populated pages, on all cores. The methods alternate within a
//! round, so that other load on the machine affects all of them; the ratios are medians over the
//! rounds.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss)]

use std::time::Instant;

use rayon::prelude::*;
use stillframe::store::Check;
use stillframe::{CaptureOptions, SnapshotId, Store};

#[path = "common/image.rs"]
mod image;
#[path = "common/journal.rs"]
mod journal;

const REGION_BYTES: usize = 16 * 1024;
const PAGE_BYTES: usize = 4096;
const ROUNDS: usize = 15;
const SNAPSHOTS: usize = 100;

fn main() {
    let memory = image::image();
    println!("memory image: {} MiB, medians of {ROUNDS} rounds", memory.len() >> 20);
    beside_the_limit(memory);
    println!("\nthe last of {SNAPSHOTS} snapshots, a replay of the journal beside a restore");
    for (percent, written_bytes) in [(1, 64), (1, PAGE_BYTES), (5, PAGE_BYTES)] {
        beside_a_journal(memory, percent, written_bytes);
    }
}

fn beside_the_limit(memory: &[u8]) {
    let (_dir, store) = image::new_store();
    let id = store.process("p").capture(memory, &CaptureOptions::default()).unwrap().id;
    let blocks: Vec<Vec<u8>> = memory
        .par_chunks(REGION_BYTES)
        .map(|region| match region.iter().all(|byte| *byte == 0) {
            true => Vec::new(),
            false => lz4_flex::block::compress(region),
        })
        .collect();
    let mut target = vec![1u8; memory.len()];
    let mut seconds: [Vec<f64>; 6] = Default::default();
    for _ in 0..ROUNDS {
        for (at, hashes) in [(0, false), (5, true)] {
            seconds[at].push(timed(|| {
                target.par_chunks_mut(REGION_BYTES).zip(&blocks).for_each(|(region, block)| {
                    if !block.is_empty() {
                        lz4_flex::block::decompress_into(block, region).unwrap();
                        if hashes {
                            std::hint::black_box(blake3::hash(region));
                        }
                    }
                });
            }));
        }
        for (at, check) in [(1, Check::Full), (2, Check::Checksum)] {
            seconds[at].push(timed(|| restore(&store, id, check).into_slice(&mut target).unwrap()));
            let mapped = || restore(&store, id, check).into_mapping().unwrap();
            let started = Instant::now();
            // Without unmapping it.
            let mapping = mapped();
            seconds[at + 2].push(started.elapsed().as_secs_f64());
            drop(mapping);
        }
    }
    assert!(target == memory);
    let limit = &seconds[0];
    println!(
        "\nrestore                                        GB/s   of the limit   (best of each)   target"
    );
    for (what, at, bound) in [
        ("the limit: blocks in memory, pages populated", 0, ""),
        ("the same, and blake3::hash of each region", 5, ""),
        ("into populated memory", 1, "70 %"),
        ("into populated memory, checksums only", 2, ""),
        ("into a fresh mapping", 3, ""),
        ("into a fresh mapping, checksums only", 4, ""),
    ] {
        let share = median(limit.iter().zip(&seconds[at]).map(|(limit, it)| 100.0 * limit / it));
        let speed = memory.len() as f64 / median(seconds[at].iter().copied()) / 1e9;
        // Other programs can only add time: the best time of each approximates an idle machine.
        let best = 100.0 * least(limit) / least(&seconds[at]);
        println!("{what:<46} {speed:>5.2} {share:>12.0} % {best:>14.0} % {bound:>8}");
    }
    let cost = median(seconds[1].iter().zip(&seconds[2]).map(|(full, sums)| 100.0 * (full - sums) / full));
    println!("BLAKE3 takes {cost:.0} % of a restore (under 33 %, it stays on by default)");
}

/// The last of a hundred snapshots. Between two snapshots, `written_bytes` bytes are written in
/// `percent` % of the pages.
fn beside_a_journal(memory: &[u8], percent: usize, written_bytes: usize) {
    let (dir, store) = image::new_store();
    let path = dir.path().join("journal");
    let mut memory = memory.to_vec();
    let mut log = journal::Journal::create(&path, journal::CELL_BYTES).unwrap();
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    let mut next = move |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random >> 1).unwrap() % below
    };
    let mut last = None;
    for _ in 0..SNAPSHOTS {
        let pages = memory.len() / PAGE_BYTES;
        for _ in 0..pages * percent / 100 {
            // The new bytes are copied from elsewhere in the memory, so that they are equally
            // compressible.
            let (from, to) = (next(pages) * PAGE_BYTES, next(pages) * PAGE_BYTES);
            memory.copy_within(from..from + written_bytes, to);
        }
        log.snapshot([(0, &memory[..])]).unwrap();
        last = Some(store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id);
    }
    let mut target = vec![1u8; memory.len()];
    let mut seconds: [Vec<f64>; 2] = Default::default();
    for _ in 0..5 {
        seconds[0].push(timed(|| {
            journal::replay(&path, SNAPSHOTS, |address, bytes| {
                let start = usize::try_from(address).unwrap();
                target[start..start + bytes.len()].copy_from_slice(bytes);
            })
            .unwrap();
        }));
        assert!(target == memory);
        seconds[1]
            .push(timed(|| restore(&store, last.unwrap(), Check::Full).into_slice(&mut target).unwrap()));
        assert!(target == memory);
    }
    let [replay, restored] = &seconds;
    let times = median(replay.iter().zip(restored).map(|(replay, restore)| replay / restore));
    println!(
        "{written_bytes:>4} bytes in {percent} % of the pages: replay {:.0} ms, restore {:.0} ms: {times:.1} times (target 5)",
        1e3 * median(replay.iter().copied()),
        1e3 * median(restored.iter().copied()),
    );
}

fn restore(store: &Store, id: SnapshotId, check: Check) -> stillframe::Restore<'_> {
    store.restore(id).unwrap().check(check)
}

fn timed(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
