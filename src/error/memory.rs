//! The errors of memory that a restore maps in this process.

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
        /// The operating system's error.
        source: io::Error,
    },
    /// The memory cannot become this long.
    #[error(
        "the memory cannot grow to {wanted_bytes} bytes: {reserved_bytes} bytes are reserved for it; reserve \
         more"
    )]
    Reserved {
        /// The requested length.
        wanted_bytes: u64,
        /// The length that is reserved.
        reserved_bytes: u64,
    },
    /// The kernel rejects the bytes of a lazy mapping: it has no memory left, or part of the
    /// mapping was unmapped.
    #[error(
        "the lazy mapping cannot be filled at byte {offset_bytes}; check that memory is left and that the \
         mapping still exists"
    )]
    Fill {
        /// The offset in the image.
        offset_bytes: u64,
        /// The operating system's error.
        source: io::Error,
    },
    /// A memory that is filled on the first access could not be filled.
    #[error(
        "the memory is incomplete, because not all of its snapshot could be read; restore another snapshot \
         into it"
    )]
    NotFilled(#[source] Arc<dyn std::error::Error + Send + Sync>),
}
