//! What can go wrong when memory of a snapshot is read out, besides the store.

use std::io;

use crate::units::AddressRange;

/// Why memory of a snapshot cannot be read out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A range is not, or not wholly, part of the snapshot.
    #[error("{missing} is not captured in this snapshot; `stillframe show` lists what is captured")]
    NotCaptured {
        /// The first part of it that is not.
        missing: AddressRange,
    },
    /// The writer refused.
    #[error("cannot write the memory out")]
    Write(#[source] io::Error),
}
