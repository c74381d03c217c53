//! Sinks: where memory goes back to.

pub(crate) mod core;
mod file;

use std::io;
use std::path::PathBuf;

use crate::units::AddressRange;

pub(crate) use file::SparseFile;

/// A place that memory cannot be restored to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// The slice is not as long as the image.
    #[error(
        "expected a target of {expected_bytes} bytes, the size of the snapshot's image, found {found_bytes}"
    )]
    Length {
        /// The size of the image.
        expected_bytes: u64,
        /// The size of the slice.
        found_bytes: u64,
    },
    /// The image does not fit into this machine's address space.
    #[error("an image of {bytes} bytes cannot be mapped")]
    Mapping {
        /// The size of the image.
        bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The kernel does not take the bytes of a lazy mapping: it has no memory left, or part of the
    /// mapping was unmapped.
    #[error(
        "the lazy mapping cannot be filled at byte {offset_bytes}; is there memory left, and is it mapped?"
    )]
    Fill {
        /// Where in the image.
        offset_bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is a file already.
    #[error("{} exists; choose another name, or overwrite it with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// There is no file name in the path, or a directory in the file's place.
    #[error("{} names a directory; name a file in it", path.display())]
    Directory {
        /// The path given.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The snapshot cannot be written as a core file.
    #[error("the snapshot cannot be written as a core file: {why}")]
    Core {
        /// Why not.
        why: String,
    },
    /// A range is not, or not wholly, part of the snapshot.
    #[error("{missing} is not captured in this snapshot; `stillframe show` lists what is")]
    NotCaptured {
        /// The first part of it that is not.
        missing: AddressRange,
    },
    /// The writer refused.
    #[error("cannot write the memory out")]
    Write(#[source] io::Error),
}
