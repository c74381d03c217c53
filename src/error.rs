//! The error of every verb: what can go wrong below, wrapped once.

use crate::sink::SinkError;
use crate::source::SourceError;
use crate::store::error::StoreError;
use crate::units::UnitError;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store cannot be read or written, or does not have what was asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The source of memory cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The place where memory was to go cannot be used.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// There is no memory to copy a source into that stands still.
    #[error(
        "cannot make {bytes} bytes of memory ready to copy the source into; give this program more of the address \
         space (`ulimit -v`), or set a smaller `staging_bytes`: then the source stands still for longer"
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
    #[error("interrupted before it was done; nothing was harmed")]
    Interrupted,
}
