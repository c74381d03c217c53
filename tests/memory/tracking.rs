//! Tracking: with every tracking method the snapshots are equal to full captures, byte for byte,
//! and no write is missed.
//!
//! One conformance suite runs for every method. The suite compares the tracked capture with a full
//! capture of the same bytes into another store. Roots are hashes of the contents, so a difference
//! means that a change was missed.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::needs::passed_over;
use memmap2::{Advice, MmapMut, UncheckedAdvice};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use stillframe::source::{Attachment, LiveProcessSource, Source, SourceError, SourceExt};
use stillframe::store::StoreError;
use stillframe::track::{DirtyRanges, RescanReason, TrackError, TrackMethod, Tracking};
use stillframe::{
    AddressRange, CaptureOptions, CaptureStats, Error, LiveMemory, RegionSize, SnapshotId, Store,
};

const MIB: usize = 1 << 20;
/// The greatest length of the memory. It is not a multiple of the largest region.
const RESERVED_BYTES: usize = 5 * MIB + 3 * 4096;

fn page_bytes() -> usize {
    rustix::param::page_size()
}

fn new_store(region_bytes: u32) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let size = RegionSize::new(region_bytes).unwrap();
    let store = Store::options().region_size(size).create(dir.path().join("store")).unwrap();
    (dir, store)
}

fn range(range: Range<usize>) -> AddressRange {
    AddressRange::new(range.start as u64, range.end as u64).unwrap()
}

/// Bytes in which no two regions are equal.
fn scattered(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251 + at / 4096).to_le_bytes()[0]).collect()
}

/// Whether this machine has write protection. Without it these tests have nothing to test; other
/// tests check that the reason is reported.
fn has_write_protection() -> bool {
    let memory = MmapMut::map_anon(page_bytes()).unwrap();
    match LiveMemory::new(memory.as_ptr(), memory.len()).track_writes() {
        Ok(_) => true,
        Err(error) => {
            passed_over(&error.to_string());
            false
        }
    }
}

// ---- The conformance suite ----------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    DirtyRanges,
    HostBitmap,
    WriteProtection,
    WriteProtectionOfHugePages,
    Rescan,
}

/// A memory in a reservation, and its tracker.
struct Subject {
    by: By,
    memory: MmapMut,
    /// The offset of the memory in the mapping: a page boundary, and in some cases a boundary of
    /// huge pages.
    offset: usize,
    length: usize,
    /// The expected contents. The memory itself is not read before a capture, because a read of a
    /// discarded page makes the page present.
    model: Vec<u8>,
    live: LiveMemory,
    host: DirtyRanges,
    bitmap: Vec<usize>,
}

impl Subject {
    fn new(by: By, length: usize) -> Subject {
        let memory = MmapMut::map_anon(RESERVED_BYTES + 2 * MIB).unwrap();
        let huge = by == By::WriteProtectionOfHugePages;
        memory.advise(if huge { Advice::HugePage } else { Advice::NoHugePage }).unwrap();
        let offset = memory.as_ptr().align_offset(2 * MIB);
        let live = LiveMemory::new(memory[offset..].as_ptr(), length);
        let live = match by {
            By::WriteProtection | By::WriteProtectionOfHugePages => live.track_writes().unwrap(),
            _ => live,
        };
        Subject {
            by,
            memory,
            offset,
            length,
            model: vec![0; RESERVED_BYTES],
            live,
            host: DirtyRanges::new(length as u64),
            bitmap: Vec::new(),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.offset..][..self.length]
    }

    fn touch(&mut self, touched: Range<usize>) {
        match self.by {
            By::DirtyRanges => self.host.mark(range(touched)).unwrap(),
            By::HostBitmap => self.bitmap.extend(touched.start / 4096..touched.end.div_ceil(4096)),
            _ => {}
        }
    }

    fn apply(&mut self, step: &Step) {
        let clip = |at: usize, count: usize, length: usize| {
            let start = at % length;
            start..(start + count).min(length)
        };
        match *step {
            Step::Write { at, count, byte } => {
                let written = clip(at, count, self.length);
                self.bytes()[written.clone()].fill(byte);
                self.model[written.clone()].fill(byte);
                self.touch(written);
            }
            Step::WriteTheSame { at } => {
                let at = at % self.length;
                let byte = &mut self.bytes()[at];
                *byte = std::hint::black_box(*byte);
                self.touch(at..at + 1);
            }
            Step::ReadFromFile { at, count } => {
                let file = std::fs::File::open("/proc/self/exe").unwrap();
                let written = clip(at, count, self.length);
                file.read_exact_at(&mut self.bytes()[written.clone()], 4096).unwrap();
                file.read_exact_at(&mut self.model[written.clone()], 4096).unwrap();
                self.touch(written);
            }
            Step::ThrowAway { at, count } => {
                let page = page_bytes();
                let first = at % self.length / page;
                let last = (first + count).min(self.length.div_ceil(page));
                let thrown = first * page..(last * page).min(self.length);
                // SAFETY: the memory is private and anonymous: its pages become zeros.
                unsafe {
                    let start = self.offset + thrown.start;
                    self.memory.unchecked_advise_range(
                        UncheckedAdvice::DontNeed,
                        start,
                        (last - first) * page,
                    )
                }
                .unwrap();
                self.model[thrown.clone()].fill(0);
                self.touch(thrown);
            }
            Step::PageOut { at, count } => {
                let thrown = clip(at, count, self.length);
                // Without swap this has no effect; with swap the pages are moved to swap and back.
                // SAFETY: only the place of the pages changes, not their contents.
                let _ = unsafe {
                    let start = self.memory[self.offset..].as_mut_ptr().add(thrown.start / 4096 * 4096);
                    libc::madvise(start.cast(), thrown.len(), libc::MADV_PAGEOUT)
                };
            }
            Step::Grow { by } => {
                let before = self.length;
                self.length = (before + by).min(RESERVED_BYTES);
                self.live.set_length_bytes(self.length).unwrap();
                self.host.set_memory_bytes(self.length as u64);
            }
            Step::Capture | Step::StartCapture | Step::FailingCapture => unreachable!(),
        }
    }

    fn capture(&mut self, store: &Store, step: &Step) -> Result<CaptureStats, Error> {
        if self.by == By::HostBitmap {
            let mut words = vec![0; self.length.div_ceil(4096).div_ceil(64)];
            self.bitmap.drain(..).for_each(|page| words[page / 64] |= 1 << (page % 64));
            self.host.mark_bitmap(4096, &words).unwrap();
        }
        let bytes = self.model[..self.length].to_vec();
        let source: Box<dyn Source + '_> = match self.by {
            By::DirtyRanges | By::HostBitmap => Box::new(bytes.tracked_by(&self.host)),
            _ => Box::new(&self.live),
        };
        let mut options = CaptureOptions::new().staging_bytes(3 * MIB);
        let process = store.process("tracked");
        match step {
            Step::StartCapture => {
                let pending = process.start_capture(&*source, &options)?;
                drop(source);
                // The snapshot must not contain the following writes.
                let scribbled = 0..self.length.min(100_000);
                self.bytes()[scribbled.clone()].fill(0xEE);
                let captured = pending.wait();
                self.model[scribbled.clone()].fill(0xEE);
                self.touch(scribbled);
                captured
            }
            Step::FailingCapture => {
                // This error is found only after everything has been read.
                let attachment = Attachment { name: "twice".to_owned(), bytes: vec![1] };
                options.attachments = vec![attachment.clone(), attachment];
                process.capture(&*source, &options)
            }
            _ => process.capture(&*source, &options),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: usize, count: usize, byte: u8 },
    WriteTheSame { at: usize },
    ReadFromFile { at: usize, count: usize },
    ThrowAway { at: usize, count: usize },
    PageOut { at: usize, count: usize },
    Grow { by: usize },
    Capture,
    StartCapture,
    FailingCapture,
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..RESERVED_BYTES;
    prop_oneof![
        6 => (at.clone(), prop_oneof![Just(1usize), 1usize..9000, Just(MIB)], any::<u8>())
            .prop_map(|(at, count, byte)| Step::Write { at, count, byte }),
        // Regions that become zeros.
        3 => (at.clone(), prop_oneof![Just(4096usize), 1usize..200_000])
            .prop_map(|(at, count)| Step::Write { at, count, byte: 0 }),
        1 => at.clone().prop_map(|at| Step::WriteTheSame { at }),
        1 => (at.clone(), 1usize..9000).prop_map(|(at, count)| Step::ReadFromFile { at, count }),
        3 => (at.clone(), prop_oneof![1usize..4, Just(512usize), Just(1024usize)])
            .prop_map(|(at, count)| Step::ThrowAway { at, count }),
        1 => (at, 4096usize..MIB).prop_map(|(at, count)| Step::PageOut { at, count }),
        1 => prop_oneof![1usize..5000, Just(64 * 1024), Just(2 * MIB)].prop_map(|by| Step::Grow { by }),
        4 => Just(Step::Capture),
        2 => Just(Step::StartCapture),
        1 => Just(Step::FailingCapture),
    ]
}

/// Takes the snapshots of a history with one method, takes full captures of the same bytes, and
/// compares them.
fn conforms(by: By, region_bytes: u32, length: usize, steps: &[Step]) -> Result<(), TestCaseError> {
    let (_dir, store) = new_store(region_bytes);
    let (_full_dir, full_store) = new_store(region_bytes);
    let mut subject = Subject::new(by, length);
    let mut last: Option<SnapshotId> = None;
    for step in steps.iter().chain(&[Step::Capture]) {
        match step {
            Step::Capture | Step::StartCapture => {}
            Step::FailingCapture => {
                let failed = subject.capture(&store, step);
                let expected = matches!(&failed, Err(Error::Store(StoreError::AttachmentTwice { .. })));
                prop_assert!(expected, "{:?}", failed);
                continue;
            }
            step => {
                subject.apply(step);
                continue;
            }
        }
        let expected_bytes = subject.model[..subject.length].to_vec();
        let taken = subject.capture(&store, step).unwrap();
        let expected =
            full_store.process("full").capture(&expected_bytes, &CaptureOptions::default()).unwrap();
        let record = |store: &Store, id| store.snapshot(id).unwrap().record().clone();
        let (found, wanted) = (record(&store, taken.id), record(&full_store, expected.id));
        if found.root != wanted.root {
            let image = store.restore(taken.id).unwrap().into_mapping().unwrap();
            let at = image.iter().zip(&expected_bytes).position(|(one, other)| one != other);
            return Err(TestCaseError::fail(format!("{by:?} missed byte {at:?}, {:?}", taken.tracking)));
        }
        prop_assert_eq!(found.layout, wanted.layout);
        prop_assert_eq!(found.zero_bytes, wanted.zero_bytes);
        prop_assert_eq!(found.regions, wanted.regions);
        prop_assert_eq!(taken.changed_regions, expected.changed_regions);
        let tracking = match by {
            By::Rescan => Tracking::Rescan(RescanReason::NoTracker),
            _ if last.is_none() => Tracking::Rescan(RescanReason::NoParent),
            By::DirtyRanges | By::HostBitmap => Tracking::By(TrackMethod::DirtyRanges),
            _ => Tracking::By(TrackMethod::WriteProtection),
        };
        prop_assert_eq!(taken.tracking, tracking);
        last = Some(taken.id);
    }
    let image = store.restore(last.unwrap()).unwrap().into_mapping().unwrap();
    prop_assert!(image[..] == subject.bytes()[..]);
    prop_assert!(image[..] == subject.model[..subject.length]);
    Ok(())
}

fn conforms_always(by: By) {
    let cases = std::env::var("STILLFRAME_TRACKING_CASES").map_or(12, |cases| cases.parse().unwrap());
    let mut runner = TestRunner::new(Config { cases, max_shrink_iters: 200, ..Config::default() });
    let lengths = prop_oneof![Just(4096usize), Just(2 * MIB), 1usize..3 * MIB];
    let regions = prop_oneof![Just(512u32), Just(4096), Just(16_384), Just(65_536)];
    let histories = (regions, lengths, proptest::collection::vec(step(), 1..40));
    runner
        .run(&histories, |(region_bytes, length, steps)| conforms(by, region_bytes, length, &steps))
        .unwrap();
}

#[test]
fn rescan_conforms() {
    conforms_always(By::Rescan);
}

#[test]
fn host_ranges_conform() {
    conforms_always(By::DirtyRanges);
}

#[test]
fn host_bitmaps_conform() {
    conforms_always(By::HostBitmap);
}

#[test]
fn write_protection_conforms() {
    if has_write_protection() {
        conforms_always(By::WriteProtection);
    }
}

#[test]
fn write_protection_of_huge_pages_conforms() {
    if has_write_protection() {
        conforms_always(By::WriteProtectionOfHugePages);
    }
}

// ---- No write is missed -------------------------------------------------------------------------

/// Memory as numbers that several threads write; each page has `cells_per_page` of them.
struct Cells {
    memory: MmapMut,
}

const CELL_BYTES: usize = 1024;
const WORDS_PER_CELL: usize = CELL_BYTES / 8;

impl Cells {
    fn new(bytes: usize, huge: bool) -> Cells {
        let memory = MmapMut::map_anon(bytes).unwrap();
        memory.advise(if huge { Advice::HugePage } else { Advice::NoHugePage }).unwrap();
        Cells { memory }
    }

    fn all(&self) -> &[[AtomicU64; WORDS_PER_CELL]] {
        // SAFETY: the mapping has this length, lives as long as `self`, begins at a page, and is
        // read and written through these atomics only.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() / CELL_BYTES) }
    }

    fn load(&self) -> Vec<u64> {
        self.all().iter().map(|cell| cell[0].load(Ordering::SeqCst)).collect()
    }
}

fn numbers(store: &Store, id: SnapshotId) -> Vec<u64> {
    let image = store.restore(id).unwrap().into_mapping().unwrap();
    image.chunks(CELL_BYTES).map(|cell| u64::from_ne_bytes(*cell.first_chunk().unwrap())).collect()
}

/// Increments cells at random, each cell by one thread.
fn write_until(
    stop: &AtomicBool,
    cells: &[[AtomicU64; WORDS_PER_CELL]],
    (writer, writers): (usize, usize),
    guard: impl Fn(usize, &dyn Fn()),
) {
    let mut random = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(writer as u64 + 1);
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = usize::try_from(random >> 16).unwrap() % cells.len() / writers * writers + writer;
        if let Some(cell) = cells.get(at) {
            guard(at, &|| {
                cell[0].fetch_add(1, Ordering::SeqCst);
            });
        }
    }
}

/// In every round each page is written once, in any order. The capture scans when the writers are
/// half way. So half of the pages are still protected then, and many pages are written during the
/// scan.
fn race_without_stopping(huge: bool) {
    const WRITERS: usize = 3;
    const ROUNDS: usize = 16;
    if !has_write_protection() {
        return;
    }
    let (_dir, store) = new_store(16_384);
    let cells = Arc::new(Cells::new(48 * MIB, huge));
    let cells_per_page = page_bytes() / CELL_BYTES;
    // The pages of each writer.
    let pages = cells.all().len() / cells_per_page / WRITERS;
    let (round_begun, writes) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let low = Arc::new(Mutex::new(Vec::new()));
    let just_before = {
        let (round_begun, writes, low, cells) =
            (round_begun.clone(), writes.clone(), low.clone(), cells.clone());
        move || {
            let round = round_begun.fetch_add(1, Ordering::Release) + 1;
            let enough = (round - 1) * pages * WRITERS + pages * WRITERS / 2;
            while writes.load(Ordering::Relaxed) < enough {
                std::thread::yield_now();
            }
            *low.lock().unwrap() = cells.load();
        }
    };
    let memory = LiveMemory::new(cells.memory.as_ptr(), cells.memory.len());
    let memory = memory.track_writes().unwrap().stop_with(just_before, || ());
    let process = store.process("racing");
    let mut failure = None;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (round_begun, writes, cells) = (&round_begun, &writes, cells.all());
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    while round_begun.load(Ordering::Acquire) < round {
                        std::thread::yield_now();
                    }
                    for at in 0..pages {
                        // A page that is written during the scan is written late in the next round.
                        // If that write were lost, the next snapshot would lack it.
                        let at = (at + pages - round * 2 * pages / 5 % pages) % pages;
                        // 7919 is a prime that does not divide the number of pages.
                        let page = at * 7919 % pages * WRITERS + writer;
                        cells[page * cells_per_page][0].fetch_add(1, Ordering::SeqCst);
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for round in 1..=ROUNDS {
            let options = CaptureOptions::default();
            let taken = match round % 2 {
                0 => process.capture(&memory, &options).unwrap(),
                _ => process.start_capture(&memory, &options).unwrap().wait().unwrap(),
            };
            let high = cells.load();
            assert_eq!(matches!(taken.tracking, Tracking::By(TrackMethod::WriteProtection)), round > 1);
            let (captured, low) = (numbers(&store, taken.id), low.lock().unwrap());
            if let Some(at) = (0..captured.len()).find(|at| !(low[*at]..=high[*at]).contains(&captured[*at]))
            {
                let (captured, low, high) = (captured[at], low[at], high[at]);
                // A panic here would leave the writers waiting.
                failure.get_or_insert(format!(
                    "round {round}, cell {at}: captured {captured}, it went from {low} to {high}"
                ));
            }
            while writes.load(Ordering::Relaxed) < round * pages * WRITERS {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(failure, None);
    // The last values are in the next snapshot. Nobody writes any more.
    writes.store(usize::MAX / 2, Ordering::Relaxed);
    let last = process.capture(&memory, &CaptureOptions::default()).unwrap();
    assert!(numbers(&store, last.id) == cells.load());
}

#[test]
fn every_write_is_in_this_snapshot_or_in_the_next() {
    race_without_stopping(false);
}

#[test]
fn every_write_to_huge_pages_is_in_this_snapshot_or_in_the_next() {
    race_without_stopping(true);
}

/// The writers pause while a capture scans and copies, and continue while it is finished. Each
/// snapshot is exactly what the memory was in the pause.
#[test]
fn a_snapshot_is_what_the_memory_was_when_the_writers_stood_still() {
    for by in [By::DirtyRanges, By::WriteProtection, By::Rescan] {
        if by == By::WriteProtection && !has_write_protection() {
            continue;
        }
        let (_dir, store) = new_store(4096);
        let cells = Cells::new(3 * MIB, false);
        let memory = LiveMemory::new(cells.memory.as_ptr(), cells.memory.len());
        let memory = if by == By::WriteProtection { memory.track_writes().unwrap() } else { memory };
        let host = DirtyRanges::new(cells.memory.len() as u64);
        let stop = AtomicBool::new(false);
        let stand_still = RwLock::new(());
        std::thread::scope(|scope| {
            for writer in 0..2 {
                let (stop, cells, host, stand_still) = (&stop, cells.all(), &host, &stand_still);
                scope.spawn(move || {
                    write_until(stop, cells, (writer, 2), |at, write| {
                        let _going = stand_still.read().unwrap();
                        write();
                        if by == By::DirtyRanges {
                            host.mark(range(at * CELL_BYTES..(at + 1) * CELL_BYTES)).unwrap();
                        }
                    });
                });
            }
            for round in 0..12 {
                let options = CaptureOptions::default();
                let (pending, expected) = {
                    let _standing = stand_still.write().unwrap();
                    let process = store.process("stopped");
                    let pending = match by {
                        By::DirtyRanges => process.start_capture(&memory.tracked_by(&host), &options),
                        _ => process.start_capture(&memory, &options),
                    };
                    (pending.unwrap(), cells.load())
                };
                let taken = pending.wait().unwrap();
                assert_eq!(matches!(taken.tracking, Tracking::By(_)), by != By::Rescan && round > 0);
                if numbers(&store, taken.id) != expected {
                    stop.store(true, Ordering::Relaxed);
                    panic!("{by:?}: snapshot {round} is not what the memory was");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

// ---- Fall-backs ---------------------------------------------------------------------------------

fn tracked_memory(bytes: usize) -> Option<(MmapMut, LiveMemory)> {
    let memory = MmapMut::map_anon(bytes).unwrap();
    let live = LiveMemory::new(memory.as_ptr(), memory.len());
    has_write_protection().then(|| (memory, live.track_writes().unwrap()))
}

#[test]
fn knowledge_that_refers_to_another_snapshot_is_not_used() {
    let (_dir, store) = new_store(4096);
    let mut bytes = vec![1; MIB];
    let host = DirtyRanges::new(bytes.len() as u64);
    let options = CaptureOptions::default();
    let process = store.process("p");
    let first = process.capture(&bytes.tracked_by(&host), &options).unwrap();
    assert_eq!(first.tracking, Tracking::Rescan(RescanReason::NoParent));

    // Another capture in between without the tracker: a change that was not marked must not be
    // missed.
    bytes[5000] = 2;
    process.capture(&bytes, &options).unwrap();
    bytes[9000] = 3;
    let third = process.capture(&bytes.tracked_by(&host), &options).unwrap();
    assert_eq!(third.tracking, Tracking::Rescan(RescanReason::OtherParent));
    assert_eq!(third.changed_regions, 1);

    // The knowledge of the tracker is of no use for another process. A new tracker may continue
    // from it.
    let other = store.process("q").capture(&bytes.tracked_by(&host), &options).unwrap();
    assert_eq!(other.tracking, Tracking::Rescan(RescanReason::NoParent));
    let handed_over = DirtyRanges::since(third.id, bytes.len() as u64);
    bytes[1] = 4;
    handed_over.mark(range(1..2)).unwrap();
    let fourth = process.capture(&bytes.tracked_by(&handed_over), &options).unwrap();
    assert_eq!(fourth.tracking, Tracking::By(TrackMethod::DirtyRanges));
    assert!(store.restore(fourth.id).unwrap().into_mapping().unwrap()[..] == bytes[..]);

    // With other exclusions the bytes differ.
    let excluding = CaptureOptions::new().exclude([range(100..200)]);
    let fifth = process.capture(&bytes.tracked_by(&handed_over), &excluding).unwrap();
    assert_eq!(fifth.tracking, Tracking::Rescan(RescanReason::OtherLayout));
    handed_over.mark(range(150..300)).unwrap();
    bytes[150..300].fill(9);
    let sixth = process.capture(&bytes.tracked_by(&handed_over), &excluding).unwrap();
    assert_eq!(sixth.tracking, Tracking::By(TrackMethod::DirtyRanges));
    bytes[100..200].fill(0);
    assert!(store.restore(sixth.id).unwrap().into_mapping().unwrap()[..] == bytes[..]);

    // The memory becomes shorter.
    bytes.truncate(MIB - 5000);
    handed_over.set_memory_bytes(bytes.len() as u64);
    let seventh = process.capture(&bytes.tracked_by(&handed_over), &excluding).unwrap();
    assert_eq!(seventh.tracking, Tracking::Rescan(RescanReason::OtherLayout));
    assert!(store.restore(seventh.id).unwrap().into_mapping().unwrap()[..] == bytes[..]);
}

#[test]
fn memory_that_shrank_and_grew_again_has_changed_where_it_did() {
    let (_dir, store) = new_store(4096);
    let mut bytes = scattered(MIB);
    let host = DirtyRanges::new(bytes.len() as u64);
    let process = store.process("p");
    process.capture(&bytes.tracked_by(&host), &CaptureOptions::default()).unwrap();
    host.mark(AddressRange::new(10, MIB as u64 - 10).unwrap()).unwrap();
    bytes[600_000] ^= 1;
    host.set_memory_bytes(500_001);
    bytes[500_001..].fill(0);
    host.set_memory_bytes(MIB as u64 - 1);
    host.set_memory_bytes(MIB as u64);
    let tracked = process.capture(&bytes.tracked_by(&host), &CaptureOptions::default()).unwrap();
    assert_eq!(tracked.tracking, Tracking::By(TrackMethod::DirtyRanges));
    assert!(store.restore(tracked.id).unwrap().into_mapping().unwrap()[..] == bytes[..]);
}

#[test]
fn a_parent_that_is_damaged_is_noticed_and_the_next_capture_reads_everything() {
    let (_dir, store) = new_store(16_384);
    let mut bytes: Vec<u8> = scattered(MIB);
    let host = DirtyRanges::new(bytes.len() as u64);
    let process = store.process("p");
    process.capture(&bytes.tracked_by(&host), &CaptureOptions::default()).unwrap();
    // All regions of the only pack.
    let pack = std::fs::read_dir(store.info().path.join("packs")).unwrap().next().unwrap().unwrap().path();
    let length = std::fs::metadata(&pack).unwrap().len();
    let file = std::fs::File::options().write(true).open(&pack).unwrap();
    for at in (5000..length - 5000).step_by(400) {
        file.write_all_at(&[0x55; 8], at).unwrap();
    }
    bytes[500_000] = 7;
    host.mark(range(500_000..500_001)).unwrap();
    let failed = process.capture(&bytes.tracked_by(&host), &CaptureOptions::default());
    assert!(matches!(&failed, Err(Error::Store(error)) if error.is_damage()), "{failed:?}");
    let healed = process.capture(&bytes.tracked_by(&host), &CaptureOptions::default()).unwrap();
    assert_eq!(healed.tracking, Tracking::Rescan(RescanReason::ParentUnusable));
}

#[test]
fn memory_that_is_mapped_anew_is_read_in_full_and_tracked_again() {
    let Some((mut memory, live)) = tracked_memory(4 * MIB) else { return };
    let (_dir, store) = new_store(4096);
    let capture = || store.process("p").capture(&live, &CaptureOptions::default());
    memory.fill(1);
    capture().unwrap();
    let map = |flags, protection, at: usize| {
        // SAFETY: replaces a page of a mapping that only this test has, and to which no reference
        // points.
        let mapped = unsafe {
            libc::mmap(memory.as_ptr().wrapping_add(at).cast_mut().cast(), 4096, protection, flags, -1, 0)
        };
        assert_ne!(mapped, libc::MAP_FAILED);
    };
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    map(private, libc::PROT_READ | libc::PROT_WRITE, MIB);
    memory[3 * MIB] = 2;
    let anew = capture().unwrap();
    assert_eq!(anew.tracking, Tracking::Rescan(RescanReason::Interrupted));
    assert!(store.restore(anew.id).unwrap().into_mapping().unwrap()[..] == memory[..]);
    memory[MIB + 5] = 7;
    let tracked = capture().unwrap();
    assert_eq!((tracked.tracking, tracked.changed_regions), (Tracking::By(TrackMethod::WriteProtection), 1));

    // If shared memory replaces it, others could write it unnoticed.
    let map = |flags, at: usize| {
        // SAFETY: as above.
        let mapped = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(memory.as_ptr().wrapping_add(at).cast_mut().cast(), 4096, protection, flags, -1, 0)
        };
        assert_ne!(mapped, libc::MAP_FAILED);
    };
    map(libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED, MIB);
    let refused = capture();
    let Err(Error::Source(SourceError::Track(TrackError::NotPrivate { .. }))) = refused else {
        panic!("{refused:?}")
    };
    // If nothing replaces it, the memory cannot be read, and a scan alone does not distinguish it
    // from unchanged memory.
    map(private, MIB);
    assert_eq!(capture().unwrap().tracking, Tracking::Rescan(RescanReason::Interrupted));
    // SAFETY: as above; nobody accesses the page before it is mapped again.
    assert_eq!(unsafe { libc::munmap(memory.as_ptr().wrapping_add(MIB).cast_mut().cast(), 4096) }, 0);
    let refused = capture();
    assert!(
        matches!(refused, Err(Error::Source(SourceError::Track(TrackError::NotPrivate { .. })))),
        "{refused:?}"
    );
    map(private, MIB);
    assert_eq!(capture().unwrap().tracking, Tracking::Rescan(RescanReason::Interrupted));
}

#[test]
fn a_forked_child_writes_its_own_memory_and_the_parents_stays_tracked() {
    let Some((mut memory, live)) = tracked_memory(MIB) else { return };
    let (_dir, store) = new_store(4096);
    memory.fill(1);
    let capture = || store.process("p").capture(&live, &CaptureOptions::default()).unwrap();
    capture();
    // SAFETY: the child only writes to its own copy of the memory and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        for page in memory.chunks_mut(4096).skip(10) {
            page[0] = 9;
        }
        // SAFETY: ends the child process without running any code of the test.
        unsafe { libc::_exit(0) };
    }
    memory[5] = 2;
    // SAFETY: waits for the child that was just made.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    memory[4096 + 5] = 3;
    let taken = capture();
    assert_eq!((&taken.tracking, taken.changed_regions), (&Tracking::By(TrackMethod::WriteProtection), 2));
    assert!(store.restore(taken.id).unwrap().into_mapping().unwrap()[..] == memory[..]);
}

#[test]
fn a_child_that_outlives_a_tracker_does_not_keep_the_memory_from_the_next_one() {
    let Some((memory, live)) = tracked_memory(MIB) else { return };
    // SAFETY: the child only waits until it is killed.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: the call has no arguments.
            unsafe { libc::pause() };
        }
    }
    drop(live);
    let again = LiveMemory::new(memory.as_ptr(), memory.len()).track_writes();
    // SAFETY: ends the child that was just made and waits for it.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    again.unwrap();
}

#[test]
fn several_trackers_live_side_by_side_but_not_on_the_same_memory() {
    let Some((mut one, live_one)) = tracked_memory(MIB) else { return };
    let Some((mut two, live_two)) = tracked_memory(MIB) else { return };
    let refused = LiveMemory::new(one.as_ptr(), one.len()).track_writes();
    assert!(matches!(refused, Err(TrackError::AlreadyTracked { .. })), "{refused:?}");

    let (_dir, store) = new_store(4096);
    let capture = |name: &str, live: &LiveMemory| {
        store.process(name).capture(live, &CaptureOptions::default()).unwrap()
    };
    one.fill(1);
    two.fill(2);
    std::thread::scope(|scope| {
        scope.spawn(|| capture("one", &live_one));
        scope.spawn(|| capture("two", &live_two));
    });
    one[0] = 7;
    assert_eq!(capture("one", &live_one).changed_regions, 1);
    assert_eq!(capture("two", &live_two).changed_regions, 0);
    // Dropping the tracker releases its memory for another one.
    drop(live_one);
    let again = LiveMemory::new(one.as_ptr(), one.len()).track_writes().unwrap();
    one[1] = 8;
    let taken = capture("one", &again);
    assert_eq!(taken.tracking, Tracking::Rescan(RescanReason::JustBegun));
    assert!(store.restore(taken.id).unwrap().into_mapping().unwrap()[..] == one[..]);
}

// ---- Bad input ----------------------------------------------------------------------------------

#[test]
fn ranges_and_bitmaps_that_do_not_fit_the_memory_are_refused() {
    let host = DirtyRanges::new(100_000);
    assert!(matches!(host.mark(range(99_999..100_001)), Err(TrackError::Outside { .. })));
    // 25 pages: one word, of which 25 bits are used.
    assert!(matches!(host.mark_bitmap(4096, &[0, 0]), Err(TrackError::Bitmap { expected_words: 1, .. })));
    assert!(matches!(host.mark_bitmap(4096, &[]), Err(TrackError::Bitmap { .. })));
    assert!(matches!(host.mark_bitmap(0, &[]), Err(TrackError::Bitmap { .. })));
    assert!(matches!(host.mark_bitmap(4096, &[1 << 25]), Err(TrackError::BitOutside { bit: 25, .. })));
    host.mark_bitmap(4096, &[1 << 24 | 1]).unwrap();
    // Overlapping ranges, in any order, count once.
    host.mark(range(50..60)).unwrap();
    host.mark(range(10..55)).unwrap();
    host.mark(range(10..55)).unwrap();

    let (_dir, store) = new_store(4096);
    let process = store.process("p");
    let refused = process.capture(&vec![1; 99_999].tracked_by(&host), &CaptureOptions::default());
    assert!(
        matches!(refused, Err(Error::Source(SourceError::Track(TrackError::OtherMemory { .. })))),
        "{refused:?}"
    );
    assert_eq!(process.snapshots().len(), 0);
}

#[test]
fn all_64_bits_of_a_word_mark_their_pages() {
    let mut bytes = vec![1u8; 200 * 4096];
    let (_dir, store) = new_store(4096);
    let host = DirtyRanges::new(bytes.len() as u64);
    let capture = |bytes: &[u8]| {
        store.process("p").capture(&bytes.tracked_by(&host), &CaptureOptions::default()).unwrap()
    };
    capture(&bytes);
    for word in
        [[u64::MAX, 0, 0, 0], [1, u64::MAX << 63, 1, 0xFF], [0xAAAA_AAAA_AAAA_AAAA; 4].map(|word| word)]
    {
        let word = [word[0], word[1], word[2], word[3] & 0xFF];
        let pages: Vec<usize> = (0..200).filter(|page| word[page / 64] >> (page % 64) & 1 == 1).collect();
        pages.iter().for_each(|page| bytes[page * 4096 + 1] += 1);
        host.mark_bitmap(4096, &word).unwrap();
        assert_eq!(capture(&bytes).changed_regions, pages.len() as u64);
    }
}

#[test]
fn memory_that_cannot_be_tracked_is_refused_or_read_in_full_with_the_reason() {
    if !has_write_protection() {
        return;
    }
    let memory = MmapMut::map_anon(MIB).unwrap();
    let refused = LiveMemory::new(memory.as_ptr().wrapping_add(8), 4096).track_writes();
    assert!(matches!(refused, Err(TrackError::NotAligned { .. })), "{refused:?}");
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB as u64).unwrap();
    // SAFETY: nobody else has the file.
    let shared = unsafe { memmap2::MmapOptions::new().map_mut(&file) }.unwrap();
    let refused = LiveMemory::new(shared.as_ptr(), shared.len()).track_writes();
    assert!(matches!(refused, Err(TrackError::NotPrivate { .. })), "{refused:?}");

    let (_dir, store) = new_store(4096);
    let live = LiveMemory::new(shared.as_ptr(), shared.len()).track_writes_if_possible();
    let taken = store.process("p").capture(&live, &CaptureOptions::default()).unwrap();
    let Tracking::Rescan(RescanReason::Unavailable(why)) = taken.tracking else { panic!("{taken:?}") };
    assert!(why.contains("private memory"), "{why}");

    // Memory that is not mapped is an error and not a crash.
    let nowhere = LiveMemory::new(std::ptr::without_provenance(4096), 4096);
    let refused = store.process("q").capture(&nowhere, &CaptureOptions::default());
    assert!(matches!(refused, Err(Error::Source(SourceError::Memory { .. }))), "{refused:?}");
}

#[test]
fn soft_dirty_is_used_where_it_works_and_else_refused_with_the_reason() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let (_dir, store) = new_store(4096);
    let source = LiveProcessSource::new(child.id()).track_writes_if_possible();
    let capture = || store.process("p").capture(&source, &CaptureOptions::default());
    let taken: Vec<_> = [capture(), capture()].into();
    let explicit = LiveProcessSource::new(child.id()).track_writes();
    child.kill().unwrap();
    child.wait().unwrap();
    let tracking = taken.into_iter().map(|taken| taken.unwrap().tracking).next_back().unwrap();
    match explicit {
        Ok(_) => assert_eq!(tracking, Tracking::By(TrackMethod::SoftDirty)),
        Err(error) => {
            assert!(
                matches!(error, TrackError::Unavailable { means: TrackMethod::SoftDirty, .. }),
                "{error:?}"
            );
            assert_eq!(tracking, Tracking::Rescan(RescanReason::Unavailable(error.to_string())));
        }
    }
}

// ---- Two steps ----------------------------------------------------------------------------------

#[test]
fn a_store_that_is_dropped_waits_for_captures_that_nobody_waits_for() {
    let (dir, store) = new_store(4096);
    let bytes: Vec<u8> = scattered(8 * MIB);
    for _ in 0..3 {
        // The second capture waits for the first.
        drop(store.process("p").start_capture(&bytes, &CaptureOptions::default()).unwrap());
    }
    drop(store);
    let store = Store::open(dir.path().join("store")).unwrap();
    assert_eq!(store.process("p").snapshots().len(), 3);
    let latest = store.process("p").latest().unwrap();
    assert!(store.restore(latest).unwrap().into_mapping().unwrap()[..] == bytes[..]);
}

#[test]
fn a_staging_buffer_that_is_too_small_is_said_and_changes_nothing_else() {
    let (_dir, store) = new_store(4096);
    let mut bytes: Vec<u8> = scattered(6 * MIB);
    for staging_bytes in [0, 100, MIB, 3 * MIB + 5, 64 * MIB] {
        bytes[staging_bytes % MIB] ^= 1;
        let options = CaptureOptions::new().staging_bytes(staging_bytes);
        let taken = store.process("p").start_capture(&bytes, &options).unwrap().wait().unwrap();
        assert_eq!(taken.staging_full, staging_bytes < bytes.len());
        assert!(store.restore(taken.id).unwrap().into_mapping().unwrap()[..] == bytes[..]);
    }
}

#[test]
fn the_owner_is_stopped_once_and_let_go_once_whatever_happens() {
    let (_dir, store) = new_store(4096);
    let bytes = MmapMut::map_anon(MIB).unwrap();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let note = |what: &'static str| {
        let calls = calls.clone();
        move || calls.lock().unwrap().push(what)
    };
    let live = LiveMemory::new(bytes.as_ptr(), bytes.len()).stop_with(note("stop"), note("go"));
    let taken = store.process("p").capture(&live, &CaptureOptions::default()).unwrap();
    assert!(!taken.paused.is_zero());
    assert_eq!(*calls.lock().unwrap(), ["stop", "go"]);
    let other = DirtyRanges::new(5);
    store.process("p").capture(&live.tracked_by(&other), &CaptureOptions::default()).unwrap_err();
    assert_eq!(*calls.lock().unwrap(), ["stop", "go", "stop", "go"]);
}
