//! A large store is opened quickly and needs little memory: prints a table of docs/benchmarks.md,
//! with the limits.
//!
//! `cargo bench --bench scale`. One store has a million regions and ten thousand snapshots. Each
//! measurement runs in a separate process. The column *memory* is the anonymous and shared memory
//! that the process needs beyond what it had before the measurement (`RssAnon` and `RssShmem`,
//! sampled every millisecond), without a restore's target. Mapped packs are page cache, which the
//! kernel can reclaim at any time; the last column includes them: it is the kernel's own peak of
//! the whole process (`VmHWM`).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillframe::repair::RepairOptions;
use stillframe::source::FileSource;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, GcOptions, RegionSize, Snapshot, SnapshotId, Store};

const MIB: u64 = 1 << 20;
/// A million regions of 512 bytes.
const REGIONS: u64 = 1 << 20;
const SNAPSHOTS: usize = 10_000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, verb, path] = &arguments[..]
        && verb != "--bench"
    {
        return child(verb, Path::new(path));
    }
    let dir = tempfile::tempdir_in(
        std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
    );
    let dir = dir.expect("the bench directory can be written");
    let path = |name: &str| dir.path().join(name);

    println!("{:<52} {:>20} {:>20} {:>12}", "", "time (bound)", "memory (bound)", "with packs");
    let image = image(&path("image"), 1024 * MIB, 1);
    measure("a capture of 1 GiB, 16 KiB regions", "capture-file", &image, None, None);
    std::fs::remove_file(image).unwrap();
    std::fs::remove_dir_all(path("image.store")).unwrap();
    let store = path("store");
    let started = Instant::now();
    fill(&store);
    many_snapshots(&store);
    let (built, regions) = (started.elapsed(), regions(&store));
    println!(
        "a store of {regions} regions and {SNAPSHOTS} snapshots, {} MiB of packs, built in {:.0} s",
        disk_bytes(&store.join("packs")) / MIB,
        built.as_secs_f64()
    );
    let marks = Some(8 * regions + 128 * MIB);
    measure("opening it", "open", &store, Some(1000), None);
    measure("opening it and listing all", "list", &store, Some(500), None);
    measure("capture of a small unchanged process", "small", &store, None, None);
    measure("verify", "verify", &store, None, marks);
    measure("gc --dry-run", "gc-dry", &store, None, marks);
    measure("a restore, beside the target of 256 MiB", "restore", &store, None, Some(256 * MIB));
    std::fs::remove_dir_all(store.join("index")).unwrap();
    measure("repair, the index lost", "repair", &store, None, marks);
    let damaged = path("damaged");
    copy_and_damage(&store, &damaged);
    measure("repair, a pack damaged", "repair-pack", &damaged, None, marks);
    std::fs::remove_dir_all(damaged).unwrap();
    measure("gc, half of it forgotten", "gc-half", &store, None, marks);
    measure("verify after that", "verify", &store, None, marks);
    measure("gc, nothing to do", "gc", &store, None, marks);
    churn(&path("churn"));
}

/// Runs one measurement in a separate process, and prints the result with its limits.
fn measure(what: &str, verb: &str, path: &Path, bound_milliseconds: Option<u64>, bound_bytes: Option<u64>) {
    let output = Command::new(std::env::current_exe().unwrap()).arg(verb).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers: Vec<u64> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let [microseconds, bytes, peak_bytes] = numbers[..] else { panic!("{text}") };
    let milliseconds = microseconds as f64 / 1000.0;
    let bound = |bound: Option<u64>, unit| bound.map_or(String::new(), |bound| format!(" ({bound} {unit})"));
    let is_over = bound_milliseconds.is_some_and(|bound| microseconds > bound * 1000)
        || bound_bytes.is_some_and(|bound| bytes > bound);
    println!(
        "{what:<52} {:>20} {:>20} {:>8} MiB{}",
        format!("{milliseconds:.1} ms{}", bound(bound_milliseconds, "ms")),
        format!("{} MiB{}", bytes / MIB, bound(bound_bytes.map(|bytes| bytes / MIB), "MiB")),
        peak_bytes / MIB,
        if is_over { "  OVER THE BOUND" } else { "" }
    );
}

fn child(verb: &str, path: &Path) {
    let image = (verb == "capture-file").then(|| FileSource::new(path));
    let peak = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let before_bytes = own_bytes();
    let sampler = std::thread::spawn({
        let (peak, stop) = (peak.clone(), stop.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                peak.fetch_max(own_bytes(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let mut target_bytes = 0;
    let started;
    match verb {
        "capture-file" => {
            let store_path = path.with_extension("store");
            started = Instant::now();
            let store = Store::options().create(store_path).unwrap();
            store.process("p").capture(&image.unwrap(), &CaptureOptions::default()).unwrap();
        }
        "open" => {
            started = Instant::now();
            std::hint::black_box(Store::open(path).unwrap());
        }
        "verify" => {
            let store = Store::open(path).unwrap();
            started = Instant::now();
            assert!(store.verify(&VerifyOptions::default()).unwrap().problems.is_empty());
        }
        "gc-dry" => {
            let store = Store::open(path).unwrap();
            started = Instant::now();
            store.gc(&GcOptions::new().dry_run(true)).unwrap();
        }
        "gc" => {
            let store = Store::open(path).unwrap();
            started = Instant::now();
            store.gc(&GcOptions::default()).unwrap();
        }
        "gc-half" => {
            let store = Store::open(path).unwrap();
            let mut half = ids(&store, "a");
            for number in 0..25 {
                half.extend(ids(&store, &format!("p{number}")));
            }
            store.forget(&half).unwrap();
            started = Instant::now();
            let stats = store.gc(&GcOptions::default()).unwrap();
            assert!(stats.dead_regions >= REGIONS / 2);
        }
        "repair" | "repair-pack" => {
            started = Instant::now();
            let report = Store::repair(path, &RepairOptions::default()).unwrap();
            assert_eq!(report.damaged.len(), usize::from(verb == "repair-pack"));
            assert_eq!(report.lost_snapshots.len(), report.damaged.len());
        }
        "restore" => {
            let store = Store::open(path).unwrap();
            let id = store.process("a").latest().unwrap();
            started = Instant::now();
            let map = store.restore(id).unwrap().into_mapping().unwrap();
            target_bytes = map.len() as u64;
        }
        "list" => {
            started = Instant::now();
            let store = Store::open(path).unwrap();
            assert_eq!(store.snapshots().len(), SNAPSHOTS);
        }
        "small" => {
            let memory = small_memory();
            started = Instant::now();
            let store = Store::open(path).unwrap();
            store.process("small").capture(&memory, &CaptureOptions::default()).unwrap();
        }
        other => panic!("no measurement is called {other}"),
    }
    let elapsed = started.elapsed();
    stop.store(true, Ordering::Relaxed);
    sampler.join().unwrap();
    let extra_bytes = peak.load(Ordering::Relaxed).saturating_sub(before_bytes + target_bytes);
    println!("{} {extra_bytes} {}", elapsed.as_micros(), status_bytes("VmHWM:"));
}

/// The process's resident memory without the page cache of files.
fn own_bytes() -> u64 {
    status_bytes("RssAnon:") + status_bytes("RssShmem:")
}

fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The number of regions in a store.
fn regions(path: &Path) -> u64 {
    let store = Store::open(path).unwrap();
    let stats = store.gc(&GcOptions::new().dry_run(true)).unwrap();
    stats.live_regions + stats.dead_regions
}

/// Copies a store and damages one byte in the middle of the first pack, where a region of the
/// process `a` is.
fn copy_and_damage(from: &Path, to: &Path) {
    let copy_dir = |name: &str| {
        std::fs::create_dir_all(to.join(name)).unwrap();
        for entry in std::fs::read_dir(from.join(name)).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), to.join(name).join(entry.file_name())).unwrap();
            }
        }
    };
    ["", "packs", "index"].into_iter().for_each(copy_dir);
    let packs = std::fs::read_dir(to.join("packs")).unwrap().map(|entry| entry.unwrap().path());
    let first = packs.min().unwrap();
    let mut bytes = std::fs::read(&first).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(first, bytes).unwrap();
}

/// Half of it is compressible, half is not.
fn content(length_bytes: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(usize::try_from(length_bytes).unwrap());
    while (bytes.len() as u64) < length_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
        bytes.extend((state & 0xFF).to_le_bytes());
    }
    bytes
}

fn image(path: &Path, length_bytes: u64, seed: u64) -> PathBuf {
    std::fs::write(path, content(length_bytes, seed)).unwrap();
    path.to_owned()
}

/// Two processes of half a million distinct regions each.
fn fill(path: &Path) {
    let store = Store::options().region_size(RegionSize::new(512).unwrap()).create(path).unwrap();
    for (name, seed) in [("a", 1), ("b", 2)] {
        let memory = content(REGIONS / 2 * 512, seed);
        store.process(name).capture(&memory, &CaptureOptions::default()).unwrap();
    }
}

fn small_memory() -> Vec<u8> {
    content(4 * MIB, 9)
}

/// All but four of ten thousand snapshots, of fifty processes, by eight threads: fsync takes most
/// of the time.
fn many_snapshots(path: &Path) {
    let store = Store::open(path).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || {
                let mut memory = vec![0u8; 64 * 1024];
                for at in (thread..SNAPSHOTS - 4).step_by(8) {
                    memory[..8].copy_from_slice(&at.to_le_bytes());
                    let process = store.process(format!("p{}", at % 50));
                    process.capture(&memory, &CaptureOptions::default()).unwrap();
                }
            });
        }
    });
    for _ in 0..2 {
        store.process("small").capture(&small_memory(), &CaptureOptions::default()).unwrap();
    }
}

/// 100 snapshots of a working process, 90 forgotten, then gc: the size on the disk, compared with
/// that of a store with only the remaining ten.
fn churn(path: &Path) {
    let take = |store: &Store, keep: &dyn Fn(usize) -> bool| {
        let mut memory = content(32 * MIB, 3);
        for step in 0..100usize {
            let mut state = step as u64 + 1;
            // A step rewrites about 2 % of the regions.
            for _ in 0..40 {
                state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
                let at = usize::try_from(state >> 20).unwrap() % (memory.len() / 16384) * 16384;
                memory[at..at + 16384].copy_from_slice(&content(16384, state)[..16384]);
            }
            if keep(step) {
                store.process("p").capture(&memory, &CaptureOptions::default()).unwrap();
            }
        }
    };
    let store = Store::options().create(path).unwrap();
    take(&store, &|_| true);
    let ids = ids(&store, "p");
    let forgotten: Vec<_> =
        ids.iter().enumerate().filter(|(at, _)| at % 10 != 0).map(|(_, id)| *id).collect();
    store.forget(&forgotten).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    drop(store);
    let fresh_path = path.with_extension("fresh");
    let fresh = Store::options().create(&fresh_path).unwrap();
    take(&fresh, &|step| step % 10 == 0);
    drop(fresh);
    let (churned, fresh) = (disk_bytes(path), disk_bytes(&fresh_path));
    let live = disk_bytes(&fresh_path.join("packs"));
    println!(
        "after 100 snapshots, 90 forgotten, gc: {} MiB on disk, {} MiB in a fresh store, ratio to the live objects {:.2}",
        churned / MIB,
        fresh / MIB,
        churned as f64 / live as f64
    );
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => disk_bytes(&entry.path()),
            metadata => metadata.blocks() * 512,
        })
        .sum()
}

/// The ids of the snapshots of a process, oldest first.
fn ids(store: &Store, process: &str) -> Vec<SnapshotId> {
    store.process(process).snapshots().iter().map(Snapshot::id).collect()
}
