//! A memory file that is written in place: every process that has mapped it sees the writes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SealFlags};

use super::SinkError;
use crate::sys::shared_map::SharedMap;

/// An existing file.
#[derive(Debug)]
pub(crate) struct FileInPlace {
    path: PathBuf,
    file: File,
    /// Used where the file cannot be written in another way.
    map: Option<SharedMap>,
}

impl FileInPlace {
    /// Opens a file of `expected_bytes`. Symbolic links are followed: `/proc/PID/fd/N` is one.
    pub(crate) fn open(path: &Path, expected_bytes: u64) -> Result<FileInPlace, SinkError> {
        let failed = |action| {
            let path = path.to_owned();
            move |source| SinkError::File { path, action, source }
        };
        let check_kind = |metadata: &std::fs::Metadata| match metadata.is_file() {
            true => Ok(()),
            false => Err(SinkError::NotAFile { path: path.to_owned() }),
        };
        // The kind is checked before opening, because opening another kind of file may block or
        // have effects.
        check_kind(&std::fs::metadata(path).map_err(failed("look at"))?)?;
        #[allow(clippy::cast_possible_wrap)] // The flag is a small number.
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = file.map_err(failed("open for writing"))?;
        let metadata = file.metadata().map_err(failed("look at"))?;
        check_kind(&metadata)?;
        let found_bytes = metadata.len();
        if found_bytes != expected_bytes {
            return Err(SinkError::Length { expected_bytes, found_bytes });
        }
        // A file that is not a memfd has no seals.
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            let source = std::io::Error::other("it is sealed against writing (F_SEAL_WRITE)");
            return Err(failed("write")(source));
        }
        let map = SharedMap::of_huge_pages(&file).map_err(failed("map"))?;
        Ok(FileInPlace { path: path.to_owned(), file, map })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buffer` from an offset on.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> Result<(), SinkError> {
        self.file.read_exact_at(buffer, offset_bytes).map_err(self.failed("read"))
    }

    /// Writes at an offset. Threads may write different parts at the same time.
    pub(crate) fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> Result<(), SinkError> {
        let written = match &self.map {
            Some(map) => map.write_all_at(bytes, offset_bytes),
            None => self.file.write_all_at(bytes, offset_bytes),
        };
        written.map_err(self.failed("write all of"))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> SinkError + use<> {
        let path = self.path.clone();
        move |source| SinkError::File { path, action, source }
    }
}
