//! Sinks: where memory goes back to.

pub(crate) mod core;
mod file;
mod in_place;
mod process;

use std::io;
use std::path::PathBuf;

pub(crate) use file::SparseFile;
pub(crate) use in_place::FileInPlace;
pub(crate) use process::ProcessSink;

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
    /// Memory of this process cannot be written.
    #[error("the memory at {address:#x} cannot be written; check that it is still mapped and writable")]
    Memory {
        /// Where it begins.
        address: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The operating system refused something about a process.
    #[error("cannot {action} process {pid}")]
    LiveProcess {
        /// Its pid.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// What it said.
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
    /// What would be overwritten is no plain file, and what depends on it would be harmed.
    #[error(
        "{} is {found} and no plain file, so it is not replaced; choose another name, or remove it first",
        path.display()
    )]
    NoPlainFile {
        /// The path given.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// What is to be written in place is no plain file.
    #[error("{} is not a regular file; name the memory file itself", path.display())]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// The file to be replaced is the memory of a process, which would keep the old one.
    #[error(
        "process {pid} ({name}) has {} mapped and would keep the old file; --in-place writes into the existing \
         file, so that this process sees the change",
        path.display()
    )]
    Mapped {
        /// The file.
        path: PathBuf,
        /// Its pid.
        pid: u32,
        /// Its name.
        name: String,
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
    /// The file system has no files so long.
    #[error(
        "{} cannot become a file of {bytes} bytes, holes included: its file system does not support files of \
         this length; restore to another file system (xfs, btrfs and tmpfs support files of 8 EiB), or read a \
         part with `stillframe cat --range`",
        path.display()
    )]
    TooLong {
        /// The file.
        path: PathBuf,
        /// How long it was to be.
        bytes: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The snapshot cannot be written as a core file.
    #[error("the snapshot cannot be written as a core file: {why}")]
    Core {
        /// Why not.
        why: String,
    },
}
