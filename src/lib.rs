//! A content-addressed snapshot store for process memory.
//!
//! stillframe takes the memory of a running thing (a WebAssembly instance, a Linux process, a
//! microVM's memory file), cuts it into regions, stores every distinct region once under its full
//! BLAKE3 hash, and gives any historical snapshot back by id, decompressed straight into mapped
//! memory. Snapshots that are forgotten give their space back.
//!
//! ```
//! use stillframe::{CaptureOptions, GcOptions, Store};
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("vault");
//! let store = Store::options().create(&path)?;                // or Store::open(&path)
//!
//! let memory = vec![7u8; 1 << 20];                            // or FileSource, ProcessSource
//! let taken = store.process("web-1").capture(&memory, &CaptureOptions::default())?;
//!
//! let map = store.restore(taken.id)?.into_mapping()?;         // or into_slice, into_file, into_core
//! assert_eq!(map[..], memory[..]);
//!
//! for region in store.snapshot(taken.id)?.regions()? {
//!     let (addresses, hash) = region?;
//!     println!("{addresses} {hash}");
//! }
//!
//! store.forget(&[taken.id])?;
//! let freed = store.gc(&GcOptions::default())?.freed_bytes;
//! # assert!(freed > 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is what
//!
//! | word | meaning |
//! |---|---|
//! | process | a named line of snapshots, whatever it is a snapshot of |
//! | address space | its mappings: address range, protection, kind, name |
//! | region | one cell of a mapping, counted from the mapping's start; the unit of deduplication |
//! | snapshot | the record of one moment: mappings, and by way of tables the hash of every region |
//! | image | what a restore writes: all captured mappings, one after the other |
//! | pack | an append-only file of objects: regions, tables, records and the rest |
//! | index | a sled database that says where each object is; it can be rebuilt from the packs |
//!
//! # Many snapshots
//!
//! The first snapshot of a process is paid once. Each further one takes the difference, in bytes by
//! itself; in time if it is known what changed: [`HostRanges`] takes the dirty ranges that a hypervisor
//! keeps, [`LiveMemory`] has the kernel note what is written to memory of this process, while
//! that goes on changing. [`Process::start_capture`] returns as soon as what changed is copied.
//!
//! # Threads and processes
//!
//! A [`Store`] is `Send + Sync`. Captures of different processes run at the same time, captures of
//! the same process queue. One process of the operating system owns a store at a time; another one
//! that opens it gets [`StoreError::Owned`], or waits ([`StoreOptions::wait`]).
//!
//! # What is promised
//!
//! When [`Process::capture`] or [`PendingCapture::wait`] returns, the snapshot is durable. Whatever is
//! read is checked. A crash at any moment loses nothing acknowledged. `docs/design.md` explains how,
//! `docs/format.md` specifies the files.
//!
//! # Features
//!
//! `cli` (default): what the `stillframe` command needs. Use `default-features = false` for the
//! library alone.
//!
//! `fault-injection`: for tests, of this crate and of yours; see the module of that name. Nobody ships it.
//!
//! `fuzzing`: what the fuzz targets of this crate call. Nobody ships it either.
#![deny(missing_docs)]

mod address_space;
mod capture;
mod codec;
mod coredump;
mod delta;
mod descriptors;
mod diff;
mod elf;
mod error;
mod forget;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gc;
mod hash;
mod history;
mod labels;
mod lazy;
mod left_out;
mod mapped_files;
mod migrate;
#[path = "../migrations/mod.rs"]
mod migrations;
mod process;
mod progress;
mod ranges;
mod record;
mod region;
mod repair;
mod report;
mod reservation;
mod restore;
mod rollback;
mod root;
mod run;
mod same_process;
mod signals;
mod sink;
mod snapshot;
mod source;
mod stats;
mod store;
mod sync;
mod sys;
mod table;
mod template;
mod text;
mod threads;
mod track;
mod units;
mod verify;
mod workers;

/// Stands between a store and its files, so that a test may watch what it does with them, and have it fail.
///
/// ```
/// use std::io;
/// use std::sync::Arc;
/// use stillframe::fault_injection::{Call, Witness, watch};
/// use stillframe::{CaptureOptions, Store};
///
/// struct NothingIsDurable;
///
/// impl Witness for NothingIsDurable {
///     fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
///         match call {
///             Call::Sync(..) => Err(io::Error::other("no such luck")),
///             _ => act(),
///         }
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("vault");
/// let store = Store::options().create(&path)?;
/// let _watching = watch(&path, Arc::new(NothingIsDurable));
/// assert!(store.process("web-1").capture(&[7; 1000], &CaptureOptions::default()).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "fault-injection")]
pub mod fault_injection {
    pub use crate::store::packs::sealing::{Sealing, seal_packs_at};
    pub use crate::sys::call::{Call, Watching, Witness, watch};
}

pub use address_space::{AddressSpace, AddressSpaceError, Mapping, MappingKind, Protection};
pub use capture::{Capture, CaptureOptions, PendingCapture};
pub use codec::{Codec, CodecError};
pub use coredump::CoreStats;
pub use diff::{Diff, DiffOptions};
pub use error::{Error, MemoryError, ReadError, RollbackError};
pub use forget::{ForgetPlan, KeepPolicy};
pub use gc::{GcOptions, GcStats};
pub use hash::Hash;
pub use history::{History, Moment};
pub use lazy::{Fill, Filled, HotSet, LazyMapping};
pub use left_out::{LeftOut, WhyLeftOut};
pub use migrate::Migration;
pub use process::Process;
pub use progress::Progress;
pub use ranges::Ranges;
pub use record::{AttachmentRef, Origin, Record, RecordError, SnapshotId, Trigger};
pub use repair::{RepairOptions, RepairReport};
pub use reservation::Reservation;
pub use restore::{Restore, RestoreStats};
pub use rollback::{RollBack, RollBackStats};
pub use sink::SinkError;
pub use snapshot::{ProcessSummary, Snapshot};
pub use source::{
    Attachment, Compression, CopyOut, CoreSource, FileSource, Frozen, InPlace, LiveMemory, Memory, OneMemory,
    OpenCore, ProcessSource, Source, SourceError, SourceExt, Tracked,
};
pub use stats::Stats;
pub use store::catalog::Labels;
pub use store::error::StoreError;
pub use store::id::StoreId;
pub use store::packs::object::Kind;
pub use store::read::Check;
pub use store::{Store, StoreInfo, StoreOptions};
pub use table::REGIONS_PER_TABLE;
pub use template::{Instance, Template};
pub use text::{is_control, printable};
pub use threads::{RegisterSet, Thread, Threads};
pub use track::{HostRanges, Means, Taken, TrackError, Tracker, Tracking, Untracked};
pub use units::{AddressRange, RegionSize, UnitError};
pub use verify::{Problem, VerifyOptions, VerifyReport};
