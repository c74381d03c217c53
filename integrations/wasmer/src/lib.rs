//! Wasmer's journal on a [stillframe] store.
//!
//! Wasmer's WASIX runtime writes what a process does to a journal, and resumes the process from it. [`StoreJournal`]
//! replaces Wasmer's log file: each snapshot mark in the journal becomes a snapshot with an id. A process resumes from
//! the latest snapshot or from any other. All snapshots of all instances share equal regions, and the space of forgotten
//! snapshots is reclaimed.
//!
//! ```no_run
//! use std::sync::Arc;
//! use stillframe::Store;
//! use stillframe_wasmer::{Resume, StoreJournal};
//! use wasmer_wasix::runtime::{PluggableRuntime, task_manager::tokio::TokioTaskManager};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let tasks = TokioTaskManager::new(tokio::runtime::Runtime::new()?);
//!
//! let store = Arc::new(Store::options().open_or_create("vault")?);
//! let third = store.process("web-1").snapshots()[2];
//!
//! let mut runtime = PluggableRuntime::new(Arc::new(tasks));
//! // Instead of LogFileJournal::new("web-1.journal")?
//! let journal = Arc::new(StoreJournal::open(&store, "web-1", Resume::At(third))?);
//! runtime.add_writable_journal(journal);
//! # Ok(())
//! # }
//! ```
//!
//! # What becomes what
//!
//! | in the journal | in the store |
//! |---|---|
//! | a memory extent, 512-byte cells in LZ4 | written over the parent's memory; what changed is stored, in the store's regions |
//! | a snapshot mark | one snapshot, durable, with the trigger; its parent is the one that was resumed or came before |
//! | module, threads, all other entries | an attachment, in Wasmer's own form: all of the line that a replay still needs |
//! | entries after the last mark, exits | nothing |
//!
//! # Requirements
//!
//! Wasmer uses a journal only under conditions, which `README.md` of this crate lists: an asyncified guest that exports
//! its stack, a module hash of the module's own bytes, a trigger.
//!
//! [`import`] reads a journal file, [`export`] writes one.
#![deny(missing_docs)]

/// The code of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod encoding;
mod entries;
mod error;
mod extents;
mod file;
mod journal;
mod line;
mod replay;
#[cfg(test)]
mod samples;

pub use error::{Damage, Error};
pub use file::{Import, export, import};
pub use journal::{Resume, StoreJournal};
