//! A sparse file: holes where the memory is zeros, and not there at all until it is complete.

use std::path::{Path, PathBuf};

use super::SinkError;
use crate::sys::file::{self, File};
use crate::sys::mapped::mapped_shared_by;
use crate::sys::shared_map::SharedMap;

/// A file being written, under a temporary name beside its final one.
pub(crate) struct SparseFile {
    file: File,
    /// Where it cannot be written otherwise.
    map: Option<SharedMap>,
    temporary: PathBuf,
    path: PathBuf,
    overwrite: bool,
    finished: bool,
}

impl SparseFile {
    /// Begins a file of `length_bytes` zeros that nobody else may read.
    pub(crate) fn create(path: &Path, length_bytes: u64, overwrite: bool) -> Result<SparseFile, SinkError> {
        let directory = path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/");
        let (Some(name), false) = (path.file_name(), directory) else {
            return Err(SinkError::Directory { path: path.to_owned() });
        };
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(SinkError::Exists { path: path.to_owned() });
        }
        if let Some((pid, name)) = std::fs::metadata(path).ok().and_then(|it| mapped_shared_by(&it)) {
            return Err(SinkError::Mapped { path: path.to_owned(), pid, name });
        }
        let mut name = name.to_owned();
        name.push(format!(".{}.unfinished", std::process::id()));
        let temporary = path.with_file_name(name);
        let failed = |action| {
            let path = path.to_owned();
            move |source| SinkError::File { path, action, source }
        };
        let file = file::create_new(&temporary).map_err(failed("create"))?;
        let mut sparse =
            SparseFile { file, map: None, temporary, path: path.to_owned(), overwrite, finished: false };
        sparse.file.set_length(length_bytes).map_err(|source| match source.raw_os_error() {
            // EFBIG, or EINVAL for what no file system of Linux takes.
            Some(libc::EFBIG | libc::EINVAL) => {
                SinkError::TooLong { path: path.to_owned(), bytes: length_bytes, source }
            }
            _ => failed("set the length of")(source),
        })?;
        sparse.map = sparse.file.map(SharedMap::of_huge_pages).map_err(failed("map"))?;
        Ok(sparse)
    }

    /// Writes `bytes` at an offset. Threads may write different parts at once.
    pub(crate) fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> Result<(), SinkError> {
        let written = match &self.map {
            Some(map) => map.write_all_at(bytes, offset_bytes),
            None => self.file.write_all_at(bytes, offset_bytes),
        };
        written.map_err(self.failed("write"))
    }

    /// Gives the complete file its name.
    pub(crate) fn finish(mut self) -> Result<(), SinkError> {
        let renamed = match self.overwrite {
            true => file::rename(&self.temporary, &self.path),
            // Fails, unlike a renaming, where a file has come into being meanwhile.
            false => file::link(&self.temporary, &self.path).and_then(|()| file::remove(&self.temporary)),
        };
        match renamed {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(SinkError::Exists { path: self.path.clone() })
            }
            Err(error) => Err(self.failed("give its name to")(error)),
            Ok(()) => {
                self.finished = true;
                Ok(())
            }
        }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> SinkError + use<> {
        let path = self.path.clone();
        move |source| SinkError::File { path, action, source }
    }
}

impl Drop for SparseFile {
    fn drop(&mut self) {
        if !self.finished {
            // What is left of an interrupted restore is of no use to anybody.
            let _ = file::remove(&self.temporary);
        }
    }
}
