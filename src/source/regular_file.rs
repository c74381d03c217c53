//! A regular file that is read by positioned reads: a memory file, a core.
//!
//! It is never mapped. If the file were truncated meanwhile, a page fault in the mapping would kill
//! the program with SIGBUS, whereas a read only ends early.

use std::fs::{File, FileType};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::SourceError;
use super::holes::data_ranges;
use crate::ranges::Ranges;

/// An open file, with its length at the time of opening.
pub(super) struct RegularFile {
    file: File,
    /// Absolute if the current directory is known.
    path: PathBuf,
    length_bytes: u64,
    owner: Option<u32>,
}

impl RegularFile {
    /// Opens a file that is not empty.
    pub(super) fn open(path: &Path) -> Result<RegularFile, SourceError> {
        let failed = |action| {
            let path = path.to_owned();
            move |source: io::Error| SourceError::File { path, action, source }
        };
        let refused = |why| SourceError::NotAMemoryFile { path: path.to_owned(), why };
        let check_type = |found| why_not_a_memory_file(found).map_or(Ok(()), |why| Err(refused(why)));
        // The kind is checked before opening, because opening a device can have effects, and again
        // afterwards, because the path may have changed by then.
        let seen = std::fs::metadata(path).map_err(failed("find"))?;
        check_type(seen.file_type())?;
        // NONBLOCK: opening a pipe must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed("open")(errno.into()))?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(failed("look at"))?;
        check_type(metadata.file_type())?;
        let length_bytes = metadata.len();
        if length_bytes == 0 {
            return Err(refused("it is empty"));
        }
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let owner = Some(metadata.uid());
        Ok(RegularFile { file, path, length_bytes, owner })
    }

    /// The same path with other content of this length: the decompressed file.
    pub(super) fn with_content(&self, content: File, length_bytes: u64) -> RegularFile {
        RegularFile { file: content, path: self.path.clone(), length_bytes, owner: self.owner }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The user who owns it.
    pub(super) fn owner(&self) -> Option<u32> {
        self.owner
    }

    pub(super) fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// The parts of `within` that may have content other than zeros, in bytes from the file's
    /// start.
    pub(super) fn data(&self, within: Range<u64>) -> Result<Ranges, SourceError> {
        // If the file system does not report holes, everything may be data.
        let ranges = data_ranges(&self.file, within.clone()).unwrap_or_else(|_| within.into());
        // A truncated tail looks like a hole, but it is not zeros.
        let now_bytes = self.file.metadata().map_err(self.error("look at"))?.len();
        if now_bytes < self.length_bytes { Err(self.cut_short(now_bytes)) } else { Ok(ranges) }
    }

    /// Fills `buffer` from an offset on.
    pub(super) fn read(&self, at_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let mut copied_bytes = 0;
        while copied_bytes < buffer.len() {
            let at = at_bytes.saturating_add(copied_bytes as u64);
            match self.file.read_at(&mut buffer[copied_bytes..], at) {
                Ok(0) => return Err(self.cut_short(at)),
                Ok(read_bytes) => copied_bytes += read_bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error("read")(error)),
            }
        }
        Ok(())
    }

    fn error(&self, action: &'static str) -> impl FnOnce(io::Error) -> SourceError {
        let path = self.path.clone();
        move |source| SourceError::File { path, action, source }
    }

    fn cut_short(&self, found_bytes: u64) -> SourceError {
        SourceError::CutShort { path: self.path.clone(), expected_bytes: self.length_bytes, found_bytes }
    }
}

/// Why a file of this type cannot be captured, or `None` for a regular one.
fn why_not_a_memory_file(found: FileType) -> Option<&'static str> {
    if found.is_file() {
        None
    } else if found.is_dir() {
        Some("it is a directory; name the file in it")
    } else if found.is_fifo() {
        Some("it is a pipe; write its contents to a file first")
    } else if found.is_socket() {
        Some("it is a socket, not a file")
    } else if found.is_block_device() || found.is_char_device() {
        Some("it is a device; copy its contents to a file first")
    } else {
        Some("it is not a regular file")
    }
}
