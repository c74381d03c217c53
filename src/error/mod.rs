//! The error of every verb: what can go wrong below, wrapped once.
//!
//! It stands above the store, the sources and the sinks, which have errors of their own, and below the verbs. The errors
//! that verbs have besides are here too: of memory that a restore maps, of rollbacks, of reading a snapshot out.

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
    /// The store cannot be read or written, or does not have what was asked for.
    #[error(transparent)]
    Store(StoreError),
    /// The source of memory cannot be used.
    #[error(transparent)]
    Source(SourceError),
    /// The place where memory was to go cannot be used.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// Memory of this process cannot be mapped or filled.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory cannot be rolled back.
    #[error(transparent)]
    Rollback(#[from] RollbackError),
    /// Memory of a snapshot cannot be read out.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no memory to copy a source into that stands still.
    #[error(
        "cannot allocate {bytes} bytes of memory to copy the source into; raise the limit of the address space \
         (`ulimit -v`), or set a smaller `staging_bytes`, which makes the pause longer"
    )]
    Staging {
        /// How much was asked for.
        bytes: u64,
        /// What the operating system said.
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
