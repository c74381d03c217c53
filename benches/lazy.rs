//! The cost of a lazy restore and of an instance of a template, each compared with its target.
//!
//! `cargo bench --bench lazy [GIBIBYTES]`, 4 by default. The results are medians of several rounds;
//! the packs are in the page cache. The store is in `STILLFRAME_BENCH_DIR`, or in the build
//! directory.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use stillframe::lazy::{Fill, WorkingSet};
use stillframe::template::Instance;
use stillframe::{CaptureOptions, RegionSize, SnapshotId, Store};

const PAGE_BYTES: usize = 4096;
const ROUNDS: usize = 7;
const TOUCHES: usize = 20_000;
const INSTANCES: usize = 1000;

fn main() {
    let gibibytes: usize = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(4);
    for region_bytes in [16 * 1024, 4096] {
        let (_dir, store) = new_store(region_bytes);
        let id = {
            let mut memory = memmap2::MmapMut::map_anon(gibibytes << 30).unwrap();
            fill(&mut memory);
            store.process("p").capture(&memory[..], &CaptureOptions::default()).unwrap().id
        };
        println!("\n{gibibytes} GiB, regions of {} KiB", region_bytes / 1024);
        whole(&store, id);
        first_byte(&store, id);
        touches(&store, id);
        working_set(&store, id);
        if region_bytes == 16 * 1024 {
            templates(&store, id);
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

/// Restores everything, at once and lazily, and checks that both results are equal.
fn whole(store: &Store, id: SnapshotId) {
    let started = Instant::now();
    let full = store.restore(id).unwrap().into_mapping().unwrap();
    let at_once = started.elapsed();
    let started = Instant::now();
    let lazy = store.restore(id).unwrap().into_lazy(Fill::ByAddress).unwrap();
    lazy.wait_until_filled().unwrap();
    let filled = started.elapsed();
    let same = if lazy[..] == full[..] { "the same bytes" } else { "OTHER BYTES" };
    println!(
        "  all of it: {:.2} s at once; {:.2} s filled in the background by one thread, {same} (target: the same)",
        at_once.as_secs_f64(),
        filled.as_secs_f64()
    );
}

fn first_byte(store: &Store, id: SnapshotId) {
    let round = |fill| {
        let started = Instant::now();
        let lazy = store.restore(id).unwrap().into_lazy(fill).unwrap();
        let returned = started.elapsed();
        black_box(lazy[lazy.len() / 2]);
        (returned, started.elapsed())
    };
    for fill in [Fill::OnFault, Fill::ByAddress] {
        let rounds: Vec<_> = (0..ROUNDS).map(|_| round(fill)).collect();
        println!(
            "  first byte, {fill:?}: {:.0} us after the call, which returned after {:.0} us (target: 1000 us)",
            microseconds(median(rounds.iter().map(|it| it.1))),
            microseconds(median(rounds.iter().map(|it| it.0))),
        );
    }
}

/// First accesses, one after another, each to another region.
fn touches(store: &Store, id: SnapshotId) {
    for (what, is_random) in [("scattered", true), ("upwards, a page each", false)] {
        let lazy = store.restore(id).unwrap().into_lazy(Fill::OnFault).unwrap();
        let mut random = 99;
        let mut times: Vec<Duration> = (0..TOUCHES)
            .map(|number| {
                let page = match is_random {
                    true => usize::try_from(next(&mut random)).unwrap() % (lazy.len() / PAGE_BYTES),
                    false => number,
                };
                let started = Instant::now();
                black_box(lazy[page * PAGE_BYTES + 7]);
                started.elapsed()
            })
            .collect();
        let all: Duration = times.iter().sum();
        // Only the accesses that had to wait: other pages were filled together with their
        // neighbours.
        times.retain(|time| *time > Duration::from_micros(2));
        times.sort_unstable();
        let at = |percent: usize| microseconds(times[(times.len() - 1) * percent / 100]);
        println!(
            "  touches {what}: {:.1} us each; {} of {TOUCHES} waited, the median {:.1} us (target: 50 us), 9 of \
             10 {:.1} us, 99 of 100 {:.1} us",
            microseconds(all) / TOUCHES as f64,
            times.len(),
            at(50),
            at(90),
            at(99),
        );
    }
}

/// A run that accesses the same pages again, after its recorded working set was filled first.
fn working_set(store: &Store, id: SnapshotId) {
    let run = |fill: Fill| {
        let started = Instant::now();
        let lazy = store.restore(id).unwrap().into_lazy(fill).unwrap();
        let mut random = 5;
        for _ in 0..TOUCHES / 4 {
            let page = usize::try_from(next(&mut random)).unwrap() % (lazy.len() / PAGE_BYTES);
            black_box(lazy[page * PAGE_BYTES]);
            // Simulates work on the page.
            let touched = Instant::now();
            while touched.elapsed() < Duration::from_micros(20) {}
        }
        (started.elapsed(), lazy.touched())
    };
    let (by_address, _) = run(Fill::ByAddress);
    let (on_touch, touched) = run(Fill::OnFault);
    let attachments = vec![touched.to_attachment().unwrap()];
    let bytes = attachments[0].bytes.len();
    let options = CaptureOptions::new().attachments(attachments);
    store.process("p").capture(&[1u8; PAGE_BYTES], &options).unwrap();
    let (hot_first, _) = run(Fill::WorkingSetFirst);
    println!(
        "  {} touches with 20 us of work each: {:.0} ms OnFault, {:.0} ms ByAddress, {:.0} ms WorkingSetFirst (a {} of \
         {bytes} bytes)",
        TOUCHES / 4,
        on_touch.as_secs_f64() * 1e3,
        by_address.as_secs_f64() * 1e3,
        hot_first.as_secs_f64() * 1e3,
        WorkingSet::ATTACHMENT,
    );
}

fn templates(store: &Store, id: SnapshotId) {
    let started = Instant::now();
    let template = store.template(id).unwrap();
    println!("  template: {:.2} s", started.elapsed().as_secs_f64());
    let before = memory_bytes("RssAnon:");
    let mut times = Vec::new();
    let mut instances: Vec<Instance> = (0..INSTANCES)
        .map(|_| {
            let started = Instant::now();
            let instance = template.instance().unwrap();
            times.push(started.elapsed());
            instance
        })
        .collect();
    let all: Duration = times.iter().sum();
    println!(
        "  {INSTANCES} instances: {:.1} us each, the median {:.1} us, {:.0} a second (target: microseconds each)",
        microseconds(all) / INSTANCES as f64,
        microseconds(median(times.into_iter())),
        INSTANCES as f64 / all.as_secs_f64(),
    );
    let mut random = 3;
    let mut writes = Vec::new();
    for instance in &mut instances {
        let pages = instance.len() / PAGE_BYTES;
        for _ in 0..10 {
            let page = usize::try_from(next(&mut random)).unwrap() % pages;
            let started = Instant::now();
            instance[page * PAGE_BYTES] ^= 1;
            writes.push(started.elapsed());
        }
    }
    println!(
        "  10 pages written in each: {:.1} us for each page; of their own they have {:.1} MB together (the pages \
         are {:.1} MB)",
        microseconds(median(writes.into_iter())),
        (memory_bytes("RssAnon:") - before) as f64 / 1e6,
        (10 * INSTANCES * PAGE_BYTES) as f64 / 1e6,
    );
    let captures: Vec<_> = (0..ROUNDS)
        .map(|number| {
            let instance = &instances[number];
            let options = CaptureOptions::new().parent(instance.parent());
            let process = store.process(format!("instance-{number}"));
            process.capture(instance, &options).unwrap()
        })
        .collect();
    println!(
        "  capture of an instance with 10 pages written: {:.1} ms, {} regions, {} bytes, by {}",
        microseconds(median(captures.iter().map(|taken| taken.elapsed))) / 1e3,
        captures[0].changed_regions,
        captures[0].added_bytes,
        captures[0].tracking,
    );
}

fn memory_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
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
