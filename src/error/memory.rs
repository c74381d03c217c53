//! What can go wrong with memory that a restore maps in this process.

use std::io;
use std::sync::Arc;

/// Why memory cannot be mapped or filled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The image does not fit into this machine's address space.
    #[error("an image of {bytes} bytes cannot be mapped")]
    Mapping {
        /// The size of the image.
        bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// A memory cannot become so long.
    #[error(
        "the memory cannot grow to {wanted_bytes} bytes: {reserved_bytes} bytes are reserved for it; reserve \
         more"
    )]
    Reserved {
        /// The length asked for.
        wanted_bytes: u64,
        /// How long it can become.
        reserved_bytes: u64,
    },
    /// The kernel does not take the bytes of a lazy mapping: it has no memory left, or part of the
    /// mapping was unmapped.
    #[error(
        "the lazy mapping cannot be filled at byte {offset_bytes}; check that memory is left and that the \
         mapping still exists"
    )]
    Fill {
        /// Where in the image.
        offset_bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// A memory that is filled on first touch could not be filled.
    #[error(
        "the memory is incomplete, because not all of its snapshot could be read; restore another snapshot \
         into it"
    )]
    NotFilled(#[source] Arc<dyn std::error::Error + Send + Sync>),
}
