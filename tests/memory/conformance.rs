//! The conformance suites that the crate exports, for its own sources and trackers, and for some
//! that break a rule.

use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::needs::passed_over;
use memmap2::MmapMut;
use stillframe::address_space::AddressSpace;
use stillframe::conformance::{self, TrackedMemory};
use stillframe::ranges::Ranges;
use stillframe::source::{
    CoreSource, FileSource, Frozen, LiveProcessSource, OneMemory, Source, SourceError, SourceExt,
};
use stillframe::track::{DirtyRanges, DirtySet, RescanReason, TrackError, TrackMethod, Tracker};
use stillframe::{AddressRange, CaptureOptions, LiveMemory, SnapshotId, Store};

const LENGTH: usize = 300_001;

fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("vault")).unwrap();
    (dir, store)
}

/// Memory with holes in it.
fn memory() -> Vec<u8> {
    let mut bytes = crate::noise::noise(LENGTH, 5);
    bytes.chunks_mut(50_000).skip(1).step_by(2).for_each(|hole| hole.fill(0));
    bytes
}

// ---- Sources ------------------------------------------------------------------------------------

/// A memory that is copied out, at `skew` bytes from where it should be.
struct Copied {
    bytes: Vec<u8>,
    skew: usize,
    populated: Ranges,
}

impl OneMemory for Copied {
    fn length_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn copy_out(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let skew = if offset_bytes > 0 { self.skew } else { 0 };
        let start = usize::try_from(offset_bytes).unwrap() - skew;
        buffer.copy_from_slice(&self.bytes[start..][..buffer.len()]);
        Ok(())
    }

    fn populated(&self) -> Result<Ranges, SourceError> {
        Ok(self.populated.clone())
    }
}

impl Source for Copied {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(self.frozen())
    }
}

#[test]
fn the_sources_of_this_crate_conform() {
    let (dir, store) = new_store();
    let memory = memory();
    conformance::source(&memory, &store).unwrap();
    conformance::source(&memory[..1], &store).unwrap();

    let path = dir.path().join("image");
    std::fs::write(&path, &memory).unwrap();
    conformance::source(&FileSource::new(&path), &store).unwrap();

    conformance::source(&LiveMemory::new(memory.as_ptr(), memory.len()), &store).unwrap();

    let taken = store.process("for a core").capture(&memory, &CaptureOptions::new()).unwrap();
    let core = dir.path().join("core");
    store.restore(taken.id).unwrap().into_core(&core).unwrap();
    conformance::source(&CoreSource::new(&core), &store).unwrap();

    let everything = Ranges::from(0..LENGTH as u64);
    conformance::source(&Copied { bytes: memory, skew: 0, populated: everything }, &store).unwrap();
}

#[test]
fn a_live_process_that_waits_conforms() {
    let (_dir, store) = new_store();
    let mut child = Command::new("cat")
        // Otherwise the kernel writes the number of the processor into its memory each time it goes
        // on.
        .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // When it has answered it waits for more, and writes to no memory.
    child.stdin.as_mut().unwrap().write_all(b"a").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    let conforms =
        catch_unwind(AssertUnwindSafe(|| conformance::source(&LiveProcessSource::new(child.id()), &store)));
    child.kill().unwrap();
    child.wait().unwrap();
    conforms.unwrap().unwrap();
}

#[test]
fn a_source_that_breaks_a_rule_is_found_out() {
    let (_dir, store) = new_store();
    let is_refused = |source: Copied| {
        catch_unwind(AssertUnwindSafe(|| conformance::source(&source, &store).unwrap())).is_err()
    };
    let everything = Ranges::from(0..LENGTH as u64);
    assert!(is_refused(Copied { bytes: memory(), skew: 1, populated: everything }));
    assert!(is_refused(Copied { bytes: memory(), skew: 0, populated: Ranges::from(0..1000) }));
}

// ---- Trackers -----------------------------------------------------------------------------------

/// Memory whose owner marks what it writes.
struct Marked<T> {
    bytes: Vec<u8>,
    tracker: T,
    mark: fn(&T, AddressRange),
}

impl<T: Tracker + Clone + 'static> TrackedMemory for Marked<T> {
    fn source(&self) -> Box<dyn Source + '_> {
        Box::new(self.bytes.tracked_by(&self.tracker))
    }

    fn length_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn write(&mut self, offset_bytes: usize, bytes: &[u8]) {
        self.bytes[offset_bytes..][..bytes.len()].copy_from_slice(bytes);
        let range = AddressRange::with_length(offset_bytes as u64, bytes.len() as u64).unwrap();
        (self.mark)(&self.tracker, range);
    }
}

/// Memory of which the kernel tells what was written.
struct Protected {
    mapping: MmapMut,
    live: LiveMemory,
}

impl TrackedMemory for Protected {
    fn source(&self) -> Box<dyn Source + '_> {
        Box::new(&self.live)
    }

    fn length_bytes(&self) -> usize {
        self.mapping.len()
    }

    fn write(&mut self, offset_bytes: usize, bytes: &[u8]) {
        self.mapping[offset_bytes..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// A tracker that forgets what a capture took that failed.
#[derive(Clone, Default)]
struct Forgetful(Arc<Mutex<(Ranges, Option<SnapshotId>)>>);

impl Tracker for Forgetful {
    fn method(&self) -> TrackMethod {
        TrackMethod::DirtyRanges
    }

    fn take(&self, _: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
        let mut state = self.0.lock().unwrap();
        let written = std::mem::take(&mut state.0);
        let changes = match since {
            None => Err(RescanReason::NoParent),
            Some(since) if Some(since) != state.1 => Err(RescanReason::OtherParent),
            Some(_) => Ok(vec![written]),
        };
        Ok(DirtySet { number: 0, changes })
    }

    fn committed(&self, _: u64, id: SnapshotId) {
        self.0.lock().unwrap().1 = Some(id);
    }

    fn estimate_bytes(&self) -> u64 {
        0
    }
}

#[test]
fn dirty_ranges_conform() {
    let (_dir, store) = new_store();
    let tracker = DirtyRanges::new(LENGTH as u64);
    let mark = |tracker: &DirtyRanges, range| tracker.mark(range).unwrap();
    conformance::tracker(&mut Marked { bytes: vec![0; LENGTH], tracker, mark }, &store).unwrap();
}

#[test]
fn write_protection_conforms_to_the_exported_suite() {
    let (_dir, store) = new_store();
    let mapping = MmapMut::map_anon(LENGTH).unwrap();
    match LiveMemory::new(mapping.as_ptr(), LENGTH).track_writes() {
        Ok(live) => conformance::tracker(&mut Protected { mapping, live }, &store).unwrap(),
        Err(TrackError::Unavailable { .. }) => passed_over("write protection by userfaultfd"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_tracker_that_forgets_what_a_failed_capture_took_is_found_out() {
    let (_dir, store) = new_store();
    let mark = |tracker: &Forgetful, range: AddressRange| {
        tracker.0.lock().unwrap().0.insert(range.start()..range.end());
    };
    let mut memory = Marked { bytes: vec![0; LENGTH], tracker: Forgetful::default(), mark };
    let tried = catch_unwind(AssertUnwindSafe(|| conformance::tracker(&mut memory, &store).unwrap()));
    let why = tried.unwrap_err();
    let why = why.downcast_ref::<String>().unwrap();
    assert!(why.contains("differs from the memory"), "{why}");
}
