//! Tracking: which bytes may have changed since a snapshot.
//!
//! ```text
//! take() ──> ranges since the last take ──> kept, together with those of takes whose
//!    │                                      snapshot never became durable
//!    └────> all that was kept, if it refers to the parent of the new snapshot
//! committed(id) ──> the ranges up to that take are dropped; from now on knowledge refers to `id`
//! ```
//!
//! A [`Tracker`] does not decide what a snapshot holds. It only reports which bytes need not be
//! read again. Whenever its knowledge does not refer to the parent, everything is read, and
//! [`RescanReason`] gives the reason.

mod copy_on_write;
mod host;
mod ledger;
mod soft_dirty;
mod write_protection;

use std::fmt;
use std::io;

use crate::address_space::AddressSpace;
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::units::AddressRange;

pub(crate) use copy_on_write::CopyOnWrite;
pub use host::DirtyRanges;
pub(crate) use soft_dirty::SoftDirty;
pub(crate) use write_protection::WriteProtection;

/// Knows what changed in one memory.
///
/// Implemented by [`DirtyRanges`], and by what [`LiveMemory::track_writes`] and
/// [`LiveProcessSource::track_writes`] make. Threads may use it at once; it serves one line of
/// snapshots best, as its knowledge refers to the last snapshot alone.
///
/// [`LiveMemory::track_writes`]: crate::LiveMemory::track_writes
/// [`LiveProcessSource::track_writes`]: crate::source::LiveProcessSource::track_writes
///
/// [`DirtyRanges`] does this for whoever can mark what is written. A tracker of one's own:
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use stillframe::address_space::AddressSpace;
/// use stillframe::ranges::Ranges;
/// use stillframe::source::SourceExt;
/// use stillframe::track::{DirtySet, RescanReason, TrackError, TrackMethod, Tracker, Tracking};
/// use stillframe::{CaptureOptions, SnapshotId, Store};
///
/// /// An interpreter that notes each store instruction. Its memory is one mapping.
/// #[derive(Clone, Default)]
/// struct WriteLog(Arc<Mutex<State>>);
///
/// #[derive(Default)]
/// struct State {
///     written: Ranges,
///     /// What was taken and is in no durable snapshot yet, with the number of its take.
///     taken: Vec<(u64, Ranges)>,
///     takes: u64,
///     basis: Option<SnapshotId>,
/// }
///
/// impl Tracker for WriteLog {
///     fn method(&self) -> TrackMethod {
///         TrackMethod::DirtyRanges
///     }
///
///     fn take(&self, _: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
///         let mut state = self.0.lock().unwrap();
///         let (number, written) = (state.takes, std::mem::take(&mut state.written));
///         state.takes += 1;
///         state.taken.push((number, written));
///         let changes = match (since, state.basis) {
///             (None, _) => Err(RescanReason::NoParent),
///             (Some(_), None) => Err(RescanReason::JustBegun),
///             (Some(since), Some(basis)) if since != basis => Err(RescanReason::OtherParent),
///             // Also the takes before, unless they are in the snapshot that this refers to.
///             _ => Ok(vec![state.taken.iter().fold(Ranges::default(), |all, (_, it)| all.union(it))]),
///         };
///         Ok(DirtySet { number, changes })
///     }
///
///     fn committed(&self, number: u64, id: SnapshotId) {
///         let mut state = self.0.lock().unwrap();
///         // One that is older than the last committed take comes too late.
///         if state.taken.iter().any(|(taken, _)| *taken == number) {
///             state.taken.retain(|(taken, _)| *taken > number);
///             state.basis = Some(id);
///         }
///     }
///
///     fn estimate_bytes(&self) -> u64 {
///         self.0.lock().unwrap().written.length_bytes()
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let (log, process) = (WriteLog::default(), store.process("interpreter"));
/// let mut memory = vec![0; 1 << 20];
/// let capture = |memory: &[u8]| process.capture(&memory.tracked_by(&log), &CaptureOptions::new());
/// capture(&memory)?;
/// memory[70_000] = 1;
/// log.0.lock().unwrap().written.insert(70_000..70_001);
/// let taken = capture(&memory)?;
/// assert_eq!(taken.tracking, Tracking::By(TrackMethod::DirtyRanges));
/// assert_eq!(store.restore(taken.id)?.into_mapping()?[70_000], 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Tracker: Send + Sync {
    /// How it knows.
    fn method(&self) -> TrackMethod;

    /// Finds out what changed since the last call and begins anew, while the source stands still.
    /// `since` is the parent of the snapshot that is being taken.
    ///
    /// What is taken and never [`committed`](Self::committed) is taken again the next time.
    ///
    /// # Errors
    ///
    /// When it was made for another memory, or the kernel fails. Nothing is forgotten then.
    fn take(&self, space: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError>;

    /// Learns that the snapshot for which [`DirtySet::number`] was taken is durable.
    fn committed(&self, number: u64, id: SnapshotId);

    /// The snapshot that its knowledge refers to: the memory was as in there, but for what it
    /// finds. `None` while it has no such knowledge; a rollback then compares everything.
    fn basis(&self) -> Option<SnapshotId> {
        None
    }

    /// About how many bytes the next [`take`](Self::take) will find, so that memory for them is
    /// made ready before the source stands still. Changes nothing.
    fn estimate_bytes(&self) -> u64;
}

/// What a tracker found out.
#[derive(Clone, Debug)]
pub struct DirtySet {
    /// Which take it is.
    pub number: u64,
    /// For each mapping the byte ranges, from the mapping's start, that may have changed and are
    /// inside it. Or why that cannot be told.
    pub changes: Result<Vec<Ranges>, RescanReason>,
}

/// How a capture knew what had changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// A tracker told it: only that was read.
    By(TrackMethod),
    /// Nobody could tell: everything was read and compared with the parent's tables.
    Rescan(RescanReason),
}

/// The means by which changes are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackMethod {
    /// The host said so: a hypervisor's dirty log.
    DirtyRanges,
    /// The kernel's write protection: userfaultfd and PAGEMAP_SCAN.
    WriteProtection,
    /// The kernel's soft-dirty bits.
    SoftDirty,
    /// Which pages of a [template](crate::Template)'s instance are its own.
    CopyOnWrite,
}

/// Why everything had to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RescanReason {
    /// The source has no tracker.
    NoTracker,
    /// A tracker was requested, but this machine cannot provide one, for this reason.
    Unavailable(String),
    /// The process has no snapshot yet.
    NoParent,
    /// The tracker has just started.
    JustBegun,
    /// The knowledge of the tracker refers to another snapshot than the parent.
    OtherParent,
    /// The parent had other mappings, or other memory was left out of it.
    OtherLayout,
    /// The parent cannot be compared with: it has another region size or is damaged. Or there is
    /// damage in the store, which this capture repairs by reading everything.
    ParentUnusable,
    /// Tracking was interrupted: the memory was replaced by another mapping.
    Interrupted,
}

impl TrackMethod {
    /// Its name: `host-ranges`, `write-protection`, `soft-dirty`, `copy-on-write`.
    pub fn name(self) -> &'static str {
        match self {
            TrackMethod::DirtyRanges => "host-ranges",
            TrackMethod::WriteProtection => "write-protection",
            TrackMethod::SoftDirty => "soft-dirty",
            TrackMethod::CopyOnWrite => "copy-on-write",
        }
    }
}

impl Tracking {
    /// The name of the method: `host-ranges`, `write-protection`, `soft-dirty`, `copy-on-write`, or
    /// `rescan`.
    pub fn name(&self) -> &'static str {
        match self {
            Tracking::By(means) => means.name(),
            Tracking::Rescan(_) => "rescan",
        }
    }
}

impl serde::Serialize for Tracking {
    /// Its name.
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

impl fmt::Display for Tracking {
    /// The name of the method and, for a rescan, the reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Tracking::By(means) => f.write_str(means.name()),
            Tracking::Rescan(why) => write!(f, "rescan: {why}"),
        }
    }
}

impl fmt::Display for RescanReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RescanReason::NoTracker => "its changes are not tracked",
            RescanReason::Unavailable(why) => why,
            RescanReason::NoParent => "there is no snapshot to compare with",
            RescanReason::JustBegun => "tracking began with this snapshot",
            RescanReason::OtherParent => "what is tracked refers to another snapshot than the parent",
            RescanReason::OtherLayout => {
                "the mappings, or what is left out of them, were others in the parent"
            }
            RescanReason::ParentUnusable => "the parent cannot be compared with, or there is damage to mend",
            RescanReason::Interrupted => "other memory was mapped in its place",
        })
    }
}

/// A tracker that cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// This machine does not support this method.
    #[error("changes cannot be tracked by {}: {why}", means.name())]
    Unavailable {
        /// The requested method.
        means: TrackMethod,
        /// The missing feature or permission, and how to provide it.
        why: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A range lies outside the memory.
    #[error("the changed range {range} is not inside the memory, which has {memory_bytes} bytes")]
    Outside {
        /// The range.
        range: AddressRange,
        /// The length of the memory that the tracker was made for.
        memory_bytes: u64,
    },
    /// A bitmap does not match the length of its memory.
    #[error(
        "a bitmap with one bit for each {page_bytes} bytes of {memory_bytes} must have {expected_words} \
         words, found {found_words}"
    )]
    Bitmap {
        /// How many bytes one bit stands for.
        page_bytes: u64,
        /// The length of the memory.
        memory_bytes: u64,
        /// How many words the bitmap must have.
        expected_words: u64,
        /// How many words it has.
        found_words: u64,
    },
    /// A bitmap has a bit set for bytes after the end of the memory.
    #[error(
        "bit {bit} of the bitmap is set, which is of bytes after the end of the memory of {memory_bytes} \
         bytes"
    )]
    BitOutside {
        /// The bit.
        bit: u64,
        /// The length of the memory.
        memory_bytes: u64,
    },
    /// The tracker was made for another memory.
    #[error(
        "the tracker was made for {expected}, found {found}; use it with the memory that it was made for, and \
         report it when that memory grows"
    )]
    OtherMemory {
        /// The memory that it was made for.
        expected: String,
        /// The memory that it was used with.
        found: String,
    },
    /// The memory does not begin at a page boundary.
    #[error("tracked memory must begin at a page, a multiple of {page_bytes}; found address {address:#x}")]
    NotAligned {
        /// Where it begins.
        address: u64,
        /// The page size.
        page_bytes: u64,
    },
    /// The memory is not mapped, or is shared, or belongs to a file: others could write it
    /// unnoticed.
    #[error("only private memory without a file behind it can be tracked; at {range} there is {found}")]
    NotPrivate {
        /// The addresses.
        range: AddressRange,
        /// The mapping that was found there.
        found: String,
    },
    /// Another tracker, or another userfaultfd, is registered with the memory.
    #[error("the memory at {range} is tracked already; drop the other tracker or userfaultfd first")]
    AlreadyTracked {
        /// The addresses.
        range: AddressRange,
    },
    /// The tracker was made before a `fork`, and this is the child process.
    #[error("the tracker was made by process {made_by}, this is {used_by}; make a new one after a fork")]
    OtherPid {
        /// The pid of the process that made it.
        made_by: u32,
        /// The pid of the process that uses it.
        used_by: u32,
    },
    /// The operating system failed.
    #[error("cannot {action}")]
    System {
        /// The action that failed.
        action: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// Fails unless `space` has exactly one captured mapping, of this length: the memory of a tracker
/// of one memory.
fn check_one_memory(space: &AddressSpace, memory_bytes: u64) -> Result<(), TrackError> {
    let found: Vec<u64> = space.captured().map(|(_, mapping)| mapping.range.length_bytes()).collect();
    let fits = match found[..] {
        [] => memory_bytes == 0,
        [length_bytes] => space.mappings().len() == 1 && length_bytes == memory_bytes,
        _ => false,
    };
    if fits {
        return Ok(());
    }
    Err(TrackError::OtherMemory {
        expected: format!("one memory of {memory_bytes} bytes"),
        found: match found[..] {
            [length_bytes] => format!("one of {length_bytes} bytes"),
            _ => format!("{} mappings", space.mappings().len()),
        },
    })
}
