//! Packs that are missing or cut short: each opening and each verify reports them until a repair
//! records the loss.

use std::path::{Path, PathBuf};

use stillframe::repair::RepairOptions;
use stillframe::verify::ProblemKind;
use stillframe::{CaptureOptions, GcOptions, SnapshotId, Store};

use crate::noise::noise;
use crate::vault::{copy, files_in, verify};

struct Made {
    _dir: tempfile::TempDir,
    path: PathBuf,
    /// Its record is in the first pack, according to the index.
    early: SnapshotId,
    /// The snapshots of the second pack.
    late: Vec<SnapshotId>,
}

fn capture(store: &Store, process: &str, seed: u64) -> SnapshotId {
    store.process(process).capture(&noise(200_000, seed), &CaptureOptions::default()).unwrap().id
}

fn collect(store: &Store) {
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
}

/// Pack 2, which gc wrote, and pack 3.
fn make() -> Made {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let (forgotten, early) = (capture(&store, "a", 1), capture(&store, "b", 2));
    store.forget(&[forgotten]).unwrap();
    collect(&store);
    let late = (3..6).map(|seed| capture(&store, "c", seed)).collect();
    drop(store);
    assert_eq!(packs(&path), ["00000002.pack", "00000003.pack"]);
    Made { _dir: dir, path, early, late }
}

fn packs(store: &Path) -> Vec<String> {
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    files_in(&store.join("packs")).iter().map(name).collect()
}

/// Each opening reports the pack and these snapshots, with the index and without, until a repair.
fn assert_told(path: &Path, pack: &str, says: &str, gone: &[SnapshotId]) {
    for round in 0..3 {
        let store = Store::open(path).unwrap();
        let problems = verify(&store).problems;
        let told = problems.iter().find(|it| it.kind == ProblemKind::Pack && it.object.starts_with(pack));
        let told = told.unwrap_or_else(|| panic!("round {round}: {problems:?}"));
        assert!(told.detail.contains(says), "{told:?}");
        assert!(gone.iter().all(|id| told.snapshots.contains(id)), "{gone:?} in {told:?}");
        let sample = stillframe::verify::VerifyOptions::new().sample_percent(1);
        assert!(store.verify(&sample).unwrap().problems.contains(told));
        // The store stays in use.
        capture(&store, "later", 10 + round);
        drop(store);
        if round == 1 {
            std::fs::remove_dir_all(path.join("index")).unwrap();
        }
    }
}

fn assert_a_repair_puts_it_on_record(path: &Path, pack: &str, gone: &[SnapshotId]) {
    let report = Store::repair(path, &RepairOptions::default()).unwrap();
    assert!(report.damaged.iter().any(|line| line.contains(pack)), "{report:?}");
    assert!(gone.iter().all(|id| report.lost_snapshots.contains(id)), "{report:?}");
    let text = std::fs::read_to_string(report.report.unwrap()).unwrap();
    assert!(gone.iter().all(|id| text.contains(&id.to_string())), "{text}");
    for _ in 0..2 {
        let store = Store::open(path).unwrap();
        assert_eq!(verify(&store).problems, []);
        capture(&store, "afterwards", 30);
        collect(&store);
    }
    assert!(!path.join("LOST").exists());
}

#[test]
fn a_pack_that_is_gone_is_told_until_a_repair() {
    let made = make();
    std::fs::remove_file(made.path.join("packs/00000003.pack")).unwrap();
    assert_told(&made.path, "00000003.pack", "the pack is gone", &[]);
    let store = Store::open(&made.path).unwrap();
    assert!(store.snapshot(made.early).is_ok());
    drop(store);
    assert_a_repair_puts_it_on_record(&made.path, "00000003.pack", &[]);
}

#[test]
fn snapshots_that_the_index_knew_in_a_pack_that_is_gone_are_named() {
    let made = make();
    std::fs::remove_file(made.path.join("packs/00000002.pack")).unwrap();
    assert_told(&made.path, "00000002.pack", "the pack is gone", &[made.early]);
    let store = Store::open(&made.path).unwrap();
    assert!(made.late.iter().all(|id| store.restore(*id).unwrap().into_mapping().is_ok()));
    drop(store);
    assert_a_repair_puts_it_on_record(&made.path, "00000002.pack", &[made.early]);
}

#[test]
fn a_pack_that_was_cut_short_is_told_and_can_be_put_back() {
    let made = make();
    let pack = made.path.join("packs/00000003.pack");
    let whole = std::fs::read(&pack).unwrap();
    let cut = || std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
    cut();
    assert_told(&made.path, "00000003.pack", "was cut to", &[]);
    std::fs::write(&pack, &whole).unwrap();
    let store = Store::open(&made.path).unwrap();
    assert_eq!(verify(&store).problems, []);
    assert!(made.late.iter().all(|id| store.restore(*id).unwrap().into_mapping().is_ok()));
    drop(store);
    assert!(!made.path.join("LOST").exists());
    cut();
    // What was captured meanwhile is in a separate pack.
    assert_told(&made.path, "00000003.pack", "was cut to", &[]);
    assert_a_repair_puts_it_on_record(&made.path, "00000003.pack", &[]);
}

#[test]
fn a_copy_made_across_a_gc_is_told_whichever_parts_of_it_are_of_before() {
    for index_is_lost in [false, true] {
        let made = make();
        let before = made.path.with_extension("before");
        copy(&made.path, &before);
        let store = Store::open(&made.path).unwrap();
        store.forget(&made.late[..2]).unwrap();
        collect(&store);
        drop(store);
        // A backup that listed the packs first, and copied those that were still there afterwards.
        let copied = made.path.with_extension("copied");
        copy(&made.path, &copied);
        let listed = packs(&before);
        for pack in packs(&copied) {
            if !listed.contains(&pack) {
                std::fs::remove_file(copied.join("packs").join(pack)).unwrap();
            }
        }
        if index_is_lost {
            std::fs::remove_dir_all(copied.join("index")).unwrap();
        }
        assert_ne!(packs(&copied), packs(&made.path));
        assert_told(&copied, "0000000", "the pack is gone", &[]);
    }
}

#[test]
fn packs_that_gc_removed_are_not_lost_however_old_the_index_is() {
    let made = make();
    let old = made.path.with_extension("old-index");
    copy(&made.path.join("index"), &old);
    let store = Store::open(&made.path).unwrap();
    // First some of the snapshots in the pack are forgotten, then all.
    store.forget(&made.late[..2]).unwrap();
    collect(&store);
    store.forget(&[made.early, made.late[2]]).unwrap();
    collect(&store);
    capture(&store, "d", 9);
    collect(&store);
    drop(store);
    assert!(!packs(&made.path).iter().any(|pack| pack == "00000002.pack" || pack == "00000003.pack"));
    std::fs::remove_dir_all(made.path.join("index")).unwrap();
    copy(&old, &made.path.join("index"));
    let store = Store::open(&made.path).unwrap();
    assert_eq!(verify(&store).problems, []);
    assert!(!made.path.join("LOST").exists());
}
