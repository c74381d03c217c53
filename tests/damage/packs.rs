//! Whole packs: damaged headers and missing packs.

use stillframe::repair::RepairOptions;
use stillframe::verify::ProblemKind;
use stillframe::{CaptureOptions, Error, GcOptions, RegionSize, Store};

use crate::noise::noise;
use crate::vault::*;

#[test]
fn a_pack_with_a_damaged_header_is_named_left_alone_and_brought_back_by_repair() {
    for at in 0..PACK_HEADER_BYTES {
        let vault = Vault::copy();
        vault.change_pack(|bytes| bytes[at] ^= 4);
        let damaged = std::fs::read(vault.pack()).unwrap();
        let store = vault.open();
        assert_eq!(store.snapshots().len(), 0);
        let report = verify(&store);
        let [problem] = &report.problems[..] else { panic!("byte {at}: {report:?}") };
        assert!(problem.kind == ProblemKind::Pack && problem.object.contains("00000001.pack"), "{problem:?}");
        // The store stays usable and appends to another pack.
        let id = store.process("e").capture(&memory("b1"), &CaptureOptions::default()).unwrap().id;
        assert!(read(&store, id).unwrap().0 == memory("b1"));
        drop(store);
        assert!(std::fs::read(vault.pack()).unwrap() == damaged, "byte {at}");

        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!((report.damaged.len(), report.lost_snapshots), (1, vec![]), "byte {at}");
        assert!(std::fs::read(vault.path.join("damaged/00000001.pack")).unwrap() == damaged);
        let store = vault.open();
        vault.assert_whole(&store);
        assert!(read(&store, id).unwrap().0 == memory("b1"));
        assert!(is_unknown(&store, vault.forgotten));
        assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
        assert_eq!(verify(&store).problems, [], "byte {at}");
    }
}

#[test]
fn a_pack_of_nothing_but_zeros_is_named_kept_and_set_aside_by_repair() {
    // No crash leaves such a pack: the header of a pack is durable before the pack has its name.
    for content in [vec![], vec![0; 64], vec![0; 5000]] {
        let vault = Vault::copy();
        let zeros = vault.pack().with_file_name("00000099.pack");
        std::fs::write(&zeros, &content).unwrap();
        let store = vault.open();
        vault.assert_whole(&store);
        let report = verify(&store);
        let [problem] = &report.problems[..] else { panic!("{report:?}") };
        assert!(problem.kind == ProblemKind::Pack && problem.object.contains("00000099.pack"), "{problem:?}");
        drop(store);
        assert!(std::fs::read(&zeros).unwrap() == content);

        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!((report.damaged.len(), report.lost_snapshots), (1, vec![]));
        assert!(std::fs::read(vault.path.join("damaged/00000099.pack")).unwrap() == content);
        assert!(!zeros.exists());
        let store = vault.open();
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
    }
}

/// A store of two packs: the records of `b1` and `c1` are in the second, the regions of `b1` in the
/// first.
fn two_packs() -> Vault {
    let vault = Vault::copy();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let region_size = RegionSize::new(REGION_BYTES as u32).unwrap();
    let store = Store::options().region_size(region_size).create(&path).unwrap();
    let plain = CaptureOptions::default();
    let forgotten = store.process("d").capture(&noise(50_000, 6), &plain).unwrap().id;
    let mut ids = vault.ids.clone();
    for name in ["a1", "a2"] {
        ids.insert(name, capture(&store, name));
    }
    // Another snapshot, which is forgotten later, brings the regions of `b1` into the first pack.
    let first = store.process("f").capture(&memory("b1"), &plain).unwrap().id;
    store.forget(&[forgotten]).unwrap();
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    for name in ["b1", "c1"] {
        ids.insert(name, capture(&store, name));
    }
    store.forget(&[first]).unwrap();
    drop(store);
    let packs = files_in(&path.join("packs"));
    let packs: Vec<_> = packs.iter().map(|pack| pack.file_name().unwrap().to_owned()).collect();
    assert_eq!(packs, ["00000002.pack", "00000003.pack"]);
    Vault { _dir: dir, path, ids, forgotten, ..vault }
}

#[test]
fn a_pack_that_is_gone_costs_the_snapshots_that_need_it() {
    let vault = two_packs();
    std::fs::remove_file(vault.path.join("packs/00000002.pack")).unwrap();
    let store = vault.open();
    // The records of `a` were in it.
    for name in ["a1", "a2"] {
        assert!(is_unknown(&store, vault.ids[name]));
    }
    assert!(read(&store, vault.ids["c1"]).unwrap() == (memory("c1"), globals("c1")));
    assert!(matches!(read(&store, vault.ids["b1"]), Err(Error::Store(error)) if error.is_damage()));
    assert_eq!(vault.named(&verify(&store)), ["a1", "a2", "b1"]);
    capture(&store, "b1");
    assert!(read(&store, vault.ids["b1"]).unwrap().0 == memory("b1"));
    assert_eq!(vault.named(&verify(&store)), ["a1", "a2"]);
    drop(store);
    Store::repair(&vault.path, &RepairOptions::default()).unwrap();
    assert_eq!(verify(&vault.open()).problems, []);
}

#[test]
fn gc_takes_nothing_that_an_unreadable_pack_may_need() {
    for number in [2, 3] {
        println!("pack {number}");
        let vault = two_packs();
        let path = vault.path.join(format!("packs/0000000{number}.pack"));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let store = vault.open();
        let error = store.gc(&GcOptions::new().max_unused_percent(0)).unwrap_err();
        assert!(error.to_string().contains(&format!("0000000{number}.pack")), "{error}");
        drop(store);
        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!(report.lost_snapshots, []);
        let store = vault.open();
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
    }
}
