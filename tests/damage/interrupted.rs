//! `verify` and `repair` are cancelled at every point at which they check, repeatedly.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stillframe::repair::RepairOptions;
use stillframe::store::ObjectKind;
use stillframe::verify::VerifyOptions;
use stillframe::{Error, Progress, Store};

use crate::archive::{Archive, memory, read};
use crate::vault::{change, verify};

/// Cancels after this many calls.
fn cancels_after(calls: u64) -> Progress {
    let (flag, count) = (Arc::new(AtomicBool::new(calls == 0)), AtomicU64::new(0));
    let cancel = flag.clone();
    let progress = Progress::new().on_advance(move |done_bytes, total_bytes| {
        assert!(done_bytes <= total_bytes);
        if count.fetch_add(1, Ordering::Relaxed) + 1 >= calls {
            cancel.store(true, Ordering::Relaxed);
        }
    });
    progress.cancel_when(flag)
}

/// Damage of every kind: an object in each pack, a header, and a record that only the index knows.
fn damaged() -> (Archive, Vec<&'static str>) {
    let archive = Archive::copy();
    let (region, record) = (archive.middle_of_a_chain(), archive.object(ObjectKind::Record));
    let lost = archive.cannot_do_without(std::slice::from_ref(&region));
    for object in [region, record] {
        change(&archive.pack(object.pack), |bytes| bytes[object.payload_end - 1] ^= 1);
    }
    (archive, lost.into_iter().collect())
}

fn names(archive: &Archive, ids: &[stillframe::SnapshotId]) -> Vec<&'static str> {
    let mut names: Vec<_> = ids.iter().map(|id| archive.name(*id)).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_repair_that_is_cancelled_anywhere_has_done_no_harm_and_a_second_one_completes_it() {
    let mut points = 0;
    for calls in 0.. {
        let (archive, lost) = damaged();
        let options = RepairOptions::new().progress(cancels_after(calls));
        let is_done = match Store::repair(&archive.path, &options) {
            Err(Error::Interrupted) => false,
            other => other.map(|_| true).unwrap(),
        };
        if calls % 2 == 1 {
            // The store is used in between.
            let store = Store::open(&archive.path).unwrap();
            for (name, id) in archive.ids.iter().filter(|(name, _)| **name != "gone") {
                match read(&store, *id) {
                    Ok(found) => assert!(found == memory(name) && !lost.contains(name)),
                    Err(error) => assert!(lost.contains(name), "{name} after {calls} calls: {error}"),
                }
            }
        }
        let report = Store::repair(&archive.path, &RepairOptions::default()).unwrap();
        assert_eq!(names(&archive, &report.lost_snapshots), lost, "after {calls} calls");
        let store = Store::open(&archive.path).unwrap();
        assert!(store.snapshot(archive.ids["gone"]).is_err());
        let problems = verify(&store).problems;
        assert!(problems.iter().all(|problem| !problem.snapshots.is_empty()), "{problems:?}");
        let ids: BTreeSet<_> = problems.into_iter().flat_map(|problem| problem.snapshots).collect();
        assert_eq!(names(&archive, &ids.into_iter().collect::<Vec<_>>()), lost, "and nothing else");
        if is_done {
            break;
        }
        points += 1;
    }
    println!("cancelled at {points} points");
    assert!(points > 8, "{points}");
}

#[test]
fn a_verify_that_is_cancelled_anywhere_has_done_no_harm() {
    let (archive, lost) = damaged();
    let store = Store::open(&archive.path).unwrap();
    for sample_percent in [None, Some(50)] {
        let mut points = 0;
        for calls in 0.. {
            let options = VerifyOptions::new().progress(cancels_after(calls)).sample_percent(sample_percent);
            match store.verify(&options) {
                Err(Error::Interrupted) => points += 1,
                other => {
                    other.unwrap();
                    break;
                }
            }
            for (name, id) in archive.ids.iter().filter(|(name, _)| **name != "gone") {
                assert_eq!(read(&store, *id).is_ok(), !lost.contains(name), "{name} after {calls} calls");
            }
        }
        println!("cancelled at {points} points");
        assert!(points > 3, "{points}");
    }
}

#[test]
fn verify_tells_how_far_it_is_to_the_end() {
    let archive = Archive::copy();
    let store = Store::open(&archive.path).unwrap();
    let (last, calls) = (Arc::new((AtomicU64::new(0), AtomicU64::new(0))), Arc::new(AtomicU64::new(0)));
    let (told, count) = (last.clone(), calls.clone());
    let progress = Progress::new().on_advance(move |done_bytes, total_bytes| {
        told.0.store(done_bytes, Ordering::Relaxed);
        told.1.store(total_bytes, Ordering::Relaxed);
        count.fetch_add(1, Ordering::Relaxed);
    });
    store.verify(&VerifyOptions::new().progress(progress)).unwrap();
    assert_eq!(
        last.0.load(Ordering::Relaxed),
        last.1.load(Ordering::Relaxed),
        "all of it is done in the end"
    );
    // The two packs, and the tables of nine snapshots.
    assert!(calls.load(Ordering::Relaxed) >= 11);
}
