//! Sinks: the targets of a restore.

pub(crate) mod core;
mod file;
mod in_place;
mod process;

use std::io;
use std::path::PathBuf;

pub(crate) use file::SparseFile;
pub(crate) use in_place::FileInPlace;
pub(crate) use process::ProcessSink;

/// Memory cannot be restored to this target.
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
        /// The address at which it begins.
        address: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The operating system refused an operation on a process.
    #[error("cannot {action} process {pid}")]
    LiveProcess {
        /// Its pid.
        pid: u32,
        /// The operation.
        action: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A file with this name exists already.
    #[error("{} exists; choose another name, or overwrite it with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The path has no file name, or names a directory.
    #[error("{} names a directory; name a file in it", path.display())]
    Directory {
        /// The given path.
        path: PathBuf,
    },
    /// The path names something other than a regular file. Replacing it would harm its users.
    #[error(
        "{} is {found} and no plain file, so it is not replaced; choose another name, or remove it first",
        path.display()
    )]
    NoPlainFile {
        /// The given path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The target of a write in place is not a regular file.
    #[error("{} is not a regular file; name the memory file itself", path.display())]
    NotAFile {
        /// The given path.
        path: PathBuf,
    },
    /// The file to replace is the memory of a process, which would keep the old file.
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
        /// The operation.
        action: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file system does not support files of this length.
    #[error(
        "{} cannot become a file of {bytes} bytes, holes included: its file system does not support files of \
         this length; restore to another file system (xfs, btrfs and tmpfs support files of 8 EiB), or read a \
         part with `stillframe cat --range`",
        path.display()
    )]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The wanted length.
        bytes: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The snapshot cannot be written as a core file.
    #[error("the snapshot cannot be written as a core file: {why}")]
    Core {
        /// The reason.
        why: String,
    },
}
