//! Roll back: memory that is there already becomes what it was in a snapshot, in place.
//!
//! ```text
//! tables ─> equal to those of the snapshot that the memory is known to be? nothing changed since? ─> skipped
//!        └> read, compare ─> what differs: decode, check, keep   │  write what was kept
//!            nothing is written before all of this is done       │
//! ```
//!
//! Finding out and writing are two steps (`plan.rs`), so that damage, a process that does not fit or ctrl-C leave
//! the memory as it was. `memory.rs` has memory of this process, `process.rs` another process: a list of steps, of
//! which each has a file.

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
use crate::store::{Shared, Store};
use crate::table::Places;
use crate::track::{Tracker, Tracking};

use process::refused;

/// A snapshot that memory is about to be rolled back to.
///
/// Only what differs is written. What differs is found first: damage, a target that does not fit
/// and an interruption leave everything as it was. Up to 128 MiB of it are kept decoded in
/// between; what there is more is decoded a second time when it is written.
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
/// // What follows is a branch that begins there.
/// let options = CaptureOptions::new().parent(before);
/// let branch = vm.capture(&memory.tracked_by(&changes), &options)?;
/// assert_eq!((branch.parent, branch.changed_regions), (Some(before), 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Rollback<'a> {
    shared: &'a Shared,
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

/// What a rollback did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RollbackStats {
    /// The length of all memory that was to be as in the snapshot.
    pub bytes: u64,
    /// Regions that were read and compared; the rest were known to be equal.
    pub compared_regions: u64,
    /// Regions in which anything was written.
    pub written_regions: u64,
    /// What was written, in whole pages.
    pub written_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// How long a process or the owner of live memory stood still.
    pub paused: Duration,
    /// Whether the process stands still now, as it did before: `kill -CONT PID` lets it go on.
    pub is_stopped: bool,
    /// Shared mappings of a process, of files or with others, that differ and are left as they are.
    pub left_shared: Vec<Mapping>,
    /// Memory of a process that the snapshot does not have although its mapping was captured, that is there now and is
    /// left as it is.
    pub left_not_captured_bytes: u64,
    /// Open files of a process that are not what or where they were then, and are left as they are: one sentence each.
    pub left_descriptors: Vec<String>,
    /// How it was known what had changed.
    pub tracking: Tracking,
}

impl Store {
    /// Prepares to roll memory back to a snapshot, reading its layout and root.
    ///
    /// # Errors
    ///
    /// [`NoSuchSnapshot`](crate::store::StoreError::NoSuchSnapshot); [`Damaged`](crate::store::StoreError::Damaged) or
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

    /// Watches the rollback. It can be cancelled until the first byte is written, and not after that.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// Lets `tracker` say what changed in the memory since a snapshot: only that is read, and what
    /// is different between that snapshot and this one. For [`slice`](Self::slice).
    ///
    /// Afterwards its knowledge refers to this snapshot. Name it as the parent of the next capture
    /// ([`CaptureOptions::parent`](crate::CaptureOptions::parent)), which then costs what
    /// changed since.
    pub fn tracked_by(mut self, tracker: &'a dyn Tracker) -> Self {
        self.tracker = Some(tracker);
        self
    }

    /// The mappings.
    pub fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    /// Where its tables are.
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
