//! Memory of this process, rolled back to the image of a snapshot.

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
    /// Makes `memory` the image of the snapshot, as [`Restore::into_slice`](crate::Restore::into_slice) would,
    /// by writing what differs. Without [`tracked_by`](Self::tracked_by) all of it is compared.
    ///
    /// Cost: comparing takes 5 GB/s a core; what differs is decoded (2.8 GB/s a core) and its pages
    /// are written. With a tracker only what changed is looked at.
    ///
    /// # Errors
    ///
    /// [`SinkError::Length`] unless the memory is exactly as long as the image; damage;
    /// [`Error::Interrupted`]; that the tracker is one of another memory. Nothing is written then. Only if what
    /// differs is more than 128 MiB, and is damaged between its first and its second reading, a part is.
    pub fn slice(self, memory: &mut [u8]) -> Result<RollbackStats, Error> {
        let tracker = self.tracker.ok_or(RescanReason::NoTracker);
        // What is written here must be known to copy-on-write too: thrown away later, it is the template's again. A host
        // may still hand in what was written before this, so of host ranges nothing more is taken.
        let is_copy_on_write =
            tracker.as_ref().is_ok_and(|tracker| tracker.method() == TrackMethod::CopyOnWrite);
        self.slice_by(memory, tracker, is_copy_on_write)
    }

    /// Does the same with the memory that `live` is, which knows what was written if it
    /// [tracks that](LiveMemory::track_writes). `memory` are its bytes, which nobody else can write meanwhile;
    /// so its owner need not be stopped, and is not.
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
    /// As [`slice`](Self::slice); [`RollbackError::OtherMemory`] if these are not the bytes of `live`.
    pub fn live(self, live: &LiveMemory, memory: &mut [u8]) -> Result<RollbackStats, Error> {
        check_same(live, memory.as_ptr(), memory.len())?;
        self.slice_by(memory, live.tracker().as_deref().map_err(Clone::clone), true)
    }

    /// Does the same with memory that others may write: `memory` are its bytes as such, and no plain reference
    /// to them is made. The owner is stopped in between if `live` [can](LiveMemory::stop_with).
    ///
    /// If nobody stops the writers, what they write meanwhile stays or is overwritten, and the next capture
    /// finds it either way: it looks again at what was written here.
    ///
    /// # Errors
    ///
    /// As [`live`](Self::live); [`SourceError::Memory`] and [`SinkError::Memory`] if it is not mapped any more, or
    /// cannot be written: a part may be written then.
    pub fn live_shared(self, live: &LiveMemory, memory: &[AtomicU8]) -> Result<RollbackStats, Error> {
        let begun = Instant::now();
        self.check_length(memory.len())?;
        check_same(live, memory.as_ptr().cast(), memory.len())?;
        let tracker = live.tracker();
        // Stops the owner, until it is dropped.
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
            // Nobody else can have written, so all of it is as in this snapshot. If it cannot be taken, the next
            // capture looks at it.
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

    /// Asks the tracker. It begins anew in any case.
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

    /// The tables of the snapshot that the memory is as in but for `changed`, if they can be used.
    fn since(&self, basis: &Reference, mut changed: Vec<Range<u64>>) -> Result<Since, RescanReason> {
        let (space, root) = basis.content().ok_or(RescanReason::ParentUnusable)?;
        let is_one_memory = |space: &AddressSpace| space.mappings().len() == 1;
        if basis.record.region_size != self.record.region_size || !is_one_memory(&self.space) {
            return Err(RescanReason::ParentUnusable);
        }
        if !is_one_memory(space) {
            return Err(RescanReason::OtherLayout);
        }
        // These are zeros in there, whatever they were.
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
                    // Of a large memory most of it is so, and takes no memory here.
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

/// What a tracker told.
struct Known {
    number: Option<u64>,
    tracking: Tracking,
    since: Option<Since>,
}

/// The snapshot that the memory was as in.
struct Since {
    /// Its tables, and where they are.
    root: Root,
    places: Places,
    /// What changed since then: sorted and apart.
    changed: Vec<Range<u64>>,
}

impl Since {
    /// Its table in a place, if that has so many bytes there.
    fn table(&self, at: usize, length_bytes: usize) -> Option<Hash> {
        self.places.get(at).filter(|place| place.length_bytes == length_bytes).map(|_| self.root.get(at))
    }
}

impl Known {
    /// Tells the tracker that the memory is as in snapshot `id`, but for what happened since it was asked.
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
        // Places of an image as long as this.
        Ok(&self.0[usize::try_from(at).unwrap_or(usize::MAX)..][..length])
    }
}

/// Bytes that the kernel copies.
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
