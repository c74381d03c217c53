//! The end of the newest pack: what a crash leaves there, and what damage does.

use std::collections::BTreeSet;

use stillframe::repair::RepairOptions;
use stillframe::store::ObjectKind;
use stillframe::verify::ProblemKind;
use stillframe::{CaptureOptions, SnapshotId, Store};

use crate::facts::fact;
use crate::noise::noise;
use crate::vault::*;

/// The store of [`Vault`] with bytes after its pack, as a crash leaves them: the index does not
/// know of these bytes.
fn with_tail(tail: &[u8], index_is_lost: bool) -> Vault {
    let vault = Vault::copy();
    vault.change_pack(|bytes| bytes.extend_from_slice(tail));
    if index_is_lost {
        vault.lose_the_index();
    }
    vault
}

/// The bytes that the next snapshot appends.
fn next_snapshot() -> (Vec<u8>, SnapshotId) {
    let vault = Vault::copy();
    let before = std::fs::read(vault.pack()).unwrap();
    let store = vault.open();
    let id =
        store.process("e").capture(&noise(5 * REGION_BYTES + 9, 7), &CaptureOptions::default()).unwrap().id;
    drop(store);
    (std::fs::read(vault.pack()).unwrap()[before.len()..].to_vec(), id)
}

#[test]
fn a_pack_cut_at_any_interesting_byte_loses_nothing_that_was_acknowledged() {
    let (tail, id) = next_snapshot();
    let whole = [vec![0; PACK_HEADER_BYTES], tail.clone()].concat();
    let ends: BTreeSet<usize> = objects(&whole).iter().map(|object| object.end - PACK_HEADER_BYTES).collect();
    let interesting: BTreeSet<usize> = objects(&whole)
        .iter()
        .flat_map(|it| {
            [it.start, it.start + 7, it.payload, it.payload_end - 1, it.end - 1, it.end, it.end + 1]
        })
        .map(|at| at.saturating_sub(PACK_HEADER_BYTES).min(tail.len()))
        .collect();
    assert!(interesting.len() > 40, "{}", interesting.len());
    for cut in interesting {
        for index_is_lost in [false, true] {
            println!("cut at {cut}, the index lost: {index_is_lost}");
            let vault = with_tail(&tail[..cut], index_is_lost);
            let acknowledged_bytes = std::fs::metadata(vault.pack()).unwrap().len() as usize - cut;
            let store = vault.open();
            vault.assert_whole(&store);
            assert_eq!(is_unknown(&store, id), cut < tail.len());
            assert_eq!(verify(&store).problems, []);
            // The pack is cut at the last whole object, and the next capture appends there.
            let kept = ends.iter().rfind(|end| **end <= cut).copied().unwrap_or(0);
            assert_eq!(std::fs::metadata(vault.pack()).unwrap().len() as usize, acknowledged_bytes + kept);
            let memory = noise(5 * REGION_BYTES + 9, 7);
            let again = store.process("e").capture(&memory, &CaptureOptions::default()).unwrap().id;
            drop(store);
            let store = vault.open();
            assert!(read(&store, again).unwrap().0 == memory);
            vault.assert_whole(&store);
            assert_eq!(verify(&store).problems, []);
            assert!(!vault.path.join("damaged").exists());
            assert_eq!(files_in(&vault.path.join("packs")).len(), 1);
        }
    }
}

#[test]
fn garbage_and_zeros_after_the_pack_are_cut_silently() {
    let (next, _) = next_snapshot();
    let shifted = [&[0; 8][..], &next[8..]].concat();
    let tails: [(&str, Vec<u8>); 6] = [
        ("a byte", vec![0x53]),
        ("noise", noise(10_000, 8)),
        ("noise of odd length", noise(777, 9)),
        ("zeros", vec![0; 4096]),
        ("zeros of odd length", vec![0; 3]),
        ("a snapshot without its first header, of which the rest was written", shifted[..48].to_vec()),
    ];
    for (what, tail) in tails {
        for index_is_lost in [false, true] {
            println!("{what}, the index lost: {index_is_lost}");
            let vault = with_tail(&tail, index_is_lost);
            let acknowledged_bytes = std::fs::metadata(vault.pack()).unwrap().len() - tail.len() as u64;
            let store = vault.open();
            vault.assert_whole(&store);
            // If the index is lost too, the cause may be worse than a crash, and the problem stays
            // visible.
            if !index_is_lost || tail.iter().all(|byte| *byte == 0) {
                assert_eq!(verify(&store).problems, []);
                assert_eq!(std::fs::metadata(vault.pack()).unwrap().len(), acknowledged_bytes);
            }
            let id = store.process("e").capture(&memory("b1"), &CaptureOptions::default()).unwrap().id;
            drop(store);
            let store = vault.open();
            assert!(read(&store, id).unwrap().0 == memory("b1"));
            vault.assert_whole(&store);
            drop(store);
            let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
            assert_eq!(report.lost_snapshots, []);
            let store = vault.open();
            vault.assert_whole(&store);
            assert!(read(&store, id).unwrap().0 == memory("b1"));
            assert_eq!(verify(&store).problems, []);
        }
    }
}

#[test]
fn a_pack_cut_into_what_was_acknowledged_costs_what_lay_there_alone() {
    let vault = Vault::copy();
    // Everything up to the record of `a2` is kept; `b1` and `c1` lie after it.
    let end = fact(&vault, ObjectKind::Record, "a2").end;
    vault.change_pack(|bytes| bytes.truncate(end + 20));
    let store = vault.open();
    for name in ["a1", "a2"] {
        assert!(read(&store, vault.ids[name]).unwrap() == (memory(name), globals(name)));
    }
    for name in ["b1", "c1"] {
        assert!(is_unknown(&store, vault.ids[name]));
    }
    capture(&store, "b1");
    let problems = verify(&store).problems;
    let told =
        problems.iter().find(|it| it.kind == ProblemKind::Pack && it.detail.contains("was cut to")).unwrap();
    assert_eq!(vault.names(told.snapshots.clone()), ["b1", "c1"]);
    drop(store);
    Store::repair(&vault.path, &RepairOptions::default()).unwrap();
    assert_eq!(verify(&vault.open()).problems, []);
}

/// Two packs, of which gc wrote the one with the higher number.
fn with_a_pack_of_gc_behind() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let capture = |process: &str, seed| {
        store.process(process).capture(&noise(200_000, seed), &CaptureOptions::default()).unwrap().id
    };
    let collect = || store.gc(&stillframe::GcOptions::new().max_unused_percent(0)).unwrap();
    let (first, second, _) = (capture("a", 1), capture("b", 2), capture("c", 3));
    store.forget(&[first]).unwrap();
    collect();
    capture("d", 4);
    store.forget(&[second]).unwrap();
    collect();
    drop(store);
    let names: Vec<_> =
        files_in(&path.join("packs")).iter().map(|it| it.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["00000003.pack", "00000004.pack"]);
    (dir, path)
}

#[test]
fn bytes_behind_a_pack_that_is_not_the_last_one_are_damage_and_no_torn_tail() {
    for index_is_lost in [false, true] {
        for tail in [vec![0xA5; 64], vec![0; 64], vec![0x53]] {
            let (_dir, path) = with_a_pack_of_gc_behind();
            let pack = path.join("packs/00000003.pack");
            let before = std::fs::read(&pack).unwrap();
            std::fs::write(&pack, [&before[..], &tail].concat()).unwrap();
            if index_is_lost {
                std::fs::remove_dir_all(path.join("index")).unwrap();
            }
            let store = Store::open(&path).unwrap();
            let problems = verify(&store).problems;
            assert_eq!(problems.len(), 1, "{tail:?}, the index lost: {index_is_lost}: {problems:?}");
            assert_eq!((problems[0].kind, &problems[0].snapshots[..]), (ProblemKind::Pack, &[][..]));
            drop(store);
            let report = Store::repair(&path, &RepairOptions::default()).unwrap();
            assert_eq!((report.damaged.len(), &report.lost_snapshots[..]), (1, &[][..]), "{report:?}");
            assert_eq!(verify(&Store::open(&path).unwrap()).problems, []);
        }
    }
}
