//! Deltas: a region that changed a little is stored as a difference, and no caller sees a change.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stillframe::codec::Codec;
use stillframe::source::FileSource;
use stillframe::verify::{VerifyOptions, VerifyReport};
use stillframe::{CaptureOptions, CaptureStats, GcOptions, Hash, RegionSize, Restore, SnapshotId, Store};

use crate::noise::noise;

const REGION_BYTES: usize = 4096;

/// A store in a temporary directory.
struct Vault {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Vault {
    fn new() -> (Vault, Store) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let region_size = RegionSize::new(REGION_BYTES as u32).unwrap();
        let store = Store::options().region_size(region_size).create(&path).unwrap();
        (Vault { _dir: dir, path }, store)
    }

    fn packs(&self) -> Vec<PathBuf> {
        let packs = std::fs::read_dir(self.path.join("packs")).unwrap();
        packs.map(|entry| entry.unwrap().path()).collect()
    }

    fn open(&self) -> Store {
        Store::open(&self.path).unwrap()
    }

    /// Opens the store after its index was deleted.
    fn open_rebuilt(&self) -> Store {
        std::fs::remove_dir_all(self.path.join("index")).unwrap();
        Store::open(&self.path).unwrap()
    }

    /// The pack with the region of this hash, its bytes, and the range of the payload in them.
    fn find(&self, hash: Hash) -> Option<(PathBuf, Vec<u8>, Range<usize>)> {
        self.packs().into_iter().find_map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            // A delta contains the hash of its base too.
            let is_header = |at: &usize| bytes[*at] == 1 && u32_at(*at + 4) == REGION_BYTES;
            let with_hash = |at: &usize| bytes[*at + 16..*at + 48] == hash.0;
            let found = (64..bytes.len() - 48).step_by(8).filter(is_header).find(with_hash)?;
            let stored_bytes = u32_at(found + 8);
            Some((path, bytes, found + 48..found + 48 + stored_bytes))
        })
    }

    /// Flips a bit in the last byte of the payload of the region with this hash.
    fn damage(&self, hash: Hash) {
        let (path, bytes, payload) = self.find(hash).unwrap();
        let last = payload.end - 1;
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[bytes[last] ^ 1], last as u64).unwrap();
    }
}

fn capture(store: &Store, process: &str, memory: &[u8]) -> CaptureStats {
    store.process(process).capture(memory, &CaptureOptions::default()).unwrap()
}

fn whole(store: &Store, process: &str, memory: &[u8]) -> CaptureStats {
    let options = CaptureOptions::new().deltas(false);
    store.process(process).capture(memory, &options).unwrap()
}

fn assert_restores(store: &Store, id: SnapshotId, memory: &[u8]) {
    assert!(store.restore(id).and_then(Restore::into_mapping).unwrap()[..] == *memory);
}

fn verify(store: &Store) -> VerifyReport {
    store.verify(&VerifyOptions::default()).unwrap()
}

fn gc(store: &Store, max_unused_percent: u8) {
    store.gc(&GcOptions::new().max_unused_percent(max_unused_percent)).unwrap();
}

/// Later captures go into another pack.
fn seal(store: &Store) {
    let garbage = capture(store, "garbage", &noise(100 * REGION_BYTES, 2)).id;
    store.forget(&[garbage]).unwrap();
    gc(store, 50);
}

/// Makes garbage of a region that is stored as a delta: gc removes its base from the packs, and the
/// delta stays. Returns the region's memory, and a snapshot that is kept with its memory.
fn leave_a_delta_without_its_base(vault: &Vault, store: &Store) -> (Vec<u8>, SnapshotId, Vec<u8>) {
    let memory = noise(REGION_BYTES, 1);
    let changed = poked(&memory, 0, 9);
    let first = capture(store, "p", &memory).id;
    // What follows is in another pack.
    seal(store);
    let second = capture(store, "p", &changed);
    assert_eq!(second.delta_regions, 1);
    let other = noise(300 * REGION_BYTES, 3);
    let kept = capture(store, "other", &other).id;
    store.forget(&[first, second.id]).unwrap();
    // The first pack is all garbage, the second hardly any.
    gc(store, 10);
    let holds = |memory: &[u8]| vault.find(Hash::of(memory)).is_some();
    assert!(!holds(&memory) && holds(&changed), "the test is about this");
    (changed, kept, other)
}

fn region(store: &Store, id: SnapshotId, at: usize) -> Hash {
    store.snapshot(id).unwrap().regions().unwrap().nth(at).unwrap().unwrap().1
}

/// A copy with one byte of a region changed.
fn poked(memory: &[u8], region: usize, value: u8) -> Vec<u8> {
    let mut memory = memory.to_vec();
    memory[region * REGION_BYTES + usize::from(value)] ^= value | 1;
    memory
}

#[test]
fn three_hundred_changes_of_one_place_are_deltas_and_come_back_each() {
    let (vault, store) = Vault::new();
    let mut memory = noise(40 * REGION_BYTES + 100, 1);
    let mut history = vec![(capture(&store, "p", &memory), memory.clone())];
    for step in 0..300 {
        memory = poked(&memory, 7, step as u8);
        memory = poked(&memory, step % 40, (step / 2) as u8);
        history.push((capture(&store, "p", &memory), memory.clone()));
    }
    let further = &history[1..];
    assert_eq!(
        further.iter().map(|(capture, _)| capture.new_regions).sum::<u64>(),
        1,
        "number 255 is the last"
    );
    assert!(further.iter().all(|(capture, _)| capture.changed_regions <= 2));
    let added_bytes: u64 = further.iter().map(|(capture, _)| capture.added_bytes).sum();
    assert!(added_bytes < 300 * 1200, "{added_bytes}");
    drop(store);
    for open in [Vault::open, Vault::open_rebuilt] {
        let store = open(&vault);
        history.iter().for_each(|(capture, memory)| assert_restores(&store, capture.id, memory));
        assert_eq!(verify(&store).problems, []);
        let stats = store.stats().unwrap();
        assert!(stats.deltas > 500 && stats.deltas < stats.regions, "{stats:?}");
    }
}

#[test]
fn the_bases_of_a_delta_live_as_long_as_it_does_and_no_longer() {
    let (vault, store) = Vault::new();
    let mut memory = noise(REGION_BYTES, 1);
    let mut ids = vec![capture(&store, "p", &memory).id];
    for step in 1..=7 {
        memory = poked(&memory, 0, step);
        ids.push(capture(&store, "p", &memory).id);
    }
    // The bases of number 7 are 6, 4 and 0.
    store.forget(&ids[..7]).unwrap();
    gc(&store, 0);
    assert_restores(&store, ids[7], &memory);
    assert_eq!(verify(&store).problems, []);
    assert_eq!(store.stats().unwrap().regions, 4);
    drop(store);
    let store = vault.open_rebuilt();
    assert_restores(&store, ids[7], &memory);
    store.forget(&ids[7..]).unwrap();
    gc(&store, 0);
    assert_eq!(store.stats().unwrap().regions, 0);
}

#[test]
fn what_is_there_as_a_delta_is_not_stored_again() {
    let (_vault, store) = Vault::new();
    let memory = noise(10 * REGION_BYTES, 1);
    capture(&store, "p", &memory);
    let changed = poked(&memory, 3, 5);
    assert_eq!(capture(&store, "p", &changed).delta_regions, 1);
    let elsewhere = [noise(REGION_BYTES, 2), changed[3 * REGION_BYTES..4 * REGION_BYTES].to_vec()].concat();
    let other = capture(&store, "other", &elsewhere);
    assert_eq!((other.new_regions, other.delta_regions, other.shared_regions), (1, 0, 1));
    assert_restores(&store, other.id, &elsewhere);
    // And back: the original region is still stored, so nothing is stored.
    let back = capture(&store, "p", &memory);
    assert_eq!((back.new_regions, back.delta_regions, back.shared_regions), (0, 0, 1));
}

/// A delta that is garbage and has lost its base must not count as a stored region.
#[test]
fn a_delta_whose_base_gc_has_dropped_is_not_there_when_the_index_is_rebuilt() {
    let (vault, store) = Vault::new();
    let (changed, kept, other) = leave_a_delta_without_its_base(&vault, &store);
    drop(store);
    let store = vault.open_rebuilt();
    assert_eq!(verify(&store).problems, []);
    let again = capture(&store, "p", &changed);
    assert_restores(&store, again.id, &changed);
    assert_restores(&store, kept, &other);
    assert_eq!(verify(&store).problems, []);
}

#[test]
fn a_damaged_base_costs_what_is_stored_as_a_difference_from_it_and_a_new_capture_heals() {
    for heal_the_base in [true, false] {
        let (vault, store) = Vault::new();
        let memory = noise(10 * REGION_BYTES, 1);
        let changed = poked(&memory, 3, 5);
        let first = capture(&store, "p", &memory).id;
        let second = capture(&store, "p", &changed).id;
        let apart = whole(&store, "apart", &changed[REGION_BYTES..3 * REGION_BYTES]).id;
        let base = region(&store, first, 3);
        drop(store);
        vault.damage(base);
        let store = vault.open();
        let error = store.restore(second).and_then(Restore::into_mapping).unwrap_err();
        let source = std::error::Error::source(&error).unwrap();
        assert!(format!("{error} {source}").contains(&base.to_string()), "{error}: {source}");
        let report = verify(&store);
        let named: Vec<_> = report.problems.iter().map(|problem| problem.object.clone()).collect();
        assert_eq!(report.problems.len(), 2, "{named:?}");
        for problem in &report.problems {
            let is_base = problem.object == base.to_string();
            assert_eq!(problem.snapshots, [if is_base { first } else { second }], "{problem:?}");
            assert!(problem.detail.contains(&base.to_string()) || is_base, "{problem:?}");
        }
        assert_restores(&store, apart, &changed[REGION_BYTES..3 * REGION_BYTES]);
        // No new difference is made from a region that cannot be read.
        let healed = capture(&store, "p", if heal_the_base { &memory } else { &changed });
        assert_eq!((healed.new_regions, healed.delta_regions), (1, 0));
        assert_restores(&store, second, &changed);
        if heal_the_base {
            assert_restores(&store, first, &memory);
            // The damaged copy is still there, but no snapshot needs it.
            assert!(verify(&store).problems.iter().all(|problem| problem.snapshots.is_empty()));
        } else {
            assert!(store.restore(first).and_then(Restore::into_mapping).is_err());
            capture(&store, "p", &memory);
        }
        assert_restores(&store, first, &memory);
        // The same holds after the index is lost and every object in the packs is read again.
        drop(store);
        let store = vault.open_rebuilt();
        assert_restores(&store, first, &memory);
        assert_restores(&store, second, &changed);
    }
}

#[test]
fn every_codec_stores_and_gives_back_deltas_or_not_in_one_store() {
    let (vault, store) = Vault::new();
    let text: Vec<u8> = (0..20_000u32).flat_map(|at| format!("{at} ").into_bytes()).collect();
    let mut history = Vec::new();
    let mut added_bytes = Vec::new();
    for (at, codec) in [Codec::None, Codec::Lz4, Codec::Zstd].into_iter().enumerate() {
        for deltas in [false, true] {
            let mut memory = text.clone();
            memory.rotate_left(100 * at + usize::from(deltas));
            let options = CaptureOptions::new().codec(codec).deltas(deltas);
            let name = format!("{codec} {deltas}");
            let first = store.process(&name).capture(&memory, &options).unwrap();
            added_bytes.push(first.added_bytes);
            history.push((first.id, memory.clone()));
            memory[50_000] = b'!';
            let second = store.process(&name).capture(&memory, &options).unwrap();
            assert_eq!((second.new_regions, second.delta_regions), if deltas { (0, 1) } else { (1, 0) });
            history.push((second.id, memory));
        }
    }
    let [none, _, lz4, _, zstd, _] = added_bytes[..] else { panic!() };
    assert!(zstd < lz4 && lz4 < none, "{added_bytes:?}");
    drop(store);
    for open in [Vault::open, Vault::open_rebuilt] {
        let store = open(&vault);
        history.iter().for_each(|(id, memory)| assert_restores(&store, *id, memory));
        assert_eq!(verify(&store).problems, []);
    }
}

/// A memory file of this name.
fn image(dir: &Path, name: &str, memory: &[u8]) -> FileSource {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join(name), memory).unwrap();
    FileSource::new(dir.join(name))
}

#[test]
fn a_first_snapshot_is_compared_with_one_of_a_process_like_it() {
    let (vault, store) = Vault::new();
    let memory = noise(20 * REGION_BYTES, 1);
    let mut other = memory.clone();
    (0..20).for_each(|at| other = poked(&other, at, 3));
    let dir = vault.path.with_file_name("images");
    let plain = CaptureOptions::default();
    let sources = [
        image(&dir.join("a"), "vm.img", &memory),
        image(&dir.join("b"), "vm.img", &other),
        image(&dir.join("c"), "quite-another", &poked(&other, 0, 9)),
    ];
    let first = store.process("a").capture(&sources[0], &plain).unwrap();
    assert_eq!((first.new_regions, first.delta_regions), (20, 0));
    // Without an option, because the file has the same name.
    let second = store.process("b").capture(&sources[1], &plain).unwrap();
    assert_eq!((second.parent, second.changed_regions, second.delta_regions), (None, 20, 20));
    let third = store.process("c").capture(&sources[2], &plain.clone().deltas(false)).unwrap();
    assert_eq!((third.new_regions, third.shared_regions), (1, 19));
    // Because the caller asked for it.
    let like_b = plain.clone().like("b");
    let fourth = store.process("d").capture(&poked(&other, 5, 77), &like_b).unwrap();
    assert_eq!((fourth.parent, fourth.delta_regions, fourth.shared_regions), (None, 1, 19));
    assert_restores(&store, second.id, &other);
    assert_restores(&store, fourth.id, &poked(&other, 5, 77));
    let like_nobody = plain.like("nobody");
    let error = store.process("e").capture(&memory, &like_nobody).unwrap_err();
    assert!(error.to_string().contains("nobody"), "{error}");
    // The process that `like` names may be forgotten.
    store.forget(&[first.id, third.id]).unwrap();
    gc(&store, 0);
    assert_restores(&store, second.id, &other);
    assert_eq!(verify(&store).problems, []);
}

/// The packs have no copy of the delta's base, and two copies of the delta: one is garbage, the
/// other has another base.
#[test]
fn of_two_copies_of_a_delta_the_one_whose_base_is_there_is_found_when_the_index_is_rebuilt() {
    let (vault, store) = Vault::new();
    let (changed, ..) = leave_a_delta_without_its_base(&vault, &store);
    let alike = poked(&changed, 0, 77);
    capture(&store, "q", &alike);
    let again = capture(&store, "q", &changed);
    assert_eq!(again.delta_regions, 1);
    // A further difference from that region.
    let further = poked(&changed, 0, 33);
    let next = capture(&store, "q", &further);
    assert_eq!(next.delta_regions, 1);
    drop(store);
    let store = vault.open_rebuilt();
    assert_restores(&store, again.id, &changed);
    assert_restores(&store, next.id, &further);
    assert_eq!(verify(&store).problems, []);
}

/// gc removes files one after the other.
#[test]
fn a_pack_that_gc_did_not_come_to_remove_brings_no_delta_back_whose_base_is_gone() {
    let (vault, store) = Vault::new();
    let memory = noise(REGION_BYTES, 1);
    let changed = poked(&memory, 0, 9);
    let first = capture(&store, "p", &memory).id;
    seal(&store);
    let big = capture(&store, "big", &noise(20 * REGION_BYTES, 4)).id;
    seal(&store);
    let second = capture(&store, "p", &changed);
    assert_eq!(second.delta_regions, 1);
    store.forget(&[big]).unwrap();
    gc(&store, 50);
    seal(&store);
    let other = noise(30 * REGION_BYTES, 3);
    let kept = capture(&store, "other", &other).id;
    store.forget(&[first, second.id]).unwrap();
    let (base, _, _) = vault.find(Hash::of(&memory)).unwrap();
    let (garbage, _, _) = vault.find(Hash::of(&changed)).unwrap();
    // gc cannot remove a directory as a file. A kill at this point has the same effect.
    let aside = vault.path.with_file_name("aside");
    std::fs::rename(&garbage, &aside).unwrap();
    std::fs::create_dir(&garbage).unwrap();
    store.gc(&GcOptions::default()).unwrap_err();
    assert!(!base.exists(), "the test is about this");
    drop(store);
    std::fs::remove_dir(&garbage).unwrap();
    std::fs::rename(&aside, &garbage).unwrap();
    let store = vault.open();
    let again = capture(&store, "p", &changed);
    assert_restores(&store, again.id, &changed);
    assert_restores(&store, kept, &other);
    assert_eq!(verify(&store).problems, []);
}

#[test]
fn a_pack_that_cannot_be_read_costs_no_delta_from_what_is_in_it() {
    for capture_meanwhile in [false, true] {
        let (vault, store) = Vault::new();
        let memory = noise(REGION_BYTES, 1);
        let changed = poked(&memory, 0, 9);
        let first = capture(&store, "p", &memory).id;
        seal(&store);
        let second = capture(&store, "p", &changed);
        assert_eq!(second.delta_regions, 1);
        drop(store);
        let (path, bytes, _) = vault.find(Hash::of(&memory)).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[bytes[20] ^ 1], 20).unwrap();
        let store = vault.open();
        if capture_meanwhile {
            let third = capture(&store, "q", &changed);
            assert_eq!(third.new_regions, 1);
            assert_restores(&store, third.id, &changed);
        }
        drop(store);
        let report = Store::repair(&vault.path, &Default::default()).unwrap();
        assert_eq!(report.lost_snapshots, []);
        let store = vault.open();
        assert_restores(&store, first, &memory);
        assert_restores(&store, second.id, &changed);
        assert_eq!(verify(&store).problems, []);
        // No damage is known any longer, so deltas are made again.
        assert_eq!(capture(&store, "p", &poked(&changed, 0, 5)).delta_regions, 1);
    }
}

/// A region that cannot be read once, and can be read later.
#[test]
fn when_damage_has_gone_no_delta_is_left_whose_base_was_taken_out() {
    let (vault, store) = Vault::new();
    let memory = noise(REGION_BYTES, 1);
    let changed = poked(&memory, 0, 9);
    let ids = [capture(&store, "p", &memory).id, capture(&store, "p", &changed).id];
    drop(store);
    vault.damage(Hash::of(&memory));
    let store = vault.open();
    assert!(store.restore(ids[1]).and_then(Restore::into_mapping).is_err());
    vault.damage(Hash::of(&memory));
    store.forget(&ids).unwrap();
    assert_eq!(verify(&store).problems, []);
    let again = capture(&store, "q", &changed);
    assert_restores(&store, again.id, &changed);
}
