//! Rollback: existing memory becomes the memory of a snapshot again, in place.
//!
//! ```text
//! tables ─> equal to those of the snapshot that the memory had, and clean since then? ─> skipped
//!        └> read, compare ─> differences: decode, check, keep    │  write the kept bytes
//!            nothing is written before all of this is done      │
//! ```
//!
//! Finding the differences and writing them are two steps (`plan.rs`), so that damage, a process
//! that does not fit, or ctrl-C leave the memory as it was. `memory.rs` is for memory of this
//! process. `process.rs` is for another process: a list of steps, one file each.

mod attempt;
mod captured;
mod content;
mod descriptors;
mod devices;
mod file;
mod fit;
mod guards;
mod held_memory;
mod identity;
mod injection;
mod memory;
mod memory_limit;
mod page_state;
mod plan;
mod process;
mod registers;
mod remade;
mod restart;
mod runtime_threads;
mod same_threads;
mod shared;
mod signals;
mod write;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address_space::{AddressSpace, Mapping};
use crate::error::Error;
use crate::progress::Progress;
use crate::record::{Record, SnapshotId};
use crate::root::Root;
use crate::source::STOP_TIMEOUT;
use crate::store::pinned::Pinned;
use crate::store::read::{Check, Reader};
use crate::store::tables::Tables;
use crate::store::{OpenStore, Store};
use crate::table::Places;
use crate::track::{Tracker, Tracking};

use process::refused;

/// A rollback that is prepared: a snapshot, and options.
///
/// Only differences are written. All differences are found before the first write, so that damage,
/// a target that does not fit and an interruption leave the target as it was. Up to 128 MiB of
/// differences are kept decoded between the two steps; further ones are decoded a second time when
/// they are written.
///
/// ```
/// use stillframe::{AddressRange, CaptureOptions, Store};
/// use stillframe::source::SourceExt;
/// use stillframe::track::DirtyRanges;
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let mut memory = vec![7u8; 1 << 20];
/// let changes = DirtyRanges::new(memory.len() as u64);
/// let vm = store.process("vm-7");
/// let before = vm.capture(&memory.tracked_by(&changes), &CaptureOptions::default())?.id;
///
/// memory[5000] = 8;
/// changes.mark(AddressRange::new(5000, 5001)?)?;
/// let stats = store.rollback(before)?.tracked_by(&changes).slice(&mut memory)?;
/// assert_eq!((memory[5000], stats.compared_regions, stats.written_regions), (7, 1, 1));
///
/// // Captures from now on are a branch that begins at this snapshot.
/// let options = CaptureOptions::new().parent(before);
/// let branch = vm.capture(&memory.tracked_by(&changes), &options)?;
/// assert_eq!((branch.parent, branch.changed_regions), (Some(before), 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Rollback<'a> {
    shared: &'a OpenStore,
    id: SnapshotId,
    record: Arc<Record>,
    space: AddressSpace,
    root: Root,
    check: Check,
    progress: Progress,
    tracker: Option<&'a dyn Tracker>,
    leave_new_memory: bool,
    leave_shared_memory: bool,
    leave_devices: bool,
    leave_descriptors: bool,
    seek_files: bool,
    stop_timeout: Duration,
    _pinned: Pinned,
}

/// The result of a rollback.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RollbackStats {
    /// The length of all memory that was rolled back, equal parts included.
    pub bytes: u64,
    /// Regions that were read and compared; the rest were known to be equal.
    pub compared_regions: u64,
    /// Regions in which at least one page was written.
    pub written_regions: u64,
    /// How many bytes were written, in whole pages.
    pub written_bytes: u64,
    /// How long the rollback took.
    pub elapsed: Duration,
    /// How long a process, or the owner of live memory, was paused.
    pub paused: Duration,
    /// Whether the process is stopped now, as it was before: `kill -CONT PID` continues it.
    pub is_stopped: bool,
    /// Shared mappings of a process (of files, or shared with other processes) that differ from the
    /// snapshot and were left as they are.
    pub left_shared: Vec<Mapping>,
    /// Memory of a process that exists now and was left as it is, because the snapshot does not
    /// have its content although its mapping was captured.
    pub left_not_captured_bytes: u64,
    /// Descriptors of a process that differ from the snapshot in their file or position, and were
    /// left as they are: one sentence each.
    pub left_descriptors: Vec<String>,
    /// How the changes were known.
    pub tracking: Tracking,
}

impl Store {
    /// Prepares a rollback to a snapshot, and reads its layout and root.
    ///
    /// # Errors
    ///
    /// [`NoSuchSnapshot`](crate::store::StoreError::NoSuchSnapshot);
    /// [`Damaged`](crate::store::StoreError::Damaged) or
    /// [`Missing`](crate::store::StoreError::Missing) if the layout or the root cannot be read.
    pub fn rollback(&self, id: SnapshotId) -> Result<Rollback<'_>, Error> {
        let shared = self.shared();
        let pinned = shared.pin(id)?;
        let record = pinned.record().clone();
        let tables = Tables::read(&mut Reader::new(shared, Check::Full), &record)?;
        Ok(Rollback {
            shared,
            id,
            record,
            space: tables.layout.space,
            root: tables.root,
            check: Check::default(),
            progress: Progress::default(),
            tracker: None,
            leave_new_memory: false,
            leave_shared_memory: false,
            leave_devices: false,
            leave_descriptors: false,
            seek_files: false,
            stop_timeout: STOP_TIMEOUT,
            _pinned: pinned,
        })
    }
}

impl<'a> Rollback<'a> {
    /// How thoroughly to check what is read from the store.
    pub fn check(mut self, check: Check) -> Self {
        self.check = check;
        self
    }

    /// Reports the progress of the rollback. The rollback can be cancelled until it writes the
    /// first byte, and not after that.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// Uses `tracker` to know which memory is dirty since an earlier snapshot. The rollback then
    /// reads only the dirty memory, and the regions in which that snapshot and this one differ. For
    /// [`slice`](Self::slice).
    ///
    /// Afterwards the tracker's knowledge refers to this snapshot. Name it as the parent of the
    /// next capture ([`CaptureOptions::parent`](crate::CaptureOptions::parent)): that capture then
    /// costs only what changed since the rollback.
    pub fn tracked_by(mut self, tracker: &'a dyn Tracker) -> Self {
        self.tracker = Some(tracker);
        self
    }

    /// The mappings of the snapshot.
    pub fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    /// The positions of its tables.
    fn places(&self) -> Places {
        Places::new(&self.space, self.record.region_size)
    }

    fn stats(&self, begun: Instant, bytes: u64, tracking: Tracking, done: plan::Done) -> RollbackStats {
        RollbackStats {
            bytes,
            compared_regions: done.compared_regions,
            written_regions: done.written_regions,
            written_bytes: done.written_bytes,
            elapsed: begun.elapsed(),
            paused: Duration::ZERO,
            is_stopped: false,
            left_shared: Vec::new(),
            left_not_captured_bytes: 0,
            left_descriptors: Vec::new(),
            tracking,
        }
    }
}

impl std::fmt::Debug for Rollback<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rollback").field("id", &self.id).finish_non_exhaustive()
    }
}
