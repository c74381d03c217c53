//! Rollback of memory of this process.

use std::ops::Range;
use std::sync::atomic::AtomicU8;
use std::time::Instant;

use super::plan::{self, Look, Part, Plan, Target};
use super::{Rollback, RollbackStats};
use crate::address_space::AddressSpace;
use crate::capture::reference::Reference;
use crate::error::{Error, RollbackError};
use crate::hash::Hash;
use crate::ranges::{merge, overlapping};
use crate::record::SnapshotId;
use crate::root::Root;
use crate::sink::SinkError;
use crate::source::{LiveMemory, Source, SourceError};
use crate::table::Places;
use crate::track::{DirtySet, RescanReason, TrackMethod, Tracker, Tracking};

impl Rollback<'_> {
    /// Makes `memory` the image of the snapshot, like
    /// [`Restore::into_slice`](crate::Restore::into_slice), but writes only what differs. Without
    /// [`tracked_by`](Self::tracked_by) the whole memory is compared.
    ///
    /// Cost: comparing runs at 5 GB/s a core (AMD EPYC, 2 cores). Bytes that differ are decoded
    /// (2.8 GB/s a core), and their pages are written. With a tracker only the dirty memory is
    /// compared.
    ///
    /// # Errors
    ///
    /// [`SinkError::Length`] unless the memory is exactly as long as the image; damage;
    /// [`Error::Interrupted`]; an error of a tracker of another memory. After these errors nothing
    /// has been written. There is one exception: if more than 128 MiB differ, and an object is
    /// damaged between its first and its second reading, a part has been written.
    pub fn slice(self, memory: &mut [u8]) -> Result<RollbackStats, Error> {
        let tracker = self.tracker.ok_or(RescanReason::NoTracker);
        // A copy-on-write tracker must know the bytes that are written here: when its pages are
        // discarded later, they have the template's content again. A host may still report ranges
        // that it wrote before this call, so for host ranges the tracker is not asked again.
        let is_copy_on_write =
            tracker.as_ref().is_ok_and(|tracker| tracker.method() == TrackMethod::CopyOnWrite);
        self.slice_by(memory, tracker, is_copy_on_write)
    }

    /// Like [`slice`](Self::slice), for the memory of `live`. If `live` [tracks
    /// writes](LiveMemory::track_writes), only dirty memory is compared. `memory` are the bytes of
    /// `live`. The exclusive reference means that nobody else writes to them, so the owner is not
    /// stopped.
    ///
    /// ```
    /// use stillframe::{CaptureOptions, LiveMemory, Store};
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let mut arena = memmap2::MmapMut::map_anon(1 << 20)?;
    /// let live = LiveMemory::new(arena.as_ptr(), arena.len()).track_writes_if_possible();
    /// let before = store.process("arena").capture(&live, &CaptureOptions::default())?.id;
    /// arena[5000] = 7;
    /// let stats = store.rollback(before)?.live(&live, &mut arena)?;
    /// assert_eq!((arena[5000], stats.written_regions), (0, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`slice`](Self::slice); [`RollbackError::OtherMemory`] if these are not the bytes of
    /// `live`.
    pub fn live(self, live: &LiveMemory, memory: &mut [u8]) -> Result<RollbackStats, Error> {
        check_same(live, memory.as_ptr(), memory.len())?;
        self.slice_by(memory, live.tracker().as_deref().map_err(Clone::clone), true)
    }

    /// Like [`live`](Self::live), for memory that others may write. `memory` are the bytes of
    /// `live`; no plain reference to them is made. The owner is stopped during the rollback if
    /// `live` [knows how](LiveMemory::stop_with).
    ///
    /// If nobody stops the writers, bytes that they write meanwhile stay or are overwritten. The
    /// next capture is right in both cases: it reads again the memory that was written here.
    ///
    /// # Errors
    ///
    /// As [`live`](Self::live); [`SourceError::Memory`] and [`SinkError::Memory`] if the memory is
    /// not mapped any more or cannot be written. In these two cases a part may have been written.
    pub fn live_shared(self, live: &LiveMemory, memory: &[AtomicU8]) -> Result<RollbackStats, Error> {
        let begun = Instant::now();
        self.check_length(memory.len())?;
        check_same(live, memory.as_ptr().cast(), memory.len())?;
        let tracker = live.tracker();
        // The owner is stopped until this is dropped.
        let frozen = live.open()?;
        let known = self.known(tracker.as_deref().map_err(Clone::clone), memory.len())?;
        let plan = self.plan(&known, &Copied(live))?;
        let done = plan.write(
            |patch| usize::try_from(patch.at).ok().and_then(|at| memory.get(at..)).unwrap_or_default(),
            |region, offset, bytes| {
                let place = region.get(offset..).unwrap_or_default();
                let address = place.as_ptr().addr() as u64;
                let write = crate::sys::process_memory::write_own(place, bytes);
                Ok(write.map_err(|source| SinkError::Memory { address, source })?)
            },
        )?;
        known.commit(tracker.as_deref().ok(), self.id);
        let paused = frozen.release();
        Ok(RollbackStats { paused, ..self.stats(begun, memory.len() as u64, known.tracking, done) })
    }
    fn slice_by(
        self,
        memory: &mut [u8],
        tracker: Result<&dyn Tracker, RescanReason>,
        notes_what_is_written_here: bool,
    ) -> Result<RollbackStats, Error> {
        let begun = Instant::now();
        self.check_length(memory.len())?;
        let mut known = self.known(tracker.clone(), memory.len())?;
        let plan = self.plan(&known, &InPlace(memory))?;
        let mut rest = &mut *memory;
        let mut rest_at = 0;
        let mut regions = Vec::with_capacity(plan.patches.len());
        for patch in &plan.patches {
            let at = usize::try_from(patch.at).unwrap_or(usize::MAX);
            let (region, after) = rest.split_at_mut(at - rest_at).1.split_at_mut(patch.length);
            (rest, rest_at) = (after, at + patch.length);
            regions.push(region);
        }
        let mut regions = regions.into_iter();
        let done = plan.write(
            |_| regions.next().unwrap_or_default(),
            |region, offset, bytes| {
                region[offset..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            },
        )?;
        if let (Ok(tracker), true) = (&tracker, notes_what_is_written_here) {
            // Nobody else can have written, so the whole memory is as in this snapshot. If taking
            // the dirty set fails, the next capture reads these ranges again.
            let space = AddressSpace::image("", memory.len() as u64);
            let taken = tracker.take(&space, Some(self.id)).map(|taken| taken.number);
            known.number = taken.ok().or(known.number);
        }
        known.commit(tracker.ok(), self.id);
        Ok(self.stats(begun, memory.len() as u64, known.tracking, done))
    }

    fn check_length(&self, length: usize) -> Result<(), SinkError> {
        let (expected_bytes, found_bytes) = (self.space.image_bytes(), length as u64);
        match expected_bytes == found_bytes {
            true => Ok(()),
            false => Err(SinkError::Length { expected_bytes, found_bytes }),
        }
    }

    /// Takes the dirty set. The tracker starts a new set in any case.
    fn known(&self, tracker: Result<&dyn Tracker, RescanReason>, length: usize) -> Result<Known, Error> {
        let rescan = |number, why| Known { number, tracking: Tracking::Rescan(why), since: None };
        let tracker = match tracker {
            Ok(tracker) => tracker,
            Err(why) => return Ok(rescan(None, why)),
        };
        let basis = tracker.basis();
        let space = AddressSpace::image("", length as u64);
        let DirtySet { number, changes } = tracker.take(&space, basis).map_err(SourceError::Track)?;
        let since = match (basis, changes) {
            (_, Err(why)) => Err(why),
            (None, _) => Err(RescanReason::JustBegun),
            (Some(basis), Ok(changes)) => {
                let reference = Reference::of(self.shared, basis).map_err(|_| RescanReason::ParentUnusable);
                reference.and_then(|it| self.since(&it, changes.into_iter().flatten().collect()))
            }
        };
        Ok(match since {
            Ok(since) => {
                let tracking = Tracking::By(tracker.method());
                Known { number: Some(number), tracking, since: Some(since) }
            }
            Err(why) => rescan(Some(number), why),
        })
    }

    /// The tables of the snapshot that the memory equals outside `changed`, if they can be used.
    fn since(&self, basis: &Reference, mut changed: Vec<Range<u64>>) -> Result<Since, RescanReason> {
        let (space, root) = basis.content().ok_or(RescanReason::ParentUnusable)?;
        let is_one_memory = |space: &AddressSpace| space.mappings().len() == 1;
        if basis.record.region_size != self.record.region_size || !is_one_memory(&self.space) {
            return Err(RescanReason::ParentUnusable);
        }
        if !is_one_memory(space) {
            return Err(RescanReason::OtherLayout);
        }
        // These ranges are zeros in the tables, although the memory may have other bytes.
        let unknown = space.excluded().iter().chain(space.unreadable());
        changed.extend(unknown.map(|range| range.start()..range.end()));
        merge(&mut changed);
        let places = Places::new(space, basis.record.region_size);
        Ok(Since { root: root.clone(), places, changed })
    }

    fn plan(&self, known: &Known, target: &dyn Target) -> Result<Plan<'_>, Error> {
        let known_since = known.since.as_ref();
        let places = self.places();
        let parts = places.iter().enumerate().filter_map(|(at, place)| {
            let table = self.root.get(at);
            let since = known_since.and_then(|since| Some((since, since.table(at, place.length_bytes)?)));
            let look = match since {
                None => Look::Everything,
                Some((since, known)) => {
                    let first = place.image_bytes;
                    let within = overlapping(&since.changed, first..first + place.length_bytes as u64);
                    let changed: Vec<_> =
                        within.map(|range| range.start - first..range.end - first).collect();
                    // This holds for most of a large memory. Skipped tables take no memory here.
                    if known == table && changed.is_empty() {
                        return None;
                    }
                    Look::Since(known, changed)
                }
            };
            Some(Part { table, place, at: place.image_bytes, look })
        });
        let region_bytes = self.record.region_size.bytes();
        plan::plan(self.shared, region_bytes, self.check, &self.progress, parts.collect(), target)
    }
}

/// What a tracker reported.
struct Known {
    number: Option<u64>,
    tracking: Tracking,
    since: Option<Since>,
}

/// The snapshot that the memory equals outside the changes.
struct Since {
    /// Its tables, and their positions.
    root: Root,
    places: Places,
    /// The changes since that snapshot: sorted and disjoint.
    changed: Vec<Range<u64>>,
}

impl Since {
    /// Its table at position `at`, if that table covers `length_bytes`.
    fn table(&self, at: usize, length_bytes: usize) -> Option<Hash> {
        self.places.get(at).filter(|place| place.length_bytes == length_bytes).map(|_| self.root.get(at))
    }
}

impl Known {
    /// Reports to the tracker that the memory equals snapshot `id`, except for changes since the
    /// dirty set was taken.
    fn commit(&self, tracker: Option<&dyn Tracker>, id: SnapshotId) {
        if let (Some(tracker), Some(number)) = (tracker, self.number) {
            tracker.committed(number, id);
        }
    }
}

/// Bytes that nobody else writes.
struct InPlace<'a>(&'a [u8]);

impl Target for InPlace<'_> {
    fn bytes<'b>(&'b self, at: u64, length: usize, _buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error> {
        // The offsets are those of an image of the same length.
        Ok(&self.0[usize::try_from(at).unwrap_or(usize::MAX)..][..length])
    }
}

/// Bytes that are copied by the kernel.
struct Copied<'a>(&'a LiveMemory);

impl Target for Copied<'_> {
    fn bytes<'b>(&'b self, at: u64, length: usize, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error> {
        buffer.resize(length, 0);
        self.0.copy(std::slice::from_ref(&(at..at + length as u64)), buffer)?;
        Ok(buffer)
    }
}

/// An error unless the memory is that of `live`.
fn check_same(live: &LiveMemory, start: *const u8, length: usize) -> Result<(), RollbackError> {
    let found = (start.addr() as u64, length as u64);
    let expected = (live.address(), live.length_bytes());
    match found == expected {
        true => Ok(()),
        false => Err(RollbackError::OtherMemory {
            expected_address: expected.0,
            expected_bytes: expected.1,
            found_address: found.0,
            found_bytes: found.1,
        }),
    }
}
