//! A content-addressed, deduplicating checkpoint store for process and guest memory.
//!
//! stillframe captures the memory of Linux processes, WebAssembly instances and microVM guests. It
//! cuts the memory into regions, stores each distinct region once under its full BLAKE3 hash, and
//! stores changed regions as deltas. It restores any snapshot by id: into mapped memory, on page
//! faults (userfaultfd), copy-on-write from a template, or in place into a running process. Space
//! from forgotten snapshots is reclaimed by an online garbage collection.
//!
//! It is not CRIU: files, sockets and other kernel objects are not captured. It runs on Linux only.
//!
//! # Example
//!
//! ```
//! use stillframe::{CaptureOptions, GcOptions, Store};
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("vault");
//! let store = Store::options().create(&path)?;                // or Store::open(&path)
//!
//! let memory = vec![7u8; 1 << 20];                            // or FileSource, LiveProcessSource
//! let taken = store.process("web-1").capture(&memory, &CaptureOptions::new())?;
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
//! let freed = store.gc(&GcOptions::new())?.freed_bytes;
//! # assert!(freed > 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Terms
//!
//! | term | meaning |
//! |---|---|
//! | process | a named line of snapshots, of whatever memory: `web-1`, `vm-7` |
//! | live process | a process of the operating system, named by its pid |
//! | address space | the mappings of a process: address range, protection, kind, name |
//! | region | a chunk of a mapping, counted from its start; 16 KiB by default; the deduplicated unit |
//! | snapshot | the record of one moment: its mappings and, in tables, the hash of every region |
//! | image | the bytes that a restore writes: all captured mappings, side by side |
//! | pack | an append-only file of objects: regions, tables, records and others |
//! | index | a sled database with the place of each object; a cache that can be rebuilt from the packs |
//!
//! # Where to start
//!
//! - *Capture*: [`Process::capture`] takes any [`Source`](source::Source): bytes,
//!   [`FileSource`](source::FileSource), [`LiveProcessSource`](source::LiveProcessSource) (a live
//!   process), [`CoreSource`](source::CoreSource) (a core file), [`LiveMemory`] (memory of this
//!   process that others write meanwhile).
//! - *Dirty tracking*: a further snapshot stores only what changed. It also takes time only for
//!   that when the dirty pages are known. [`DirtyRanges`](track::DirtyRanges) takes the dirty
//!   ranges or the dirty bitmap of a hypervisor. [`LiveMemory`] uses the kernel's write protection.
//!   [`Process::start_capture`] returns as soon as the dirty memory is copied.
//! - *Restore*: [`Store::restore`] decodes into a mapping, a slice or a file.
//!   [`Restore::into_lazy`] maps the memory at once and fills it on page faults.
//!   [`Store::template`] restores once and makes copy-on-write instances.
//! - *Rollback*: [`Store::rollback`] writes only what differs, into memory of this process or into
//!   a live process.
//! - *Memory in place*: [`Reservation`] keeps a growing memory at one address, for WebAssembly
//!   engines.
//! - *The past*: [`Store::diff`] and [`Store::history`] compare snapshots without restoring them.
//!
//! The root of the crate has the types of daily use. Each verb and each kind of object has a module
//! with its options, its report and its error: [`source`], [`capture`], [`track`]; [`restore`],
//! [`lazy`], [`template`], [`rollback`], [`coredump`]; [`store`], [`snapshot`], [`record`],
//! [`diff`], [`history`]; [`forget`], [`gc`]; [`verify`], [`repair`], [`migrate`].
//!
//! # Threads and processes
//!
//! A [`Store`] is `Send + Sync`. Captures of different processes run in parallel; captures of the
//! same process queue. One process of the operating system owns a store at a time. Another one that
//! opens it gets [`StoreError::Owned`](store::StoreError::Owned), or waits
//! ([`StoreOptions::wait`]).
//!
//! # Guarantees
//!
//! When [`Process::capture`] or [`PendingCapture::wait`](capture::PendingCapture::wait) returns,
//! the snapshot is durable. Every read is checked. A crash at any moment loses no acknowledged
//! snapshot. `docs/reliability.md` names the test behind each guarantee, `docs/design.md` explains
//! the mechanisms, `docs/format.md` specifies the files; on docs.rs they are in the module `docs`.
//!
//! # Features
//!
//! - `cli` (default): what the `stillframe` command needs. Use `default-features = false` for the
//!   library alone.
//! - `conformance`: tests for your own implementations of `Source` and `Tracker`.
//! - `fault-injection`: for tests of this crate and of yours; see the module of that name. Do not
//!   ship it.
//! - `fuzzing`: the functions that the fuzz targets of this crate call. Do not ship it.
#![deny(missing_docs)]

/// A doc-test compiles the code of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod address_space;
pub mod capture;
pub mod codec;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod coredump;
mod delta;
mod descriptors;
pub mod diff;
#[cfg(all(doc, not(doctest)))]
pub mod docs;
mod elf;
pub mod error;
pub mod forget;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod gc;
mod hash;
pub mod history;
mod labels;
pub mod lazy;
mod left_out;
mod mapped_files;
pub mod migrate;
#[path = "../migrations/mod.rs"]
mod migrations;
mod process;
mod progress;
pub mod ranges;
pub mod record;
mod region;
pub mod repair;
mod report;
mod reservation;
pub mod restore;
pub mod rollback;
mod root;
mod run;
mod same_process;
mod signals;
pub mod sink;
pub mod snapshot;
pub mod source;
pub mod stats;
pub mod store;
mod sync;
mod sys;
mod table;
pub mod template;
pub mod text;
pub mod threads;
pub mod track;
pub mod units;
pub mod verify;
mod workers;

/// Intercepts the file operations of a store, so that a test can observe them and make them fail.
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
/// assert!(store.process("web-1").capture(&[7; 1000], &CaptureOptions::new()).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "fault-injection")]
pub mod fault_injection {
    pub use crate::store::packs::sealing::{Sealing, seal_packs_at};
    pub use crate::sys::call::{Call, Watching, Witness, watch};
}

pub use capture::{CaptureOptions, CaptureStats};
pub use error::Error;
pub use gc::GcOptions;
pub use hash::Hash;
pub use process::Process;
pub use progress::Progress;
pub use record::SnapshotId;
pub use reservation::Reservation;
pub use restore::Restore;
pub use rollback::Rollback;
pub use snapshot::Snapshot;
pub use source::LiveMemory;
pub use store::{Store, StoreOptions};
pub use template::Template;
pub use units::{AddressRange, RegionSize};
