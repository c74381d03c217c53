//! Sources: where memory comes from.
//!
//! A [`Source`] is opened for each capture, which holds it still where that is needed. What is
//! open is [`Frozen`]: it knows its mappings and how its bytes may be had.

mod bytes;
mod connections;
mod core;
mod descriptors;
mod file;
mod holes;
pub(crate) mod injection;
mod live;
mod mapping_state;
pub(crate) mod maps;
mod mutual;
mod one_memory;
mod patience;
mod proc_directory;
mod process;
mod refusal;
mod regular_file;
mod running;
mod sharers;
pub(crate) mod signals;
mod stop;
mod stuck;
mod tracer;
mod tracked;

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::address_space::{AddressSpace, AddressSpaceError};
use crate::progress::Progress;
use crate::ranges::Ranges;
use crate::record::Origin;
use crate::track::{RescanReason, TrackError, Tracker};
use crate::units::AddressRange;

pub use crate::left_out::{LeftOut, WhyLeftOut};
pub use core::{Compression, CoreSource, OpenCore};
pub use file::FileSource;
pub(crate) use holes::data_in_memory_file;
pub use live::LiveMemory;
pub(crate) use mapping_state::MappingState;
pub use one_memory::OneMemory;
pub(crate) use patience::STOP_TIMEOUT;
pub use process::LiveProcessSource;
pub(crate) use process::{FrozenProcess, ProcessMemory, RSEQ_ATTACHMENT};
pub(crate) use running::RunningProcess;
pub use tracked::{SourceExt, Tracked};

/// Something whose memory can be captured.
///
/// Implemented by `[u8]` and `Vec<u8>` (bytes of this process), [`LiveMemory`] (bytes that others
/// write), [`FileSource`], [`CoreSource`] and [`LiveProcessSource`].
///
/// For a source of one memory, [`OneMemory`] is shorter to implement. A source with several
/// mappings:
///
/// ```
/// use stillframe::address_space::{AddressSpace, Mapping, MappingKind, Protection};
/// use stillframe::source::{Access, Frozen, InPlace, Source, SourceError};
/// use stillframe::{AddressRange, CaptureOptions, Store};
///
/// /// Two segments of an emulator, each at its guest address.
/// struct Guest {
///     space: AddressSpace,
///     segments: [Vec<u8>; 2],
/// }
///
/// impl Source for Guest {
///     fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
///         Ok(Box::new(self))
///     }
/// }
///
/// impl Frozen for &Guest {
///     fn address_space(&self) -> &AddressSpace {
///         &self.space
///     }
///
///     fn access(&self) -> Access<'_> {
///         Access::InPlace(*self)
///     }
/// }
///
/// impl InPlace for Guest {
///     fn bytes(&self, mapping_index: usize) -> &[u8] {
///         &self.segments[mapping_index]
///     }
/// }
///
/// let mapping = |start, name: &str| Mapping {
///     range: AddressRange::with_length(start, 8192).expect("it ends below the last address"),
///     protection: Protection { read: true, write: true, ..Protection::default() },
///     kind: MappingKind::Anonymous,
///     name: name.to_owned(),
///     file_offset_bytes: 0,
///     captured: true,
/// };
/// let space = AddressSpace::new(vec![mapping(0x1000, "ram"), mapping(0x10_0000, "rom")])?;
/// let guest = Guest { space, segments: [vec![1; 8192], vec![2; 8192]] };
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let taken = store.process("guest").capture(&guest, &CaptureOptions::new())?;
/// let mut bytes = Vec::new();
/// store.snapshot(taken.id)?.read_range("0x100000..0x100004".parse()?, &mut bytes)?;
/// assert_eq!(bytes, [2; 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Source {
    /// Opens the source for one capture. A live process is paused from here until
    /// [`Frozen::release`].
    ///
    /// # Errors
    ///
    /// If the source cannot be found, read or paused.
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError>;

    /// As [`open`](Self::open), but stops waiting when `progress` is cancelled. Only a source that
    /// may wait for another process needs to implement this.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and [`SourceError::Interrupted`].
    fn open_unless_cancelled(&self, progress: &Progress) -> Result<Box<dyn Frozen + '_>, SourceError> {
        if progress.is_cancelled() { Err(SourceError::Interrupted) } else { self.open() }
    }

    /// The tracker of its changes, or the reason why there is none. Without one everything is read.
    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        Err(RescanReason::NoTracker)
    }
}

/// An open source. Dropping it releases it.
///
/// Only the mappings and their bytes are required. The defaults are those of plain bytes that are
/// not paused: all of each captured mapping is populated and readable, and nothing is kept beside
/// it. A source that has no mappings implements [`OneMemory`] instead.
pub trait Frozen {
    /// The mappings, each marked whether it is to be captured.
    fn address_space(&self) -> &AddressSpace;

    /// How the bytes may be had.
    fn access(&self) -> Access<'_>;

    /// What the record says about where the memory came from.
    fn origin(&self) -> Origin {
        Origin::Bytes
    }

    /// What is kept beside the memory, by name.
    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    /// The byte ranges of mapping `mapping_index`, from the mapping's start, that may hold
    /// anything but zeros. They are inside the mapping.
    ///
    /// # Errors
    ///
    /// When the source went away.
    fn populated(&self, mapping_index: usize) -> Result<Ranges, SourceError> {
        let mapping = self.address_space().mappings().get(mapping_index);
        Ok(mapping.map(|mapping| 0..mapping.range.length_bytes()).into_iter().collect())
    }

    /// What of its captured mappings cannot be had, and why; in the order of the addresses. It is
    /// not [populated](Self::populated).
    fn left_out(&self) -> Vec<LeftOut> {
        Vec::new()
    }

    /// Resumes a live process and says for how long it was paused; for others zero. Afterwards its
    /// bytes cannot be had any more. Calling it again does nothing and gives the same answer.
    fn release(&self) -> Duration {
        Duration::ZERO
    }
}

/// How the bytes of an open source may be had.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Access<'a> {
    /// They lie in this process and can be read in place, by many threads.
    InPlace(&'a (dyn InPlace + Sync)),
    /// They can be copied out at any time, by many threads.
    Shared(&'a (dyn CopyOut + Sync)),
    /// They can be copied out until the source is released, by many threads.
    SharedUntilRelease(&'a (dyn CopyOut + Sync)),
    /// They can be copied out until the source is released, by the thread that opened it.
    UntilRelease(&'a dyn CopyOut),
}

/// Bytes that can be read in place.
pub trait InPlace {
    /// All bytes of mapping `mapping_index`.
    fn bytes(&self, mapping_index: usize) -> &[u8];
}

/// Bytes that must be copied out.
pub trait CopyOut {
    /// Fills `buffer` with the bytes of mapping `mapping_index` from `offset_bytes` on. Bytes that
    /// cannot be read are filled with zeros, and their address range is added to `unreadable`.
    ///
    /// # Errors
    ///
    /// If the source no longer exists or became shorter.
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError>;

    /// Copies several ranges of a mapping, in order, side by side. The length of `buffer` is their
    /// total length.
    ///
    /// # Errors
    ///
    /// As [`copy_out`](Self::copy_out).
    fn copy_ranges(
        &self,
        mapping_index: usize,
        ranges: &[Range<u64>],
        mut buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        for range in ranges {
            // The caller's buffer has room for all ranges.
            let length_bytes = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(length_bytes);
            self.copy_out(mapping_index, range.start, part, unreadable)?;
            buffer = rest;
        }
        Ok(())
    }
}

/// Something kept beside the memory of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// What it is.
    pub name: String,
    /// Its bytes; at most 256 MiB.
    pub bytes: Vec<u8>,
}

/// The attachment that says who owns what was captured: of a process its real and its effective
/// user, of a file its owner twice; 4 bytes each, little-endian.
pub(crate) const OWNER_ATTACHMENT: &str = "owner";

fn owner_attachment((real, effective): (u32, u32)) -> Attachment {
    let bytes = [real.to_le_bytes(), effective.to_le_bytes()].concat();
    Attachment { name: OWNER_ATTACHMENT.to_owned(), bytes }
}

/// A source that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// No live process has this pid.
    #[error("no process has the pid {pid}; it never ran or has ended")]
    NoSuchPid {
        /// The pid given.
        pid: u32,
    },
    /// The live process ended before its memory was copied.
    #[error("process {pid} ended during the capture; nothing was recorded")]
    LiveProcessEnded {
        /// Its pid.
        pid: u32,
    },
    /// The kernel does not let us stop or read the live process.
    #[error("no permission to {action} process {pid}; {advice}")]
    NotPermitted {
        /// Its pid.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// What may help.
        advice: String,
    },
    /// The process is of our own user and has made itself undumpable: only root may look into it.
    #[error(
        "no permission to {action} process {pid}: it runs as the same user, but has made itself undumpable (prctl PR_SET_DUMPABLE, as \
         programs that keep keys do, or it was started with more rights); run as root (CAP_SYS_PTRACE), or let \
              the process call prctl(PR_SET_DUMPABLE, 1)"
    )]
    Undumpable {
        /// Its pid.
        pid: u32,
        /// The action that failed.
        action: &'static str,
    },
    /// A thread of the process did not stop in time. All threads were resumed.
    #[error(
        "process {pid} did not stop within {timeout:?}: {why}; {}",
        if paused.is_zero() { "no thread was paused".to_owned() } else { format!("its other threads were paused for {paused:.1?}") }
    )]
    DidNotStop {
        /// Its pid.
        pid: u32,
        /// Which thread, and why not, as far as the kernel tells.
        why: String,
        /// How long it might take.
        timeout: Duration,
        /// For how long threads were paused for nothing.
        paused: Duration,
    },
    /// It was given up, as its [`Progress`] was cancelled. All threads go on.
    #[error("interrupted before the source was opened; nothing was changed")]
    Interrupted,
    /// The live process cannot be captured, whatever the caller's rights.
    #[error("process {pid} cannot be captured: {why}")]
    Uncapturable {
        /// Its pid.
        pid: u32,
        /// Why not.
        why: String,
    },
    /// The bytes of a live process were asked for after it was released.
    #[error("process {pid} runs again already; copy its bytes before it is released")]
    Released {
        /// Its pid.
        pid: u32,
    },
    /// The operating system refused something else about a live process.
    #[error("cannot {action} process {pid}")]
    LiveProcess {
        /// Its pid.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The memory file cannot be opened or read.
    #[error("cannot {action} the memory file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The memory file is something else: a directory, a pipe, empty.
    #[error("{} cannot be captured: {why}", path.display())]
    NotAMemoryFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// The file is no core, or a damaged one, or one that cannot be read.
    #[error("{} cannot be captured as a core file: {why}", path.display())]
    NotACore {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The memory file became shorter while it was read.
    #[error(
        "the memory file {} became shorter while it was read: expected {expected_bytes} bytes, \
         it ended before byte {found_bytes}; capture it when nothing writes to it",
        path.display()
    )]
    CutShort {
        /// The file.
        path: PathBuf,
        /// Its length when it was opened.
        expected_bytes: u64,
        /// Where reading ended.
        found_bytes: u64,
    },
    /// Memory of this process cannot be read.
    #[error("the memory at {address:#x} cannot be read; check that it is still mapped and readable")]
    Memory {
        /// Where it begins.
        address: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The changes in the source cannot be determined.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// The mappings are not consistent.
    #[error("the mappings of the source cannot be used")]
    AddressSpace(#[from] AddressSpaceError),
}
