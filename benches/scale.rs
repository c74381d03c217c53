//! A large store stays quick to open and small in memory: prints what the README claims.
//!
//! `cargo bench --bench scale`. Each measurement is a process of its own, whose anonymous memory
//! (`RssAnon`) is sampled every 2 ms; mapped packs are page cache and do not count. The baseline
//! is what such a process takes before it begins.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillframe::{CaptureOptions, FileSource, GcOptions, RegionSize, Store, VerifyOptions};

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

    println!("{:<44} {:>12} {:>16}", "", "time", "memory beside it");
    measure("a capture of 1 GiB, 16 KiB regions", "capture-file", &image(&path("image"), 1024 * MIB, 1));
    let million = path("million");
    fill(&million);
    measure("opening a store of a million regions", "open", &million);
    measure("verify of it", "verify", &million);
    measure("gc --dry-run of it", "gc-dry", &million);
    measure("a restore from it, beside the 512 MiB target", "restore", &million);
    measure("gc of it, half forgotten", "gc-half", &million);
    let many = path("many");
    many_snapshots(&many);
    measure("list of 10,000 snapshots", "list", &many);
    measure("capture of a small unchanged process", "small", &many);
    churn(&path("churn"));
}

/// Runs one measurement in a process of its own.
fn measure(what: &str, verb: &str, path: &Path) {
    let output = Command::new(std::env::current_exe().unwrap()).arg(verb).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let (milliseconds, bytes) = text.trim().split_once(' ').unwrap();
    let mib = bytes.parse::<u64>().unwrap() / MIB;
    println!("{what:<44} {milliseconds:>9} ms {mib:>12} MiB");
}

fn child(verb: &str, path: &Path) {
    let image = (verb == "capture-file").then(|| FileSource::new(path));
    let peak = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let before_bytes = rss_anon_bytes();
    let sampler = std::thread::spawn({
        let (peak, stop) = (peak.clone(), stop.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                peak.fetch_max(rss_anon_bytes(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
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
            store.gc(&GcOptions { dry_run: true, ..GcOptions::default() }).unwrap();
        }
        "gc-half" => {
            let store = Store::open(path).unwrap();
            let half: Vec<_> = store.process("a").snapshots();
            store.forget(&half).unwrap();
            started = Instant::now();
            let stats = store.gc(&GcOptions::default()).unwrap();
            assert_eq!(stats.dead_regions, REGIONS / 2);
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
    println!("{:.1} {extra_bytes}", elapsed.as_secs_f64() * 1000.0);
}

fn rss_anon_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Half of it compresses, half does not.
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

fn many_snapshots(path: &Path) {
    let store = Store::options().create(path).unwrap();
    let mut memory = vec![0u8; 64 * 1024];
    // All but the last ones by a few threads, as fsync is most of the time.
    for at in 0..SNAPSHOTS - 2 {
        memory[..8].copy_from_slice(&at.to_le_bytes());
        store.process(format!("p{}", at % 50)).capture(&memory, &CaptureOptions::default()).unwrap();
    }
    for _ in 0..2 {
        store.process("small").capture(&small_memory(), &CaptureOptions::default()).unwrap();
    }
}

/// 100 snapshots of a working process, 90 forgotten, gc: what is on the disk against what the ten
/// that are left take in a store of their own.
fn churn(path: &Path) {
    let take = |store: &Store, keep: &dyn Fn(usize) -> bool| {
        let mut memory = content(32 * MIB, 3);
        for step in 0..100usize {
            let mut state = step as u64 + 1;
            // A step rewrites about two in a hundred regions.
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
    let ids = store.process("p").snapshots();
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
