//! Forgotten snapshots give their space back, and nothing else does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

use std::path::Path;

use stillframe::{Attachment, CaptureOptions, GcOptions, Hash, RegionSize, SnapshotId, Store};

#[path = "common/noise.rs"]
mod noise;
use noise::noise;

fn capture(store: &Store, process: &str, memory: &[u8]) -> SnapshotId {
    store.process(process).capture(memory, &CaptureOptions::default()).unwrap().id
}

fn assert_restores(store: &Store, id: SnapshotId, memory: &[u8]) {
    assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == *memory);
}

fn packs_bytes(store: &Path) -> u64 {
    let packs = std::fs::read_dir(store.join("packs")).unwrap();
    packs.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn the_dry_runs_say_exactly_what_gc_then_frees() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let history: Vec<_> = (0..20)
        .map(|step| {
            let memory = noise(500_000, step);
            (capture(&store, "p", &memory), memory)
        })
        .collect();
    for round in [&history[0..1], &history[1..9], &history[12..20]] {
        let ids: Vec<_> = round.iter().map(|(id, _)| *id).collect();
        let freeable_bytes = store.freeable_bytes(&ids).unwrap();
        assert!(freeable_bytes > 0 || ids.len() == 1);
        store.forget(&ids).unwrap();
        let dry = store.gc(&GcOptions { dry_run: true, ..GcOptions::default() }).unwrap();
        let before = packs_bytes(&path);
        let real = store.gc(&GcOptions::default()).unwrap();
        assert_eq!(freeable_bytes, real.freed_bytes);
        assert_eq!(dry.freed_bytes, real.freed_bytes);
        assert_eq!((dry.dead_regions, dry.live_regions), (real.dead_regions, real.live_regions));
        assert_eq!((dry.packs_removed, dry.packs_rewritten), (real.packs_removed, real.packs_rewritten));
        assert_eq!(before - packs_bytes(&path), real.freed_bytes);
    }
    for (id, memory) in &history[9..12] {
        assert_restores(&store, *id, memory);
    }
    assert_eq!(store.snapshots().len(), 3);
    drop(store);
    let store = Store::open(&path).unwrap();
    for (id, memory) in &history[9..12] {
        assert_restores(&store, *id, memory);
    }
    assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
}

#[test]
fn what_is_forgotten_stays_forgotten_when_the_index_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let kept = noise(300_000, 1);
    let (keep, labels) = {
        let store = Store::options().create(&path).unwrap();
        let keep = capture(&store, "p", &kept);
        let forgotten = capture(&store, "p", &noise(300_000, 2));
        store.label(keep, &[("why".to_owned(), Some("important".to_owned()))]).unwrap();
        store.forget(&[forgotten]).unwrap();
        // The first gc removes the record, the second the tombstone.
        for _ in 0..3 {
            store.gc(&GcOptions::default()).unwrap();
            capture(&store, "q", &noise(100, 3));
        }
        (keep, store.snapshot(keep).unwrap().labels().clone())
    };
    std::fs::remove_dir_all(path.join("index")).unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(store.process("p").snapshots(), [keep]);
    assert_eq!(*store.snapshot(keep).unwrap().labels(), labels);
    assert_restores(&store, keep, &kept);
}

#[test]
fn gc_of_a_store_without_garbage_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let memory = noise(1 << 20, 4);
    let id = capture(&store, "p", &memory);
    let before = packs_bytes(&path);
    let stats = store.gc(&GcOptions::default()).unwrap();
    assert_eq!((stats.freed_bytes, stats.dead_regions, stats.live_regions), (0, 0, 64));
    assert_eq!(packs_bytes(&path), before);
    assert_restores(&store, id, &memory);
}

#[test]
fn a_store_whose_every_snapshot_is_forgotten_becomes_small() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let ids: Vec<_> = (0..5).map(|seed| capture(&store, "p", &noise(2 << 20, seed))).collect();
    store.forget(&ids).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    assert_eq!(packs_bytes(&path), 0);
    let memory = noise(2 << 20, 0);
    let id = capture(&store, "p", &memory);
    assert_restores(&store, id, &memory);
}

#[test]
fn captures_restores_and_forgets_go_on_while_gc_runs_in_a_loop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                store.gc(&GcOptions::default()).unwrap();
                rounds += 1;
            }
            rounds
        });
        let workers: Vec<_> = (0..4u64)
            .map(|worker| {
                let store = &store;
                scope.spawn(move || {
                    let name = format!("p{worker}");
                    let mut live: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
                    for step in 0..60u64 {
                        // Few distinct contents: what one forgets another finds again.
                        let mut memory = noise(400_000, step % 5);
                        memory[..8].copy_from_slice(&(worker * 1000 + step).to_le_bytes());
                        live.push((capture(store, &name, &memory), memory));
                        if live.len() > 3 {
                            let (id, memory) = live.remove((step % 3) as usize);
                            let restore = store.restore(id).unwrap();
                            store.forget(&[id]).unwrap();
                            // It was pinned before it was forgotten.
                            assert!(restore.into_mapping().unwrap()[..] == memory[..]);
                        }
                        let (id, memory) = &live[live.len() / 2];
                        assert_restores(store, *id, memory);
                    }
                    live
                })
            })
            .collect();
        let live: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(collector.join().unwrap() > 3);
        let live: Vec<_> = live.into_iter().flat_map(Result::unwrap).collect();
        for (id, memory) in &live {
            assert_restores(&store, *id, memory);
        }
    });
    assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
}

#[test]
fn what_a_table_names_is_kept_also_if_an_attachment_has_the_bytes_of_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let size = RegionSize::new(4096).unwrap();
    let store = Store::options().region_size(size).create(dir.path().join("store")).unwrap();
    let memory = noise(100_000, 1);
    let table = memory.chunks(4096).flat_map(|region| Hash::of(region).0).collect();
    let attachments = vec![Attachment { name: "table".to_owned(), bytes: table }];
    let options = CaptureOptions { attachments, ..CaptureOptions::default() };
    let kept = store.process("p").capture(&memory, &options).unwrap().id;
    let forgotten = capture(&store, "q", &noise(100_000, 2));
    store.forget(&[forgotten]).unwrap();
    assert_eq!(store.gc(&GcOptions::default()).unwrap().dead_regions, 25);
    assert_restores(&store, kept, &memory);
}

#[test]
fn what_gc_wrote_is_never_appended_to_and_many_small_packs_become_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    drop(Store::options().create(&path).unwrap());
    let lengths = || {
        let packs = std::fs::read_dir(path.join("packs")).unwrap().map(|entry| entry.unwrap());
        packs
            .map(|entry| (entry.file_name(), entry.metadata().unwrap().len()))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    let mut kept = Vec::new();
    let mut most = 0;
    for step in 0..24 {
        let store = Store::open(&path).unwrap();
        let memory = noise(20_000, 2 * step);
        kept.push((capture(&store, "p", &memory), memory));
        let forgotten = capture(&store, "q", &noise(20_000, 2 * step + 1));
        store.forget(&[forgotten]).unwrap();
        store.gc(&GcOptions::default()).unwrap();
        drop(store);
        let after_gc = lengths();
        most = most.max(after_gc.len());
        let store = Store::open(&path).unwrap();
        capture(&store, "r", &noise(100, 1000 + step));
        let after_capture = lengths();
        assert!(after_gc.iter().all(|(name, bytes)| after_capture[name] == *bytes), "step {step}");
    }
    assert!(most < 24, "{most} packs");
    let store = Store::open(&path).unwrap();
    kept.iter().for_each(|(id, memory)| assert_restores(&store, *id, memory));
    assert_eq!(store.verify(&Default::default()).unwrap().problems, []);
}
