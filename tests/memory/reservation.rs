//! Reservations: after any operations on a memory in place, its bytes and its snapshots equal those
//! of a plain vector after the same operations.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use stillframe::error::MemoryError;
use stillframe::lazy::{Fill, Filled};
use stillframe::track::{RescanReason, TrackMethod, Tracking};
use stillframe::{CaptureOptions, Error, Reservation, SnapshotId, Store};

use crate::needs::passed_over;
use crate::noise::noise;
use crate::vault::{damage, new_store};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn capture(store: &Store, memory: &Reservation) -> stillframe::CaptureStats {
    let options = CaptureOptions::new().parent(memory.basis());
    store.process("p").capture(memory, &options).unwrap()
}

fn restored(store: &Store, id: SnapshotId) -> Vec<u8> {
    let restore = store.restore(id).unwrap();
    if restore.image_bytes() == 0 { Vec::new() } else { restore.into_mapping().unwrap().to_vec() }
}

/// Whether this machine tracks writes.
fn is_tracked(memory: &Reservation) -> bool {
    use stillframe::source::Source;
    match memory.tracker() {
        Ok(_) => true,
        Err(why) => {
            passed_over(&format!("as tracked: {why}"));
            false
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u64),
    Resize(usize),
    Capture,
    Restore(usize),
    RestoreLazily(usize),
    Instantiate(usize),
    Rollback(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..256 * KIB, 1..30 * KIB, any::<u64>()).prop_map(|(at, length, seed)| Step::Write(at, length, seed)),
        2 => (0..330 * KIB).prop_map(Step::Resize),
        1 => (0usize..5).prop_map(|pages| Step::Resize(pages * 64 * KIB)),
        4 => Just(Step::Capture),
        1 => (0usize..9).prop_map(Step::Restore),
        1 => (0usize..9).prop_map(Step::RestoreLazily),
        2 => (0usize..9).prop_map(Step::Instantiate),
        3 => (0usize..9).prop_map(Step::Rollback),
    ];
    prop::collection::vec(step, 1..40)
}

/// Run more cases with `STILLFRAME_RESERVATION_CASES`.
#[test]
fn a_memory_that_grows_shrinks_and_goes_to_and_fro_is_what_a_vector_would_be() {
    let cases = std::env::var("STILLFRAME_RESERVATION_CASES").map_or(24, |cases| cases.parse().unwrap());
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let run = |steps: Vec<Step>| {
        let (_dir, store) = new_store(4096);
        let mut memory = Reservation::new(MIB, 64 * KIB).unwrap();
        let start = memory.as_ptr();
        memory.track_writes_if_possible().unwrap();
        let mut expected: Vec<u8> = Vec::new();
        let mut moments: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
        for step in steps {
            let chosen = |nth: usize| (!moments.is_empty()).then(|| moments[nth % moments.len()].clone());
            match step {
                Step::Write(at, length, seed) => {
                    let end = (at + length).min(expected.len());
                    if at < end {
                        expected[at..end].copy_from_slice(&noise(end - at, seed));
                        memory.bytes_mut()[at..end].copy_from_slice(&expected[at..end]);
                    }
                }
                Step::Resize(length) => {
                    expected.resize(length, 0);
                    memory.set_length_bytes(length).unwrap();
                }
                Step::Capture => {
                    memory.track_writes_if_possible().unwrap();
                    moments.push((capture(&store, &memory).id, expected.clone()));
                }
                Step::Restore(nth) => {
                    let Some((id, image)) = chosen(nth) else { continue };
                    memory.restore(store.restore(id).unwrap()).unwrap();
                    expected = image;
                }
                Step::RestoreLazily(nth) => {
                    let Some((id, image)) = chosen(nth) else { continue };
                    memory.restore_lazily(store.restore(id).unwrap(), Fill::OnFault).unwrap();
                    expected = image;
                }
                Step::Instantiate(nth) => {
                    let Some((id, image)) = chosen(nth) else { continue };
                    memory.instantiate(&store.template(id).unwrap()).unwrap();
                    expected = image;
                }
                Step::Rollback(nth) => {
                    let Some((id, image)) = chosen(nth) else { continue };
                    memory.rollback(store.rollback(id).unwrap()).unwrap();
                    expected = image;
                }
            }
            assert_eq!((memory.as_ptr(), memory.length_bytes()), (start, expected.len()));
        }
        assert!(*memory.bytes_mut() == expected[..]);
        for (id, image) in moments {
            assert!(restored(&store, id) == image, "{id}");
        }
        Ok(())
    };
    runner.run(&steps(), run).unwrap();
}

#[test]
fn what_is_known_of_a_memory_goes_with_it_and_only_what_changed_is_read() {
    let (_dir, store) = new_store(4096);
    let mut memory = Reservation::new(8 * MIB, 0).unwrap();
    memory.set_length_bytes(4 * MIB).unwrap();
    memory.bytes_mut().copy_from_slice(&noise(4 * MIB, 1));
    memory.track_writes_if_possible().unwrap();
    if !is_tracked(&memory) {
        return;
    }
    let first = capture(&store, &memory).id;
    memory.bytes_mut()[5000] ^= 1;
    let second = capture(&store, &memory);
    assert_eq!((second.changed_regions, &second.tracking), (1, &Tracking::By(TrackMethod::WriteProtection)));

    // After a full restore the tracker knows from the start that the memory equals the snapshot.
    memory.restore(store.restore(first).unwrap()).unwrap();
    assert_eq!(memory.basis(), Some(first));
    memory.bytes_mut()[9000] ^= 1;
    let branch = capture(&store, &memory);
    assert_eq!((branch.parent, branch.changed_regions), (Some(first), 1));
    assert_eq!(branch.tracking, Tracking::By(TrackMethod::WriteProtection));

    // After a rollback: only regions that differ are compared and written.
    let stats = memory.rollback(store.rollback(second.id).unwrap()).unwrap();
    assert_eq!((stats.compared_regions, stats.written_regions), (2, 2));
    assert_eq!(memory.basis(), Some(second.id));

    // An instance of a template, which then grows.
    memory.instantiate(&store.template(first).unwrap()).unwrap();
    memory.set_length_bytes(5 * MIB).unwrap();
    memory.bytes_mut()[4 * MIB + 5000] = 1;
    let grown = capture(&store, &memory);
    assert_eq!((grown.parent, grown.changed_regions), (Some(first), 1));
    assert_eq!(grown.tracking, Tracking::By(TrackMethod::CopyOnWrite));
}

#[test]
fn what_is_filled_on_first_touch_is_tracked_when_it_is_filled() {
    let (_dir, store) = new_store(4096);
    let image = noise(4 * MIB, 2);
    let first = store.process("p").capture(&image, &CaptureOptions::default()).unwrap().id;
    let mut memory = Reservation::new(8 * MIB, 0).unwrap();
    let filled = memory.restore_lazily(store.restore(first).unwrap(), Fill::OnFault).unwrap();
    memory.set_length_bytes(5 * MIB).unwrap();
    if filled == Filled::Lazily {
        assert!(!memory.is_filled());
    }
    assert_eq!((memory.bytes_mut()[3 * MIB], memory.bytes_mut()[4 * MIB]), (image[3 * MIB], 0));
    memory.track_writes_if_possible().unwrap();
    assert!(memory.is_filled());
    let taken = capture(&store, &memory);
    if is_tracked(&memory) {
        assert_eq!(taken.tracking, Tracking::Rescan(RescanReason::JustBegun));
        memory.bytes_mut()[5000] ^= 1;
        let next = capture(&store, &memory);
        assert_eq!((next.changed_regions, next.tracking), (1, Tracking::By(TrackMethod::WriteProtection)));
    }
    // Dropped before the first access.
    memory.restore_lazily(store.restore(first).unwrap(), Fill::OnFault).unwrap();
}

#[test]
fn a_snapshot_for_which_not_enough_is_set_aside_is_refused_and_nothing_changes() {
    let (_dir, store) = new_store(4096);
    let id = store.process("p").capture(&noise(MIB, 3), &CaptureOptions::default()).unwrap().id;
    let mut memory = Reservation::new(512 * KIB, 0).unwrap();
    memory.set_length_bytes(64 * KIB).unwrap();
    memory.bytes_mut().fill(7);
    let template = store.template(id).unwrap();
    for refused in [
        memory.set_length_bytes(513 * KIB),
        memory.restore(store.restore(id).unwrap()),
        memory.restore_lazily(store.restore(id).unwrap(), Fill::OnFault).map(drop),
        memory.instantiate(&template),
        memory.rollback(store.rollback(id).unwrap()).map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(
            matches!(error, Error::Memory(MemoryError::Reserved { reserved_bytes: 524_288, .. })),
            "{error}"
        );
    }
    assert!(*memory.bytes_mut() == [7; 64 * KIB][..]);
}

#[test]
fn damage_leaves_a_memory_that_is_rolled_back_as_it_was_and_one_that_is_restored_empty() {
    let now = noise(512 * KIB, 6);
    for length in [256 * KIB, 768 * KIB] {
        let (dir, store) = new_store(4096);
        let image = noise(length, 4);
        let id = store.process("p").capture(&image, &CaptureOptions::default()).unwrap().id;
        damage(&dir.path().join("store"), &image[length / 2..]);
        let mut memory = Reservation::new(MIB, 0).unwrap();
        memory.set_length_bytes(now.len()).unwrap();
        memory.bytes_mut().copy_from_slice(&now);
        memory.track_writes_if_possible().unwrap();
        memory.rollback(store.rollback(id).unwrap()).unwrap_err();
        assert!(*memory.bytes_mut() == now[..]);
        memory.restore(store.restore(id).unwrap()).unwrap_err();
        assert!(memory.bytes_mut().iter().all(|byte| *byte == 0));
    }
}
