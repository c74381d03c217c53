//! Sinks: where memory goes back to.

pub(crate) mod core;
mod file;
mod in_place;
mod process;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::units::AddressRange;

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
    /// The bytes to roll back are not those of the [`LiveMemory`](crate::LiveMemory) they are said to be.
    #[error(
        "expected the {expected_bytes} bytes at {expected_address:#x}, which the live memory is made for, \
         found {found_bytes} at {found_address:#x}"
    )]
    OtherMemory {
        /// Where the live memory begins.
        expected_address: u64,
        /// Its length.
        expected_bytes: u64,
        /// Where the bytes given begin.
        found_address: u64,
        /// Their length.
        found_bytes: u64,
    },
    /// Memory of this process cannot be written.
    #[error("the memory at {address:#x} cannot be written; is it still mapped, and writable?")]
    Memory {
        /// Where it begins.
        address: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// Nothing can be rolled back in this process, or not to this snapshot. It is as it was.
    #[error("process {pid} cannot be rolled back: {why}")]
    NoRollBack {
        /// Its pid.
        pid: u32,
        /// Why not.
        why: String,
    },
    /// The process is not what it was in the snapshot, and was left as it is.
    #[error("process {pid} does not fit the snapshot and was left as it is: {}{}", shown(differences), advised(*only_new, *advice))]
    DoesNotFit {
        /// Its pid.
        pid: u32,
        /// What differs.
        differences: Vec<String>,
        /// Whether all of this is memory that it got since.
        only_new: bool,
        /// How it can be rolled back all the same, where it can.
        advice: Option<&'static str>,
    },
    /// Writing was begun and failed. The process stands still, as it must not go on like this.
    #[error(
        "process {pid} is rolled back in part and stands still (state T); roll it back once more, then \
         `kill -CONT {pid}` lets it go on"
    )]
    InPart {
        /// Its pid.
        pid: u32,
        /// What failed.
        source: Box<crate::error::Error>,
    },
    /// The operating system refused something about a process.
    #[error("cannot {action} process {pid}")]
    Process {
        /// Its pid.
        pid: u32,
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: io::Error,
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
    /// A memory cannot become so long.
    #[error(
        "the memory cannot have {wanted_bytes} bytes: {reserved_bytes} are set aside for it; set aside more"
    )]
    Reserved {
        /// The length asked for.
        wanted_bytes: u64,
        /// How long it can become.
        reserved_bytes: u64,
    },
    /// A memory that is filled on first touch could not be filled.
    #[error(
        "the memory is not filled, as not all of its snapshot could be read; restore another one into it"
    )]
    NotFilled(#[source] Arc<crate::error::Error>),
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
    #[error("{} is no plain file; name the memory file itself", path.display())]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// The file to be replaced is the memory of a process, which would keep the old one.
    #[error(
        "process {pid} ({name}) has {} mapped and would keep the old file; --in-place writes into it as it is, \
         where that process sees it",
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
        "{} cannot become a file of {bytes} bytes, holes included: its file system has no files so long; restore to \
         another one (xfs, btrfs and tmpfs take files of 8 EiB), or take only what is wanted by `stillframe cat --range`",
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

/// How many differences an error shows.
const SHOWN: usize = 6;

fn shown(differences: &[String]) -> String {
    let more = differences.len().saturating_sub(SHOWN);
    let shown = differences[..differences.len() - more].join("; ");
    if more == 0 { shown } else { format!("{shown}; and {more} more") }
}

/// Stands behind the differences, however many there are.
fn advised(only_new: bool, advice: Option<&'static str>) -> String {
    let for_new = "it can be rolled back around what is new, which then stays (--leave-new-memory)";
    advice.or(only_new.then_some(for_new)).map(|advice| format!("; {advice}")).unwrap_or_default()
}
