//! A gc step by step, with captures and readers between the steps.

use super::*;
use crate::CaptureOptions;
use crate::store::catalog::Fact;
use crate::store::packs::log::FactAt;

/// A store, and memory that only a forgotten snapshot has.
fn store_with_garbage() -> (tempfile::TempDir, Store, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let memory: Vec<u8> = (0..1_000_000u32).map(|at| (at.wrapping_mul(at) >> 7).to_le_bytes()[0]).collect();
    let id = capture(&store, "old", &memory);
    capture(&store, "other", &[5; 40_000]);
    store.forget(&[id]).unwrap();
    (dir, store, memory)
}

fn capture(store: &Store, process: &str, memory: &[u8]) -> SnapshotId {
    store.process(process).capture(memory, &CaptureOptions::default()).unwrap().id
}

fn assert_whole(store: &Store, id: SnapshotId, memory: &[u8]) {
    assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == *memory);
    assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
}

#[test]
fn a_snapshot_taken_after_the_roots_were_read_keeps_what_it_found() {
    let (_dir, store, memory) = store_with_garbage();
    let options = GcOptions::default();
    let collecting = Collecting::begin(store.shared());
    let marking = collecting.mark(&options.progress).unwrap();
    let id = capture(&store, "new", &memory);
    let condemned = collecting.condemn(marking).unwrap();
    let stats = collecting.sweep(&condemned, &options).unwrap();
    assert_eq!(stats.dead_regions, 0);
    drop(collecting);
    assert_whole(&store, id, &memory);
}

#[test]
fn a_snapshot_taken_when_its_regions_are_condemned_stores_them_anew() {
    let (_dir, store, memory) = store_with_garbage();
    let options = GcOptions::default();
    let collecting = Collecting::begin(store.shared());
    let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
    let done = store.process("new").capture(&memory, &CaptureOptions::default()).unwrap();
    assert!(done.new_regions > 0);
    let stats = collecting.sweep(&condemned, &options).unwrap();
    assert!(stats.freed_bytes > 0, "the first copies are gone");
    drop(collecting);
    assert_whole(&store, done.id, &memory);
}

#[test]
fn a_snapshot_that_is_read_is_kept_though_it_is_forgotten() {
    let (_dir, store, memory) = store_with_garbage();
    let id = capture(&store, "new", &memory);
    let options = GcOptions::default();
    let collecting = Collecting::begin(store.shared());
    let restore = store.restore(id).unwrap();
    store.forget(&[id]).unwrap();
    let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
    collecting.sweep(&condemned, &options).unwrap();
    drop(collecting);
    // The first gc has taken its record away; a second one must know of it all the same.
    store.gc(&options).unwrap();
    assert!(restore.into_mapping().unwrap()[..] == memory[..]);
    assert!(store.gc(&options).unwrap().dead_regions > 0);
}

#[test]
fn a_child_keeps_what_it_took_over_from_a_parent_that_is_forgotten_meanwhile() {
    let (_dir, store, memory) = store_with_garbage();
    let parent = capture(&store, "line", &memory);
    let options = GcOptions::default();
    let collecting = Collecting::begin(store.shared());
    // Unchanged: it looks nothing up, the parent's tables say it all.
    let child = capture(&store, "line", &memory);
    store.forget(&[parent]).unwrap();
    let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
    collecting.sweep(&condemned, &options).unwrap();
    drop(collecting);
    assert_whole(&store, child, &memory);
}

/// Memory that does something when it is opened: in the middle of a capture.
struct Meanwhile<'a>(&'a [u8], &'a dyn Fn());

impl crate::source::Source for Meanwhile<'_> {
    fn open(&self) -> Result<Box<dyn crate::source::Frozen + '_>, crate::source::SourceError> {
        (self.1)();
        self.0.open()
    }
}

#[test]
fn a_parent_forgotten_during_the_capture_of_its_child_is_kept_until_gc_knows_the_child() {
    let (_dir, store, memory) = store_with_garbage();
    let parent = capture(&store, "line", &memory);
    let options = GcOptions::default();
    let under_way = std::cell::RefCell::new(None);
    let meanwhile = || {
        store.forget(&[parent]).unwrap();
        let collecting = Collecting::begin(store.shared());
        let marking = collecting.mark(&options.progress).unwrap();
        *under_way.borrow_mut() = Some((collecting, marking));
    };
    let source = Meanwhile(&memory, &meanwhile);
    let child = store.process("line").capture(&source, &CaptureOptions::default()).unwrap().id;
    let (collecting, marking) = under_way.take().unwrap();
    let condemned = collecting.condemn(marking).unwrap();
    collecting.sweep(&condemned, &options).unwrap();
    drop(collecting);
    assert_whole(&store, child, &memory);
}

/// The index loses what it knows, as sled was seen to after it could not read a page.
fn lose(store: &Store, trees: &[Tree]) {
    // What the settler puts into it later would not be lost.
    store.shared().sync().unwrap();
    store.shared().settle_all();
    let index = store.shared().index();
    for tree in trees.iter().copied() {
        let entries: Vec<_> = index.entries(tree).collect::<Result<_, _>>().unwrap();
        assert!(!entries.is_empty());
        index.take_out(entries.into_iter().map(|(hash, location)| (tree, hash, location))).unwrap();
    }
}

/// What the packs hold, whatever the index says.
fn rebuilt(store: Store) -> Store {
    let path = store.info().path;
    drop(store);
    Store::repair(&path, &Default::default()).unwrap();
    Store::open(&path).unwrap()
}

#[test]
fn what_the_index_loses_after_marking_is_copied_all_the_same() {
    let (_dir, store, _) = store_with_garbage();
    let memory: Vec<u8> = (0..400_000u32).map(|at| (at.wrapping_mul(at) >> 9).to_le_bytes()[0]).collect();
    let id = capture(&store, "new", &memory);
    let options = GcOptions::default();
    let collecting = Collecting::begin(store.shared());
    let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
    lose(&store, &Tree::ALL);
    let stats = collecting.sweep(&condemned, &options).unwrap();
    assert!(stats.packs_rewritten > 0 && stats.freed_bytes > 0, "{stats:?}");
    drop(collecting);
    assert_whole(&rebuilt(store), id, &memory);
}

#[test]
fn gc_refuses_to_run_when_the_index_has_lost_what_a_snapshot_needs() {
    let (_dir, store, _) = store_with_garbage();
    let memory = vec![7; 100_000];
    let id = capture(&store, "new", &memory);
    lose(&store, &[Tree::Regions]);
    let refused = store.gc(&GcOptions::default()).unwrap_err();
    assert!(matches!(refused, Error::Store(StoreError::Missing { .. })), "{refused}");
    let store = rebuilt(store);
    assert_whole(&store, id, &memory);
    assert!(store.gc(&GcOptions::default()).unwrap().freed_bytes > 0);
}

#[test]
fn an_undecodable_record_is_damage_and_its_pack_stays_until_a_repair() {
    let (dir, store, _) = store_with_garbage();
    let shared = store.shared();
    // Checks and hash are right; what it says is nothing.
    let plain = vec![0xFF; 300];
    let id = SnapshotId(Hash::of(&plain));
    let fact: FactAt = Box::new(move |at| Fact::Tombstone(id, at));
    shared.log.append_facts(vec![(ObjectKind::Record, plain, fact)], shared.log.failures()).unwrap();
    shared.sync().unwrap();
    let path = store.info().path;
    drop(store);
    let packs =
        || std::fs::read_dir(path.join("packs")).unwrap().map(|it| it.unwrap().path()).collect::<Vec<_>>();
    let before = packs();
    for _ in 0..2 {
        let store = Store::open(&path).unwrap();
        let problems = store.verify(&Default::default()).unwrap().problems;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!((&*problems[0].kind, &problems[0].snapshots[..]), ("record", &[id][..]));
        let everything = GcOptions::new().max_unused_percent(0);
        store.gc(&everything).unwrap();
        assert!(before.iter().all(|pack| pack.exists()), "{:?}", packs());
    }
    let report = Store::repair(&path, &Default::default()).unwrap();
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    let store = Store::open(&path).unwrap();
    assert_eq!(store.verify(&Default::default()).unwrap().problems, []);
    drop(dir);
}
