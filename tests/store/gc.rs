//! gc frees the space of forgotten snapshots, and no other.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stillframe::source::Attachment;
use stillframe::{CaptureOptions, GcOptions, Hash, RegionSize, SnapshotId, Store};

use crate::noise::noise;

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
        let dry = store.gc(&GcOptions::new().dry_run(true)).unwrap();
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
        store.set_label(keep, "why", "important").unwrap();
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
    assert!(store.process("p").snapshots().iter().map(|snapshot| snapshot.id()).eq([keep]));
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

/// Memory of three tables, each one of a few. So a thread finds tables that another thread forgets,
/// also in part, and they return again and again. Versions of a table differ in some 24 regions, by
/// a few bytes each.
fn shared_memory(tables: [(u64, u64); 3]) -> Vec<u8> {
    let table = |(seed, version): (u64, u64)| {
        let mut bytes = noise(TABLE_BYTES, seed);
        for place in (0..24).map(|number| number * 7919 % (TABLE_BYTES - 8)) {
            bytes[place..place + 8].copy_from_slice(&version.to_le_bytes());
        }
        bytes
    };
    tables.into_iter().flat_map(table).collect()
}

/// 512 regions of 512 bytes.
const TABLE_BYTES: usize = 512 * 512;

/// A snapshot that one of the threads has taken and not forgotten.
struct Kept {
    id: SnapshotId,
    tables: [(u64, u64); 3],
    label: Option<u64>,
}

impl Kept {
    fn assert_whole(&self, store: &Store) {
        assert_restores(store, self.id, &shared_memory(self.tables));
        let snapshot = store.snapshot(self.id).unwrap();
        assert_eq!(snapshot.labels().get("step"), self.label.map(|step| step.to_string()).as_ref());
    }
}

/// The work of one of eight threads. Two threads share each process, so another thread may forget
/// the parent. Returns the kept snapshots, how many captures it took, and how many regions were
/// stored as deltas.
fn work_meanwhile(store: &Store, worker: u64, stop: &AtomicBool) -> (Vec<Kept>, u64, u64) {
    let mut state = worker + 1;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 33) % below
    };
    let mut kept: Vec<Kept> = Vec::new();
    let mut forgotten = Vec::new();
    let (mut step, mut captures, mut delta_regions) = (0, 0, 0);
    while !stop.load(Ordering::Relaxed) {
        step += 1;
        match draw(8) {
            0..4 => {
                // Mostly in its own place, so that it resembles the parent's table; sometimes in
                // another place, or another table.
                let tables = [0, 1, 2].map(|place| match draw(12) {
                    0 => (3 + draw(8), 0),
                    1 => (draw(3), draw(60)),
                    _ => (place, draw(60)),
                });
                let memory = shared_memory(tables);
                let process = store.process(format!("p{}", worker / 2));
                let options = CaptureOptions::new().deltas(draw(8) > 0);
                let done = match draw(4) {
                    0 => process.start_capture(&memory[..], &options).unwrap().wait().unwrap(),
                    _ => process.capture(&memory[..], &options).unwrap(),
                };
                captures += 1;
                delta_regions += done.delta_regions;
                kept.push(Kept { id: done.id, tables, label: None });
            }
            4 if !kept.is_empty() => {
                let at = draw(kept.len() as u64) as usize;
                store.set_label(kept[at].id, "step", step.to_string()).unwrap();
                kept[at].label = Some(step);
            }
            5 if !kept.is_empty() => kept[draw(kept.len() as u64) as usize].assert_whole(store),
            _ => {}
        }
        if kept.len() > 4 {
            let Kept { id, tables, .. } = kept.remove(draw(5) as usize);
            // Pinned before it is forgotten, and restored a while later.
            if draw(2) == 0 {
                forgotten.push((store.restore(id).unwrap(), tables));
            }
            store.forget(&[id]).unwrap();
            assert!(store.restore(id).is_err());
        }
        if forgotten.len() > draw(3) as usize {
            let (restore, tables) = forgotten.remove(0);
            assert!(restore.into_mapping().unwrap()[..] == shared_memory(tables)[..]);
        }
    }
    (kept, captures, delta_regions)
}

#[test]
fn eight_threads_lose_nothing_while_gc_runs_in_a_loop() {
    let seconds = std::env::var("STILLFRAME_GC_SECONDS").map_or(4, |seconds| seconds.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().region_size(RegionSize::new(512).unwrap()).create(&path).unwrap();
    let stop = AtomicBool::new(false);
    let (mut rounds, mut freed_bytes) = (0, 0);
    let (kept, captures, delta_regions) = std::thread::scope(|scope| {
        let (store, stop) = (&store, &stop);
        let workers: Vec<_> =
            (0..8).map(|worker| scope.spawn(move || work_meanwhile(store, worker, stop))).collect();
        let until = Instant::now() + Duration::from_secs(seconds);
        let some_failed = || workers.iter().any(|worker| worker.is_finished());
        while !some_failed() && (Instant::now() < until || rounds < 3 || freed_bytes == 0) {
            let dry_run = rounds % 5 == 4;
            let options = GcOptions::new().dry_run(dry_run).max_unused_percent(0);
            let collected = store.gc(&options);
            if collected.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            freed_bytes += if dry_run { 0 } else { collected.unwrap().freed_bytes };
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let done: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        let captures: u64 = done.iter().map(|(_, captures, _)| captures).sum();
        let delta_regions: u64 = done.iter().map(|(_, _, delta_regions)| delta_regions).sum();
        (done.into_iter().flat_map(|(kept, ..)| kept).collect::<Vec<_>>(), captures, delta_regions)
    });
    println!("{rounds} rounds of gc freed {freed_bytes} bytes; {captures} captures, {delta_regions} deltas");
    assert!(delta_regions > 0);
    let assert_all_is_there = |store: &Store| {
        assert_eq!(store.snapshots().len(), kept.len());
        kept.iter().for_each(|it| it.assert_whole(store));
        assert_eq!(store.verify(&Default::default()).unwrap().problems, []);
    };
    assert_all_is_there(&store);
    drop(store);
    assert_all_is_there(&Store::open(&path).unwrap());
    std::fs::remove_dir_all(path.join("index")).unwrap();
    let store = Store::open(&path).unwrap();
    assert_all_is_there(&store);
    store.gc(&GcOptions::default()).unwrap();
    assert_all_is_there(&store);
}

#[test]
fn what_a_table_names_is_kept_also_if_an_attachment_has_the_bytes_of_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let size = RegionSize::new(4096).unwrap();
    let store = Store::options().region_size(size).create(dir.path().join("store")).unwrap();
    let memory = noise(100_000, 1);
    let table = memory.chunks(4096).flat_map(|region| Hash::of(region).0).collect();
    let attachments = vec![Attachment { name: "table".to_owned(), bytes: table }];
    let options = CaptureOptions::new().attachments(attachments);
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
