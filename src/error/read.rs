//! The errors of reading a snapshot's memory, except those of the store.

use std::io;

use crate::units::AddressRange;

/// Why memory of a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A range is not part of the snapshot, or not entirely.
    #[error("{missing} is not captured in this snapshot; `stillframe show` lists what is captured")]
    NotCaptured {
        /// The first part that is not.
        missing: AddressRange,
    },
    /// The writer returned an error.
    #[error("cannot write the memory out")]
    Write(#[source] io::Error),
}
