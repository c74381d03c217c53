//! `verify` with a sample: random objects of the whole store, and after enough runs all of them.

use std::collections::BTreeSet;

use stillframe::Store;
use stillframe::store::ObjectKind;
use stillframe::verify::VerifyOptions;

use crate::archive::Archive;
use crate::vault::{change, verify};

fn sample(store: &Store, percent: u8) -> stillframe::verify::VerifyReport {
    store.verify(&VerifyOptions::new().sample_percent(percent)).unwrap()
}

#[test]
fn the_smallest_sample_touches_every_pack_and_says_what_it_covered() {
    let archive = Archive::copy();
    let store = Store::open(&archive.path).unwrap();
    let all = verify(&store);
    assert_eq!((all.checked_objects, all.checked_bytes), (all.total_objects, all.total_bytes));
    assert_eq!(all.total_objects as usize, archive.objects.len());
    for _ in 0..20 {
        let report = sample(&store, 1);
        assert_eq!((report.checked_packs, report.total_packs), (2, 2));
        // At least one region, one other object and one fact of each pack.
        assert!((6..all.total_objects / 2).contains(&report.checked_objects), "{report:?}");
        assert!(report.checked_bytes < report.total_bytes);
        assert_eq!((report.total_objects, report.total_bytes), (all.total_objects, all.total_bytes));
        assert_eq!(report.problems, []);
    }
}

#[test]
fn repeated_samples_come_to_every_object_of_every_kind() {
    let archive = Archive::copy();
    for object in &archive.objects {
        change(&archive.pack(object.pack), |bytes| bytes[object.payload_end - 1] ^= 1);
    }
    let store = Store::open(&archive.path).unwrap();
    let by_hash = [
        ObjectKind::Region,
        ObjectKind::Table,
        ObjectKind::Root,
        ObjectKind::Layout,
        ObjectKind::Attachment,
        ObjectKind::Record,
    ];
    let mut expected: BTreeSet<String> = BTreeSet::new();
    for object in &archive.objects {
        match by_hash.iter().any(|kind| *kind as u8 == object.kind) {
            true => expected.insert(object.hash.to_string()),
            false => expected.insert(format!(
                "{} at byte {}",
                archive.pack(object.pack).file_name().unwrap().to_string_lossy(),
                object.start
            )),
        };
    }
    let mut found: BTreeSet<String> = BTreeSet::new();
    // The probability that a problem is in none of a hundred samples of 30 % is 1 in 10^15.
    for _ in 0..100 {
        found.extend(sample(&store, 30).problems.into_iter().map(|problem| problem.object));
        if found.is_superset(&expected) {
            return;
        }
    }
    panic!("never found: {:?}", expected.difference(&found).collect::<Vec<_>>());
}

#[test]
fn a_sample_still_tells_of_damage_that_an_earlier_one_has_found() {
    let archive = Archive::copy();
    let region = archive.object(ObjectKind::Region);
    change(&archive.pack(region.pack), |bytes| bytes[region.payload] ^= 1);
    let store = Store::open(&archive.path).unwrap();
    let listed = |report: stillframe::verify::VerifyReport| -> BTreeSet<_> {
        report.problems.into_iter().flat_map(|problem| problem.snapshots).collect()
    };
    let all = listed(verify(&store));
    assert!(!all.is_empty());
    for _ in 0..5 {
        assert_eq!(listed(sample(&store, 1)), all);
    }
}
