//! Damaged records, notes and tombstones: what the index still knows, and what is lost without the
//! index.

use stillframe::Store;
use stillframe::repair::RepairOptions;
use stillframe::store::ObjectKind;

use crate::objects::KINDS;
use crate::vault::*;

/// The object of this kind. Of each kind other than records there is only one.
pub(crate) fn fact(vault: &Vault, kind: ObjectKind, snapshot: &str) -> Object {
    let id = vault.ids[snapshot].0;
    let is_it =
        |object: &Object| object.kind == kind as u8 && (kind != ObjectKind::Record || object.hash == id);
    objects(&std::fs::read(vault.pack()).unwrap()).into_iter().find(is_it).unwrap()
}

#[test]
fn a_damaged_record_costs_its_snapshot_alone_and_only_when_the_index_is_lost_too() {
    for damage in [KINDS[0], KINDS[1], KINDS[4], KINDS[5]] {
        println!("{}", damage.0);
        let vault = Vault::copy();
        let object = fact(&vault, ObjectKind::Record, "b1");
        vault.change_pack(|bytes| damage.1(bytes, &object));
        // The index still has the record.
        let store = vault.open();
        vault.assert_whole(&store);
        let report = verify(&store);
        assert_eq!(vault.named(&report), ["b1"], "{report:?}");
        drop(store);

        vault.lose_the_index();
        let store = vault.open();
        assert_eq!(store.snapshots().len(), NAMES.len() - 1);
        assert!(is_unknown(&store, vault.ids["b1"]));
        for name in ["a1", "a2", "c1"] {
            assert!(read(&store, vault.ids[name]).unwrap() == (memory(name), globals(name)));
        }
        assert!(!verify(&store).problems.is_empty());
        // The memory is still there, so a new capture of it writes only the record.
        let capture = store.process("b").capture(&memory("b1"), &options("b1")).unwrap();
        assert_eq!((capture.new_regions, capture.parent), (0, None));
    }
}

#[test]
fn repair_brings_back_what_only_the_index_knows() {
    for kind in [ObjectKind::Record, ObjectKind::Note, ObjectKind::Tombstone] {
        for (how, damage) in KINDS {
            println!("{kind}, {how}");
            let vault = Vault::copy();
            let object = fact(&vault, kind, "b1");
            vault.change_pack(|bytes| damage(bytes, &object));
            let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
            assert_eq!((report.damaged.len(), report.lost_snapshots), (1, vec![]));
            vault.lose_the_index();
            let store = vault.open();
            vault.assert_whole(&store);
            assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
            assert!(is_unknown(&store, vault.forgotten));
            assert_eq!(verify(&store).problems, []);
        }
    }
}

#[test]
fn a_damaged_note_costs_labels_and_a_damaged_tombstone_forgets_nothing_else() {
    for kind in [ObjectKind::Note, ObjectKind::Tombstone] {
        for (how, damage) in KINDS {
            println!("{kind}, {how}");
            let vault = Vault::copy();
            let object = fact(&vault, kind, "c1");
            vault.change_pack(|bytes| damage(bytes, &object));
            let store = vault.open();
            vault.assert_whole(&store);
            assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
            assert!(is_unknown(&store, vault.forgotten));
            let report = verify(&store);
            assert_eq!((report.problems.len(), vault.named(&report)), (1, vec![]), "{report:?}");
            drop(store);
            vault.lose_the_index();
            let store = vault.open();
            vault.assert_whole(&store);
            let report = verify(&store);
            assert_eq!((report.problems.len(), vault.named(&report)), (1, vec![]), "{report:?}");
        }
    }
}
