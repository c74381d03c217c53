//! Rollback in place, of memory of this process: whatever the memory contains and whichever
//! tracking is used, it becomes what a restore returns, and nothing else is written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use memmap2::MmapMut;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use stillframe::error::RollbackError;
use stillframe::rollback::RollbackStats;
use stillframe::sink::SinkError;
use stillframe::source::SourceExt;
use stillframe::store::{Check, StoreError};
use stillframe::track::{DirtyRanges, RescanReason, Tracking};
use stillframe::{
    AddressRange, CaptureOptions, CaptureStats, Error, LiveMemory, Progress, SnapshotId, Store,
};

use crate::needs::passed_over;
use crate::noise::noise;
use crate::vault::{damage, new_store};

const PAGE: usize = 4096;
/// Three tables of 512 regions of 512 bytes, and a part of a fourth; with larger regions one table
/// and a short region.
const LENGTH: usize = 3 * 512 * 512 + 5 * PAGE + 100;

fn has_write_protection() -> bool {
    let memory = MmapMut::map_anon(PAGE).unwrap();
    match LiveMemory::new(memory.as_ptr(), memory.len()).track_writes() {
        Ok(_) => true,
        Err(error) => {
            passed_over(&error.to_string());
            false
        }
    }
}

// ---- Every way, compared with a model ----------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Nothing,
    DirtyRanges,
    WriteProtection,
    /// As cells that other threads may write.
    Shared,
    SharedWriteProtection,
}

const ALL: [By; 5] =
    [By::Nothing, By::DirtyRanges, By::WriteProtection, By::Shared, By::SharedWriteProtection];

struct Subject {
    by: By,
    memory: MmapMut,
    host: DirtyRanges,
    live: LiveMemory,
}

impl Subject {
    fn new(by: By) -> Subject {
        let memory = MmapMut::map_anon(LENGTH).unwrap();
        let live = LiveMemory::new(memory.as_ptr(), LENGTH);
        let live = match by {
            By::WriteProtection | By::SharedWriteProtection => live.track_writes().unwrap(),
            _ => live,
        };
        Subject { by, memory, host: DirtyRanges::new(LENGTH as u64), live }
    }

    fn write(&mut self, range: Range<usize>, value: u8) {
        self.memory[range.clone()].fill(value);
        if self.by == By::DirtyRanges {
            self.host.mark(AddressRange::new(range.start as u64, range.end as u64).unwrap()).unwrap();
        }
    }

    fn capture(&self, store: &Store, options: &CaptureOptions) -> CaptureStats {
        let process = store.process("p");
        match self.by {
            By::Nothing => process.capture(&self.memory[..], options),
            By::DirtyRanges => process.capture(&self.memory[..].tracked_by(&self.host), options),
            _ => process.capture(&self.live, options),
        }
        .unwrap()
    }

    fn rollback(&mut self, store: &Store, id: SnapshotId) -> Result<RollbackStats, Error> {
        let rollback = store.rollback(id)?;
        match self.by {
            By::Nothing => rollback.slice(&mut self.memory),
            By::DirtyRanges => rollback.tracked_by(&self.host).slice(&mut self.memory),
            By::WriteProtection => rollback.live(&self.live, &mut self.memory),
            By::Shared | By::SharedWriteProtection => {
                rollback.live_shared(&self.live, cells(&mut self.memory))
            }
        }
    }
}

/// The same bytes, which other threads may write from here on.
fn cells(bytes: &mut [u8]) -> &[AtomicU8] {
    let length = bytes.len();
    // SAFETY: an `AtomicU8` has the size and alignment of a `u8`, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts(bytes.as_mut_ptr().cast(), length) }
}

/// How many regions differ, and how many bytes the differing pages in them have.
fn difference(one: &[u8], other: &[u8], region_bytes: usize) -> (u64, u64) {
    let (mut regions, mut bytes) = (0, 0);
    for (one, other) in one.chunks(region_bytes).zip(other.chunks(region_bytes)) {
        let pages = one.chunks(PAGE).zip(other.chunks(PAGE)).filter(|(one, other)| one != other);
        regions += u64::from(one != other);
        bytes += pages.map(|(one, _)| one.len() as u64).sum::<u64>();
    }
    (regions, bytes)
}

#[derive(Clone, Debug)]
enum Step {
    Write(Range<usize>, u8),
    Capture,
    /// To the snapshot with this number, modulo the number of snapshots.
    Rollback(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..LENGTH, prop_oneof![1..100usize, 1..300_000usize], 0..4u8)
        .prop_map(|(start, length, value)| Step::Write(start..LENGTH.min(start + length), value));
    let step = prop_oneof![4 => write, 2 => Just(Step::Capture), 2 => (0..100usize).prop_map(Step::Rollback)];
    proptest::collection::vec(step, 1..20)
}

fn play(by: By, region_bytes: u32, steps: &[Step]) {
    let (_dir, store) = new_store(region_bytes);
    let region_bytes = region_bytes as usize;
    let mut subject = Subject::new(by);
    let mut history: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
    let take = |subject: &Subject, history: &mut Vec<(SnapshotId, Vec<u8>)>, parent: Option<usize>| {
        let options = CaptureOptions::new().parent(parent.map(|parent| history[parent].0));
        let taken = subject.capture(&store, &options);
        assert_eq!(taken.parent, options.parent);
        if let Some(parent) = parent {
            let (regions, _) = difference(&history[parent].1, &subject.memory, region_bytes);
            assert_eq!(taken.changed_regions, regions);
            let is_tracked = matches!(taken.tracking, Tracking::By(_));
            assert_eq!(is_tracked, !matches!(by, By::Nothing | By::Shared), "{:?}", taken.tracking);
        }
        history.push((taken.id, subject.memory.to_vec()));
        history.len() - 1
    };
    let mut basis = take(&subject, &mut history, None);
    for step in steps {
        match step {
            Step::Write(range, value) => subject.write(range.clone(), *value),
            Step::Capture => basis = take(&subject, &mut history, Some(basis)),
            Step::Rollback(number) => {
                let number = number % history.len();
                let (id, wanted) = &history[number];
                let expected = difference(wanted, &subject.memory, region_bytes);
                let stats = subject.rollback(&store, *id).unwrap();
                assert!(subject.memory[..] == wanted[..], "it is not as it was");
                assert_eq!((stats.written_regions, stats.written_bytes), expected);
                assert!(stats.compared_regions >= stats.written_regions);
                assert_eq!(stats.bytes, LENGTH as u64);
                basis = number;
            }
        }
    }
    // The trackers know every write.
    basis = take(&subject, &mut history, Some(basis));
    for (id, image) in &history {
        assert!(store.restore(*id).unwrap().into_mapping().unwrap()[..] == image[..]);
    }
    let last = store.snapshot(history[basis].0).unwrap();
    assert_eq!(store.process("p").latest(), Some(last.id()), "time goes on whatever the parent");
}

#[test]
fn memory_becomes_what_a_restore_gives_however_it_is_known_what_changed() {
    let has_write_protection = has_write_protection();
    for by in ALL {
        if !has_write_protection && matches!(by, By::WriteProtection | By::SharedWriteProtection) {
            continue;
        }
        let config = Config { cases: 12, failure_persistence: None, ..Config::default() };
        let strategy = (prop_oneof![Just(512), Just(4096), Just(16_384), Just(65_536)], steps());
        TestRunner::new(config)
            .run(&strategy, |(region_bytes, steps)| {
                play(by, region_bytes, &steps);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{by:?}: {error}"));
    }
}

#[test]
fn with_a_tracker_only_what_changed_or_differs_between_the_two_snapshots_is_looked_at() {
    let (_dir, store) = new_store(4096);
    let mut subject = Subject::new(By::DirtyRanges);
    subject.memory.copy_from_slice(&noise(LENGTH, 1));
    let first = subject.capture(&store, &CaptureOptions::default()).id;
    subject.write(0..PAGE, 1);
    let second = subject.capture(&store, &CaptureOptions::default()).id;
    subject.write(9 * PAGE..11 * PAGE, 2);
    // The regions in which the two snapshots differ, and those that were marked since.
    let stats = subject.rollback(&store, first).unwrap();
    assert_eq!((stats.compared_regions, stats.written_regions), (3, 3));
    assert_eq!(stats.tracking.to_string(), "host-ranges");
    // From one snapshot to the other.
    let stats = subject.rollback(&store, second).unwrap();
    assert_eq!((stats.compared_regions, stats.written_regions), (1, 1));
    let stats = subject.rollback(&store, second).unwrap();
    assert_eq!((stats.compared_regions, stats.written_regions), (0, 0));

    // A tracker that has no snapshot yet, one whose snapshot is gone, and none.
    let host = DirtyRanges::new(LENGTH as u64);
    let untracked = |stats: RollbackStats| match stats.tracking {
        Tracking::Rescan(why) => why,
        by => panic!("by {by}"),
    };
    let stats = store.rollback(first).unwrap().tracked_by(&host).slice(&mut subject.memory).unwrap();
    assert_eq!((untracked(stats.clone()), stats.written_regions), (RescanReason::NoParent, 1));
    store.forget(&[first]).unwrap();
    let stats = store.rollback(second).unwrap().tracked_by(&host).slice(&mut subject.memory).unwrap();
    assert_eq!((untracked(stats.clone()), stats.written_regions), (RescanReason::ParentUnusable, 1));
    let stats = store.rollback(second).unwrap().slice(&mut subject.memory).unwrap();
    assert_eq!((untracked(stats.clone()), stats.written_regions), (RescanReason::NoTracker, 0));
    assert_eq!(stats.compared_regions, LENGTH.div_ceil(PAGE) as u64);
}

#[test]
fn what_a_rollback_writes_itself_is_not_looked_at_again_where_nobody_else_can_have_written() {
    if !has_write_protection() {
        return;
    }
    let (_dir, store) = new_store(4096);
    for (by, compared_again) in [(By::WriteProtection, 0), (By::SharedWriteProtection, 2)] {
        let mut subject = Subject::new(by);
        let id = subject.capture(&store, &CaptureOptions::default()).id;
        subject.write(9 * PAGE..11 * PAGE, 2);
        let stats = subject.rollback(&store, id).unwrap();
        assert_eq!((stats.compared_regions, stats.written_regions), (2, 2), "{by:?}");
        let stats = subject.rollback(&store, id).unwrap();
        assert_eq!((stats.compared_regions, stats.written_regions), (compared_again, 0), "{by:?}");
    }
}

#[test]
fn memory_that_cannot_be_written_is_an_error() {
    let (_dir, store) = new_store(4096);
    let mut memory = MmapMut::map_anon(10 * PAGE).unwrap();
    let id = store.process("p").capture(&memory[..], &CaptureOptions::default()).unwrap().id;
    memory[5000] = 1;
    let memory = memory.make_read_only().unwrap();
    let live = LiveMemory::new(memory.as_ptr(), memory.len());
    // SAFETY: the bytes live long enough, are only read, and are not written: the call under test
    // refuses.
    let cells: &[AtomicU8] = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), memory.len()) };
    let error = store.rollback(id).unwrap().live_shared(&live, cells).unwrap_err();
    assert!(matches!(error, Error::Sink(SinkError::Memory { .. })), "{error}");
}

#[test]
fn the_owner_of_live_memory_stands_still_meanwhile() {
    let (_dir, store) = new_store(4096);
    let mut memory = vec![1u8; 10 * PAGE];
    let calls = Arc::new(AtomicU32::new(0));
    let (stop, go) = (Arc::clone(&calls), Arc::clone(&calls));
    let live = LiveMemory::new(memory.as_ptr(), memory.len()).stop_with(
        move || assert_eq!(stop.fetch_add(1, Ordering::Relaxed) % 2, 0),
        move || assert_eq!(go.fetch_add(1, Ordering::Relaxed) % 2, 1),
    );
    let id = store.process("p").capture(&live, &CaptureOptions::default()).unwrap().id;
    memory[5000] = 9;
    let stats = store.rollback(id).unwrap().live_shared(&live, cells(&mut memory)).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 4);
    assert!(!stats.paused.is_zero() && stats.paused <= stats.elapsed);
    assert_eq!(memory, vec![1; 10 * PAGE]);
}

#[test]
fn what_was_excluded_becomes_zeros_as_in_a_restore() {
    let (_dir, store) = new_store(4096);
    let mut memory = noise(LENGTH, 3);
    let host = DirtyRanges::new(LENGTH as u64);
    let exclude = vec![AddressRange::new(5000, 15_000).unwrap()];
    let options = CaptureOptions::new().exclude(exclude);
    let id = store.process("p").capture(&memory.tracked_by(&host), &options).unwrap().id;
    let wanted = store.restore(id).unwrap().into_mapping().unwrap();
    // The tracker does not know these writes, but the rollback compares the regions anyway.
    store.rollback(id).unwrap().tracked_by(&host).slice(&mut memory).unwrap();
    assert!(memory[..] == wanted[..] && memory[5000..15_000] == [0; 10_000]);
}

// ---- Refusals -----------------------------------------------------------------------------------

#[test]
fn damage_leaves_the_memory_as_it_was_and_the_tracker_knows_what_it_knew() {
    let has_write_protection = has_write_protection();
    for by in ALL {
        if !has_write_protection && matches!(by, By::WriteProtection | By::SharedWriteProtection) {
            continue;
        }
        let (dir, store) = new_store(4096);
        let mut subject = Subject::new(by);
        let image = noise(LENGTH, 5);
        subject.memory.copy_from_slice(&image);
        let first = subject.capture(&store, &CaptureOptions::default()).id;
        for page in [2, 30, 90] {
            subject.write(page * PAGE..(page + 1) * PAGE, 7);
        }
        let second = subject.capture(&store, &CaptureOptions::default()).id;
        subject.write(40 * PAGE..41 * PAGE, 8);
        damage(&dir.path().join("store"), &image[30 * PAGE..]);

        let before = subject.memory.to_vec();
        let error = subject.rollback(&store, first).unwrap_err();
        let is_damage = matches!(&error, Error::Store(error) if error.is_damage());
        assert!(is_damage, "{by:?}: {error:?}");
        assert!(subject.memory[..] == before[..], "{by:?}: it was written");
        let third = subject.capture(&store, &CaptureOptions::default());
        assert_eq!((third.parent, third.changed_regions), (Some(second), 1), "{by:?}");
        assert!(store.restore(third.id).unwrap().into_mapping().unwrap()[..] == before[..]);
    }
}

#[test]
fn a_rollback_that_is_cancelled_has_written_nothing() {
    let (_dir, store) = new_store(4096);
    let mut memory = noise(LENGTH, 6);
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    memory[..100_000].fill(1);
    let before = memory.clone();
    for cancel_at in [0, 1] {
        let cancel = Arc::new(AtomicBool::new(cancel_at == 0));
        let flag = Arc::clone(&cancel);
        let progress =
            Progress::new().on_advance(move |_, _| flag.store(true, Ordering::Relaxed)).cancel_when(cancel);
        let error = store.rollback(id).unwrap().progress(progress).slice(&mut memory).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error:?}");
        assert!(memory == before);
    }
}

#[test]
fn memory_of_another_length_or_place_is_refused() {
    let (_dir, store) = new_store(4096);
    let mut memory = noise(LENGTH, 7);
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    let before = memory.clone();
    let error = store.rollback(id).unwrap().slice(&mut memory[1..]).unwrap_err();
    assert!(matches!(error, Error::Sink(SinkError::Length { .. })), "{error}");
    let live = LiveMemory::new(memory.as_ptr(), LENGTH - 1);
    let error = store.rollback(id).unwrap().live(&live, &mut memory).unwrap_err();
    assert!(matches!(error, Error::Rollback(RollbackError::OtherMemory { .. })), "{error}");
    let error = store.rollback(id).unwrap().live_shared(&live, cells(&mut memory)).unwrap_err();
    assert!(matches!(error, Error::Rollback(RollbackError::OtherMemory { .. })), "{error}");
    let host = DirtyRanges::new(5);
    assert!(store.rollback(id).unwrap().tracked_by(&host).slice(&mut memory).is_err());
    assert!(memory == before);
    store.forget(&[id]).unwrap();
    let error = store.rollback(id).unwrap_err();
    assert!(matches!(error, Error::Store(StoreError::NoSuchSnapshot { .. })), "{error}");
}

#[test]
fn a_parent_that_is_not_there_is_told() {
    let (_dir, store) = new_store(4096);
    let memory = vec![1; 10_000];
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    // A parent in another process is allowed.
    let options = CaptureOptions::new().parent(id);
    let child = store.process("q").capture(&memory, &options).unwrap();
    assert_eq!((child.parent, child.changed_regions), (Some(id), 0));
    store.forget(&[id]).unwrap();
    let error = store.process("q").capture(&memory, &options).unwrap_err();
    assert!(matches!(error, Error::Store(StoreError::NoSuchSnapshot { .. })), "{error}");
    assert!(store.process("q").snapshots().iter().map(|snapshot| snapshot.id()).eq([child.id]));
}

#[test]
fn more_than_is_kept_decoded_is_decoded_twice() {
    let (_dir, store) = new_store(65_536);
    // Each page is different, so nothing is shared, and compresses well.
    let length = 140 << 20;
    let fill = |memory: &mut [u8], salt: u64| {
        for (number, page) in memory.chunks_mut(PAGE).enumerate() {
            page[..8].copy_from_slice(&(number as u64 + salt).to_le_bytes());
        }
    };
    let mut memory = MmapMut::map_anon(length).unwrap();
    fill(&mut memory, 1);
    let id = store.process("p").capture(&memory[..], &CaptureOptions::default()).unwrap().id;
    fill(&mut memory, 1 << 40);
    let stats = store.rollback(id).unwrap().check(Check::Checksum).slice(&mut memory).unwrap();
    assert_eq!(stats.written_bytes, length as u64);
    let is_back = memory.chunks(PAGE).zip(1u64..).all(|(page, number)| page[..8] == number.to_le_bytes());
    assert!(is_back);
}
