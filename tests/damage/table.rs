//! The whole damage table: every place × every kind of damage, with the index and without.
//!
//! The expected result of a cell follows from the objects that the damage destroys and the
//! snapshots that need them. Only those snapshots fail, with an error that names the damaged
//! object; `verify` lists exactly those; `repair` loses exactly those; a new capture of the same
//! memory heals them.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use stillframe::Store;
use stillframe::repair::RepairOptions;
use stillframe::store::ObjectKind;

use crate::archive::{Archive, Object, capture, memory, read};
use crate::vault::{change, verify};
use crate::whole_error::whole_error;

/// Where: an object, a part of an object, or a pack.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    PackHeader(usize),
    ObjectHeader,
    Payload(ObjectKind),
    BaseOfDeltas,
    MiddleOfAChain,
    PackTail,
    Pack(usize),
}

const PLACES: [Place; 16] = [
    Place::PackHeader(0),
    Place::PackHeader(1),
    Place::ObjectHeader,
    Place::Payload(ObjectKind::Region),
    Place::BaseOfDeltas,
    Place::MiddleOfAChain,
    Place::Payload(ObjectKind::Table),
    Place::Payload(ObjectKind::Root),
    Place::Payload(ObjectKind::Layout),
    Place::Payload(ObjectKind::Attachment),
    Place::Payload(ObjectKind::Record),
    Place::Payload(ObjectKind::Note),
    Place::Payload(ObjectKind::Tombstone),
    Place::PackTail,
    Place::Pack(0),
    Place::Pack(1),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    BitFlipped,
    Truncated,
    Zeroed,
    Deleted,
    OlderVersion,
}

const KINDS: [How; 5] = [How::BitFlipped, How::Truncated, How::Zeroed, How::Deleted, How::OlderVersion];

/// What the damage destroys.
struct Taken {
    /// Until a repair.
    lost: Vec<Object>,
    /// After a repair too.
    lost_for_good: Vec<Object>,
    /// Whether the damage makes the index unusable, and with it its knowledge of records.
    costs_the_index: bool,
}

fn target(archive: &Archive, place: Place) -> Option<Object> {
    Some(match place {
        Place::PackHeader(_) | Place::Pack(_) => return None,
        Place::ObjectHeader | Place::Payload(ObjectKind::Region) => {
            // A delta that is no base.
            archive.objects.iter().rfind(|object| object.kind == ObjectKind::Region as u8).unwrap().clone()
        }
        Place::Payload(kind) => archive.object(kind),
        Place::BaseOfDeltas => archive.object(ObjectKind::Region),
        Place::MiddleOfAChain => archive.middle_of_a_chain(),
        Place::PackTail => archive.objects.last().unwrap().clone(),
    })
}

/// Does the damage. Returns `None` where the store has no such place.
fn damage(archive: &Archive, place: Place, how: How) -> Option<Taken> {
    let from = |pack: usize, from: usize| -> Vec<Object> {
        archive.objects.iter().filter(|it| it.pack == pack && it.end > from).cloned().collect()
    };
    if let Some(object) = target(archive, place) {
        let (start, end) = match place {
            Place::ObjectHeader => (object.start, object.payload),
            _ => (object.payload, object.payload_end),
        };
        let others = || archive.objects.iter().filter(|other| other.hash != object.hash);
        let earlier = others().find(|other| other.kind == object.kind).or(others().next());
        let earlier_bytes = earlier.map(|other| {
            let bytes = std::fs::read(archive.pack(other.pack)).unwrap();
            bytes[other.start..other.end].to_vec()
        });
        let bytes = archive.pack(object.pack);
        match how {
            How::BitFlipped => change(&bytes, |bytes| bytes[(start + end) / 2] ^= 0x10),
            How::Zeroed => change(&bytes, |bytes| bytes[start..end].fill(0)),
            How::Truncated => change(&bytes, |bytes| bytes.truncate((start + end) / 2)),
            How::Deleted => change(&bytes, |bytes| drop(bytes.drain(object.start..object.end))),
            How::OlderVersion => {
                let earlier = earlier_bytes?;
                let length = earlier.len().min(object.end - object.start);
                change(&bytes, |bytes| {
                    bytes[object.start..object.start + length].copy_from_slice(&earlier[..length])
                });
            }
        }
        let costs_the_index = matches!(how, How::Truncated | How::Deleted);
        let lost = if costs_the_index { from(object.pack, object.start) } else { vec![object] };
        return Some(Taken { lost_for_good: lost.clone(), lost, costs_the_index });
    }
    let (Place::PackHeader(at) | Place::Pack(at)) = place else { return None };
    let path = archive.pack(at);
    let first = archive.objects.iter().find(|object| object.pack == at).unwrap().start;
    let all = from(at, 0);
    let mut lost_for_good = all.clone();
    let mut lost = all;
    match (place, how) {
        (Place::PackHeader(_), How::BitFlipped) => {
            change(&path, |bytes| bytes[20] ^= 1);
            lost_for_good.clear();
        }
        (Place::PackHeader(_), How::Zeroed) => {
            change(&path, |bytes| bytes[..first].fill(0));
            lost_for_good.clear();
        }
        (Place::PackHeader(_), How::OlderVersion) => {
            let other = std::fs::read(archive.pack(1 - at)).unwrap();
            change(&path, |bytes| bytes[..first.min(64)].copy_from_slice(&other[..first.min(64)]));
            lost_for_good.clear();
        }
        (Place::PackHeader(_), How::Truncated) => change(&path, |bytes| bytes.truncate(20)),
        (Place::PackHeader(_), How::Deleted) => change(&path, |bytes| drop(bytes.drain(..first))),
        (_, How::BitFlipped) => return None, // Single bits of an object are covered by the places above.
        (_, How::Truncated) => {
            let middle = lost[lost.len() / 2].start + 24;
            change(&path, |bytes| bytes.truncate(middle));
            lost = from(at, middle);
            lost_for_good = lost.clone();
        }
        (_, How::Zeroed) => change(&path, |bytes| bytes.fill(0)),
        (_, How::Deleted) => std::fs::remove_file(&path).unwrap(),
        (_, How::OlderVersion) => {
            if at == 0 {
                return None; // gc wrote this pack at once, so it has no earlier version.
            }
            std::fs::write(&path, &archive.earlier_pack).unwrap();
            lost = from(at, archive.earlier_pack.len());
            lost_for_good = lost.clone();
        }
    }
    Some(Taken { lost, lost_for_good, costs_the_index: true })
}

/// Runs one cell. Returns the result as it appears in the table.
fn cell(place: Place, how: How, without_index: bool) -> Option<String> {
    let archive = Archive::copy();
    let taken = damage(&archive, place, how)?;
    let index_is_lost = without_index || taken.costs_the_index;
    if without_index {
        archive.lose_the_index();
    }
    let repaired = Archive::copy();
    damage(&repaired, place, how)?;
    if without_index {
        repaired.lose_the_index();
    }

    let all: BTreeSet<&str> = archive.ids.keys().copied().collect();
    let without_record = archive.records_in(&taken.lost);
    let fail: BTreeSet<&str> = archive.cannot_do_without(&taken.lost);
    let tombstone_is_lost = taken.lost.iter().any(|object| archive.forgets(object));
    let store = Store::open(&archive.path).unwrap();
    let mut failed = BTreeSet::new();
    let mut unknown = BTreeSet::new();
    for name in &all {
        let id = archive.ids[name];
        if *name == "gone" {
            // A tombstone that neither the packs nor the index have forgets nothing.
            let is_back = index_is_lost && tombstone_is_lost && !without_record.contains("gone");
            assert_eq!(store.snapshot(id).is_ok(), is_back, "the forgotten snapshot");
            continue;
        }
        if store.snapshot(id).is_err() {
            unknown.insert(*name);
            continue;
        }
        match read(&store, id) {
            Ok(found) => assert!(found == memory(name), "{name} is changed"),
            Err(error) => {
                failed.insert(*name);
                let text = whole_error(&error);
                let needed = taken
                    .lost
                    .iter()
                    .filter(|object| archive.cannot_do_without(std::slice::from_ref(object)).contains(name));
                let names_it = needed.map(|object| object.hash.to_string()).any(|hash| text.contains(&hash));
                assert!(names_it, "{name}: {text} names nothing that is damaged");
            }
        }
    }
    let expected_unknown: BTreeSet<&str> = if index_is_lost {
        without_record.iter().copied().filter(|name| *name != "gone").collect()
    } else {
        BTreeSet::new()
    };
    assert_eq!(unknown, expected_unknown, "those whose records are gone");
    let expected: BTreeSet<&str> =
        fail.difference(&unknown).copied().filter(|name| *name != "gone").collect();
    assert_eq!(failed, expected, "those that need it");

    let report = verify(&store);
    let mut listed: BTreeSet<&str> =
        report.problems.iter().flat_map(|problem| &problem.snapshots).map(|id| archive.name(*id)).collect();
    listed.remove("gone");
    // A damaged record is reported even if the index still has it. Without the index, the header of
    // a damaged record still tells which one it is.
    let header_tells =
        matches!((place, how), (Place::Payload(_), How::BitFlipped | How::Zeroed)) && !taken.costs_the_index;
    let is_told = |name: &&&str| (!index_is_lost || header_tells) && **name != "gone";
    let known_without_record = without_record.iter().filter(is_told);
    let expected_listed: BTreeSet<&str> = failed.iter().chain(known_without_record).copied().collect();
    // If a pack is shorter than the index knows, or missing, the report also names the snapshots
    // whose records were there.
    let tells_of_a_loss = !without_index && taken.costs_the_index && !matches!(place, Place::PackHeader(_));
    let may_be_named = |expected: &BTreeSet<&'static str>, named: &BTreeSet<&'static str>| {
        let more: BTreeSet<&str> = named.difference(expected).copied().collect();
        expected.is_subset(named) && (more.is_empty() || tells_of_a_loss && more.is_subset(&without_record))
    };
    assert!(may_be_named(&expected_listed, &listed), "verify lists exactly those: {listed:?} in {report:?}");
    let is_reported = !report.problems.is_empty();
    drop(store);

    // On another copy, which no call has read yet.
    let report = Store::repair(&repaired.path, &RepairOptions::default()).unwrap();
    let mut lost: BTreeSet<&str> = report.lost_snapshots.iter().map(|id| repaired.name(*id)).collect();
    lost.remove("gone");
    let gone_for_good: BTreeSet<&str> = match index_is_lost {
        true => archive.records_in(&taken.lost_for_good),
        false => BTreeSet::new(),
    };
    let expected_lost: BTreeSet<&str> = archive
        .cannot_do_without(&taken.lost_for_good)
        .into_iter()
        .filter(|name| !gone_for_good.contains(name) && *name != "gone")
        .collect();
    assert!(may_be_named(&expected_lost, &lost), "what repair cannot bring back: {lost:?}");
    if !report.damaged.is_empty() {
        let told = std::fs::read_to_string(report.report.unwrap()).unwrap();
        assert!(lost.iter().all(|name| told.contains(&archive.ids[name].to_string())), "{told}");
    }
    let store = Store::open(&repaired.path).unwrap();
    for name in all.iter().filter(|name| lost.contains(*name) || gone_for_good.contains(*name)) {
        capture(&store, name);
    }
    for name in all.iter().filter(|name| !gone_for_good.contains(*name) && **name != "gone") {
        assert!(read(&store, repaired.ids[name]).unwrap() == memory(name), "{name} is healed");
    }
    assert_eq!(verify(&store).problems, [], "after it was repaired and captured again");

    let list = |names: &BTreeSet<&str>| match names.len() {
        0 => "-".to_owned(),
        _ => names.iter().copied().collect::<Vec<_>>().join(" "),
    };
    let verified = if is_reported { "listed" } else { "told when opened" };
    let columns = [list(&failed), list(&unknown), verified.to_owned(), list(&lost), list(&gone_for_good)];
    Some(format!(
        "{:<28} {:<28} {:<17} {:<28} {}",
        columns[0], columns[1], columns[2], columns[3], columns[4]
    ))
}

#[test]
fn every_place_and_every_kind_of_damage_comes_to_what_it_must() {
    println!(
        "{:<20} {:<13} {:<6} {:<28} {:<28} {:<17} {:<28} record gone for good",
        "place", "kind", "index", "fail", "not on record", "verify", "lost after repair"
    );
    let (mut cases, mut broken) = (0, Vec::new());
    for place in PLACES {
        for how in KINDS {
            for without_index in [false, true] {
                let index = if without_index { "lost" } else { "there" };
                let what = format!("{:<20} {:<13} {index:<6}", format!("{place:?}"), format!("{how:?}"));
                match catch_unwind(AssertUnwindSafe(|| cell(place, how, without_index))) {
                    Ok(Some(outcome)) => {
                        cases += 1;
                        println!("{what} {outcome}");
                    }
                    Ok(None) => {}
                    Err(_) => broken.push(what),
                }
            }
        }
    }
    println!("{cases} cases");
    assert!(broken.is_empty(), "{} cells:\n{}", broken.len(), broken.join("\n"));
    assert_eq!(cases, 154, "cells there should be");
}
