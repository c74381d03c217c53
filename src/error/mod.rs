//! The error of every verb. It wraps the errors of the layers below, each once.
//!
//! It is above the store, the sources and the sinks, which have their own errors, and below the
//! verbs. The other errors of verbs are here too: those of memory that a restore maps, of
//! rollbacks, and of reading a snapshot's memory.

mod memory;
mod read;
mod rollback;

use crate::progress::Interrupted;
use crate::sink::SinkError;
use crate::source::SourceError;
use crate::store::error::StoreError;
use crate::units::UnitError;

pub use memory::MemoryError;
pub use read::ReadError;
pub use rollback::RollbackError;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store cannot be read or written, or does not have what was requested.
    #[error(transparent)]
    Store(StoreError),
    /// The source of memory cannot be used.
    #[error(transparent)]
    Source(SourceError),
    /// The target of the memory cannot be used.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// Memory of this process cannot be mapped or filled.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory cannot be rolled back.
    #[error(transparent)]
    Rollback(#[from] RollbackError),
    /// Memory of a snapshot cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is not enough memory for the copy of a source that is made while the source is paused.
    #[error(
        "cannot allocate {bytes} bytes of memory to copy the source into; raise the limit of the address space \
         (`ulimit -v`), or set a smaller `staging_bytes`, which makes the pause longer"
    )]
    Staging {
        /// How much was requested.
        bytes: u64,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A number or a range breaks a rule of its type.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// The verb was cancelled by its [`Progress`](crate::Progress).
    #[error("interrupted before it was complete; the store is intact")]
    Interrupted,
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Error {
        match error {
            SourceError::Interrupted => Error::Interrupted,
            error => Error::Source(error),
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        match error {
            StoreError::Interrupted => Error::Interrupted,
            error => Error::Store(error),
        }
    }
}

impl From<Interrupted> for Error {
    fn from(_: Interrupted) -> Error {
        Error::Interrupted
    }
}
