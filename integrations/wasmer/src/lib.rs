//! A Wasmer journal on a [stillframe] store.
//!
//! Wasmer's WASIX runtime writes the actions of a process to a journal, and resumes the process
//! from it. With [`StoreJournal`] in place of its log file, each mark in the journal is a snapshot
//! with its own id. A process resumes from the latest snapshot or from any other. The snapshots of
//! one line, and those of many instances, share equal memory. The space of forgotten snapshots is
//! reclaimed.
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
//! let third = store.process("web-1").snapshots()[2].id();
//!
//! let mut runtime = PluggableRuntime::new(Arc::new(tasks));
//! // Instead of LogFileJournal::new("web-1.journal")?
//! let journal = Arc::new(StoreJournal::open(&store, "web-1", Resume::At(third))?);
//! runtime.add_writable_journal(journal);
//! # Ok(())
//! # }
//! ```
//!
//! # How a journal is stored
//!
//! | in the journal | in the store |
//! |---|---|
//! | a memory extent (512-byte cells, LZ4) | writes to the parent's memory; changed regions are stored |
//! | a snapshot mark | a durable snapshot with the trigger; its parent is the last one |
//! | module, threads, other entries | an attachment in Wasmer's format: what a replay needs |
//! | entries after the last mark, exits | nothing |
//!
//! # Requirements
//!
//! Wasmer uses a journal only under conditions, which `README.md` of this crate lists: the guest
//! was asyncified and exports its stack, the module hash is the hash of the module's bytes, and a
//! trigger is set.
//!
//! [`import`] reads a journal file into a store, [`export`] writes one.
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
