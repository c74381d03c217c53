//! The cost of a rollback in place: of memory of this process with and without tracking, compared
//! with a full restore into the same memory; and of a live process.
//!
//! `cargo bench --bench rollback [GIBIBYTES]`, 1 by default. Before each rollback, 1 % of the
//! memory is written: once as pages of 4 KiB scattered over the whole memory, each in another
//! region, and once as whole regions. The store is in `STILLFRAME_BENCH_DIR`, or in the build
//! directory.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use stillframe::rollback::RollbackStats;
use stillframe::source::{LiveProcessSource, SourceExt};
use stillframe::store::Check;
use stillframe::track::DirtyRanges;
use stillframe::{AddressRange, CaptureOptions, LiveMemory, Store};

const PAGE_BYTES: usize = 4096;
const REGION_BYTES: usize = 16 * 1024;
const ROUNDS: usize = 7;
const TARGET_MS: f64 = 20.0;

fn main() {
    let number = |argument: String| argument.parse().ok();
    let gibibytes: usize = std::env::args().filter_map(number).next().unwrap_or(1);
    if std::env::var_os("STILLFRAME_BENCH_CHILD").is_some() {
        return child(gibibytes << 30);
    }
    println!("{gibibytes} GiB, of which 1 % differs; target for 1 GiB with tracking: {TARGET_MS} ms");
    for scattered in [true, false] {
        println!("  {}", if scattered { "scattered pages of 4 KiB" } else { "scattered regions of 16 KiB" });
        memory(gibibytes << 30, scattered);
    }
    println!("  a live process, scattered pages of 4 KiB");
    process(gibibytes);
}

fn memory(length: usize, scattered: bool) {
    let (_dir, store) = new_store();
    let mut memory = MmapMut::map_anon(length).unwrap();
    fill(&mut memory);
    let options = CaptureOptions::default();
    let host = DirtyRanges::new(length as u64);
    let id = store.process("host").capture(&memory[..].tracked_by(&host), &options).unwrap().id;

    let mut state = (&mut memory, 7u64);
    for check in [Check::Full, Check::Checksum] {
        let marked = |(memory, random): &mut (&mut MmapMut, u64)| {
            for (at, length) in scatter(memory, random, scattered) {
                host.mark(AddressRange::with_length(at as u64, length as u64).unwrap()).unwrap();
            }
        };
        let found = rounds(&mut state, marked, |(memory, _)| {
            store.rollback(id).unwrap().check(check).tracked_by(&host).slice(memory).unwrap()
        });
        report(&format!("host ranges, {check:?}"), found);
    }
    let unmarked = |(memory, random): &mut (&mut MmapMut, u64)| {
        scatter(memory, random, scattered);
    };
    let found =
        rounds(&mut state, unmarked, |(memory, _)| store.rollback(id).unwrap().slice(memory).unwrap());
    report("all compared, Full", found);
    let live = LiveMemory::new(state.0.as_ptr(), length).track_writes().unwrap();
    let id = store.process("live").capture(&live, &options).unwrap().id;
    for check in [Check::Full, Check::Checksum] {
        let found = rounds(&mut state, unmarked, |(memory, _)| {
            store.rollback(id).unwrap().check(check).live(&live, memory).unwrap()
        });
        report(&format!("write protection, {check:?}"), found);
    }
    let mut took: Vec<Duration> = (0..3)
        .map(|_| {
            let begun = Instant::now();
            store.restore(id).unwrap().into_slice(&mut memory).unwrap();
            begun.elapsed()
        })
        .collect();
    took.sort();
    println!("    {:28} {:7.1} ms", "a full restore into it", milliseconds(took[1]));
}

/// The results of the rollbacks of some rounds, and the CPU time of each. `before` is not counted.
fn rounds<S>(
    state: &mut S,
    before: impl Fn(&mut S),
    round: impl Fn(&mut S) -> RollbackStats,
) -> Vec<(RollbackStats, Duration)> {
    (0..ROUNDS)
        .map(|_| {
            before(state);
            let cpu = cpu_time();
            (round(state), cpu_time() - cpu)
        })
        .collect()
}

fn report(what: &str, mut found: Vec<(RollbackStats, Duration)>) {
    found.sort_by_key(|(_, cpu)| *cpu);
    let cpu = found[found.len() / 2].1;
    found.sort_by_key(|(stats, _)| stats.elapsed);
    let (best, median) = (&found[0].0, &found[found.len() / 2].0);
    println!(
        "    {what:28} {:7.1} ms (best {:.1}), CPU {:5.1} ms; of {} regions compared {} written, {:.1} MB{}",
        milliseconds(median.elapsed),
        milliseconds(best.elapsed),
        milliseconds(cpu),
        median.compared_regions,
        median.written_regions,
        median.written_bytes as f64 / 1e6,
        if median.paused.is_zero() {
            String::new()
        } else {
            format!(", still {:.1} ms", milliseconds(median.paused))
        },
    );
}

fn process(gibibytes: usize) {
    let (_dir, store) = new_store();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(gibibytes.to_string())
        .env("STILLFRAME_BENCH_CHILD", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    let source = LiveProcessSource::new(child.id());
    let id = store.process("child").capture(&source, &CaptureOptions::default()).unwrap().id;
    let mut ends = (child.stdin.take().unwrap(), lines);
    let scatter = |(input, lines): &mut (ChildStdin, Lines<BufReader<ChildStdout>>)| {
        writeln!(input, "scatter").unwrap();
        lines.next().unwrap().unwrap();
    };
    let found =
        rounds(&mut ends, scatter, |_| store.rollback(id).unwrap().live_process(source.pid()).unwrap());
    report("all compared, Full", found);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A process with this much memory. It writes 1 % of the memory for each line that it reads.
fn child(length: usize) {
    let mut memory = MmapMut::map_anon(length).unwrap();
    fill(&mut memory);
    let (mut random, mut line) = (7, String::with_capacity(100));
    let mut written = Vec::with_capacity(length / PAGE_BYTES);
    println!("ready");
    while std::io::stdin().read_line(&mut line).unwrap() > 0 {
        scatter_into(&mut memory, &mut random, true, &mut written);
        println!("done");
        line.clear();
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

/// Writes 1 % of the memory and returns where.
fn scatter(memory: &mut [u8], random: &mut u64, pages: bool) -> Vec<(usize, usize)> {
    let mut written = Vec::new();
    scatter_into(memory, random, pages, &mut written);
    written
}

fn scatter_into(memory: &mut [u8], random: &mut u64, pages: bool, written: &mut Vec<(usize, usize)>) {
    written.clear();
    let cell_bytes = if pages { PAGE_BYTES } else { REGION_BYTES };
    for _ in 0..memory.len() / cell_bytes / 100 {
        let cell = usize::try_from(next(random)).unwrap() % (memory.len() / cell_bytes);
        for page in memory[cell * cell_bytes..][..cell_bytes].chunks_mut(PAGE_BYTES) {
            for word in page[512..576].chunks_mut(8) {
                word.copy_from_slice(&next(random).to_le_bytes());
            }
        }
        written.push((cell * cell_bytes, cell_bytes));
    }
}

fn cpu_time() -> Duration {
    rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime).try_into().unwrap()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir_in(
        std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
    );
    let dir = dir.expect("the bench directory can be written");
    let store = Store::options().create(dir.path().join("store")).unwrap();
    (dir, store)
}
