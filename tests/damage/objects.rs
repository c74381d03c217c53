//! One damaged object: every place × every kind of damage × with the index and without.

use std::panic::{AssertUnwindSafe, catch_unwind};

use stillframe::repair::RepairOptions;
use stillframe::store::ObjectKind;
use stillframe::verify::{ProblemKind, VerifyOptions};
use stillframe::{Error, GcOptions, Store};

use crate::vault::*;

/// What is damaged: the kind of the object, the snapshots that need it, and whether gc must refuse
/// because it cannot know what else is needed.
pub(crate) const PLACES: [(ObjectKind, &[&str], bool); 7] = [
    (ObjectKind::Region, &["b1"], false),
    (ObjectKind::Region, &["a1", "a2", "b1"], false),
    (ObjectKind::Table, &["a1"], true),
    (ObjectKind::Table, &["a1", "a2"], true),
    (ObjectKind::Root, &["c1"], true),
    (ObjectKind::Layout, &["a1", "a2"], true),
    (ObjectKind::Attachment, &["c1"], false),
];

pub(crate) type Damage = fn(&mut [u8], &Object);

/// How: what the damage does to the bytes of an object.
pub(crate) const KINDS: [(&str, Damage); 7] = [
    ("a bit of its payload flipped", |pack, object| pack[(object.payload + object.payload_end) / 2] ^= 0x10),
    ("its payload zeroed", |pack, object| pack[object.payload..object.payload_end].fill(0)),
    ("its kind changed", |pack, object| pack[object.start] = pack[object.start] % 8 + 1),
    ("its length flipped", |pack, object| pack[object.start + 10] ^= 0x40),
    ("its hash flipped", |pack, object| pack[object.start + 20] ^= 1),
    ("its checksum flipped", |pack, object| pack[object.start + 13] ^= 0x80),
    ("all of it zeroed", |pack, object| pack[object.start..object.end].fill(0)),
];

/// Runs `check` for each place and kind of damage, with the index and without, and reports all
/// failures.
pub(crate) fn for_each_case(check: impl Fn(&Vault, &Object, &[&str], bool)) {
    let mut failed = Vec::new();
    for (kind, needed_by, gc_refuses) in PLACES {
        for (how, damage) in KINDS {
            for index_is_lost in [false, true] {
                let vault = Vault::copy();
                let object = vault.object(kind, needed_by);
                vault.change_pack(|bytes| damage(bytes, &object));
                if index_is_lost {
                    vault.lose_the_index();
                }
                let result = catch_unwind(AssertUnwindSafe(|| check(&vault, &object, needed_by, gc_refuses)));
                if result.is_err() {
                    let index = if index_is_lost { ", and the index lost" } else { "" };
                    failed.push(format!("the {kind} that {needed_by:?} need: {how}{index}"));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} cases failed, as said above:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn only_the_snapshots_that_need_a_damaged_object_fail_and_verify_lists_exactly_those() {
    for_each_case(|vault, object, needed_by, _| {
        let says = object.hash.to_string();
        let store = vault.open();
        assert_eq!(store.snapshots().len(), NAMES.len());
        vault.assert_lost(&store, needed_by, &says);
        let report = verify(&store);
        assert_eq!(vault.named(&report), needed_by);
        assert!(report.problems.iter().any(|problem| problem.object == says), "{report:?}");
        // Nor does one verify change what the next one finds, also after the store is reopened.
        assert_eq!(vault.named(&verify(&store)), needed_by);
        drop(store);
        let store = vault.open();
        assert_eq!(vault.named(&verify(&store)), needed_by);
        vault.assert_lost(&store, needed_by, &says);
    });
}

#[test]
fn a_sample_of_everything_and_a_look_at_one_snapshot_find_it_too() {
    for_each_case(|vault, object, needed_by, _| {
        let says = object.hash.to_string();
        let store = vault.open();
        for (name, id) in &vault.ids {
            let options = VerifyOptions::new().snapshots([*id]);
            let report = store.verify(&options).unwrap();
            let names: &[&str] = if needed_by.contains(name) { &[name] } else { &[] };
            assert_eq!(vault.named(&report), names, "{report:?}");
            assert_eq!(names.is_empty(), report.problems.is_empty(), "{report:?}");
            assert!(report.problems.iter().all(|problem| problem.object == says), "{report:?}");
        }
        drop(store);
        // Nor has that changed what a sample finds.
        let store = vault.open();
        let options = VerifyOptions::new().sample_percent(100);
        let report = store.verify(&options).unwrap();
        assert_eq!(vault.named(&report), needed_by, "{report:?}");
        assert!(report.problems.iter().any(|problem| problem.object == object.hash.to_string()));
    });
}

#[test]
fn repeated_samples_find_it_in_the_end_and_blame_the_right_snapshots() {
    for (kind, needed_by, _) in PLACES {
        let vault = Vault::copy();
        let object = vault.object(kind, needed_by);
        vault.change_pack(|bytes| bytes[object.start] ^= 0x10);
        let store = vault.open();
        let options = VerifyOptions::new().sample_percent(50);
        let mut samples = std::iter::repeat_with(|| store.verify(&options).unwrap());
        let report = samples.by_ref().take(100).find(|report| !report.problems.is_empty()).unwrap();
        let [problem] = &report.problems[..] else { panic!("{report:?}") };
        assert_eq!((problem.kind, &*problem.object), (ProblemKind::Object(kind), &*object.hash.to_string()));
        assert_eq!(vault.named(&report), needed_by);
    }
}

#[test]
fn capturing_the_same_memory_again_heals_the_earlier_snapshots() {
    for_each_case(|vault, _, needed_by, _| {
        let store = vault.open();
        verify(&store);
        heal(&store, needed_by);
        vault.assert_whole(&store);
        assert_eq!(vault.named(&verify(&store)), [""; 0]);
        drop(store);
        let store = vault.open();
        vault.assert_whole(&store);
        drop(store);
        vault.lose_the_index();
        vault.assert_whole(&vault.open());
    });
}

#[test]
fn repair_brings_back_everything_else_and_sets_the_pack_aside() {
    for_each_case(|vault, object, needed_by, _| {
        let damaged = std::fs::read(vault.pack()).unwrap();
        let would = Store::repair(&vault.path, &RepairOptions::new().dry_run(true)).unwrap();
        assert_eq!(vault.names(would.lost_snapshots), needed_by);
        assert!(std::fs::read(vault.pack()).unwrap() == damaged, "a dry run changes nothing");

        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!(vault.names(report.lost_snapshots), needed_by);
        assert_eq!((report.index_rebuilt, report.damaged.len()), (true, 1), "{:?}", report.damaged);
        assert!(std::fs::read(vault.path.join("damaged/00000001.pack")).unwrap() == damaged);

        let store = vault.open();
        vault.assert_lost(&store, needed_by, &object.hash.to_string());
        assert_eq!(vault.named(&verify(&store)), needed_by);
        heal(&store, needed_by);
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
        assert!(is_unknown(&store, vault.forgotten));
        drop(store);
        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!((report.damaged, report.lost_snapshots), (vec![], vec![]));
    });
}

#[test]
fn gc_refuses_rather_than_drop_what_a_damaged_table_may_need() {
    for_each_case(|vault, object, needed_by, gc_refuses| {
        let store = vault.open();
        let options = GcOptions::new().max_unused_percent(0);
        match store.gc(&options) {
            Ok(_) => assert!(!gc_refuses, "gc must refuse"),
            Err(Error::Store(error)) => {
                assert!(gc_refuses && error.is_damage(), "{error:?}");
                assert!(error.to_string().contains(&object.hash.to_string()), "{error}");
            }
            Err(error) => panic!("{error:?}"),
        }
        vault.assert_lost(&store, needed_by, &object.hash.to_string());
        verify(&store);
        heal(&store, needed_by);
        store.gc(&options).unwrap();
        vault.assert_whole(&store);
    });
}
