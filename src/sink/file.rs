//! A sparse file, with holes where the memory is zeros. It appears under its name only when it is
//! complete.

use std::path::{Path, PathBuf};

use super::SinkError;
use crate::sys::dir::Name;
use crate::sys::file::{self, File};
use crate::sys::mapped::mapped_shared_by;
use crate::sys::shared_map::SharedMap;

/// A file that is being written, under a temporary name in the directory of its final one.
pub(crate) struct SparseFile {
    file: File,
    /// Used where the file cannot be written in another way.
    map: Option<SharedMap>,
    temporary: Name,
    name: Name,
    path: PathBuf,
    overwrite: bool,
    finished: bool,
}

impl SparseFile {
    /// Creates a file of `length_bytes` zeros that no other user may read.
    pub(crate) fn create(path: &Path, length_bytes: u64, overwrite: bool) -> Result<SparseFile, SinkError> {
        let directory = path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/");
        let (Some(file_name), false) = (path.file_name(), directory) else {
            return Err(SinkError::Directory { path: path.to_owned() });
        };
        let failed = |action| {
            let path = path.to_owned();
            move |source| SinkError::File { path, action, source }
        };
        let mut unfinished = file_name.to_owned();
        unfinished.push(format!(".{}.unfinished", std::process::id()));
        let name = Name::at(path).map_err(failed("create"))?;
        match name.look().map_err(failed("create"))? {
            Some(_) if !overwrite => return Err(SinkError::Exists { path: path.to_owned() }),
            Some(found) if !found.is_plain_file() => {
                return Err(SinkError::NoPlainFile { path: path.to_owned(), found: found.what() });
            }
            _ => {}
        }
        if let Some((pid, name)) = std::fs::metadata(path).ok().and_then(|it| mapped_shared_by(&it)) {
            return Err(SinkError::Mapped { path: path.to_owned(), pid, name });
        }
        let temporary = name.dir().join(unfinished);
        let file = file::create_new(&temporary).map_err(failed("create"))?;
        let mut sparse = SparseFile {
            file,
            map: None,
            temporary,
            name,
            path: path.to_owned(),
            overwrite,
            finished: false,
        };
        sparse.file.set_length(length_bytes).map_err(|source| match source.raw_os_error() {
            // EFBIG; or EINVAL for a length that no file system of Linux supports.
            Some(libc::EFBIG | libc::EINVAL) => {
                SinkError::TooLong { path: path.to_owned(), bytes: length_bytes, source }
            }
            _ => failed("set the length of")(source),
        })?;
        sparse.map = sparse.file.map(SharedMap::of_huge_pages).map_err(failed("map"))?;
        Ok(sparse)
    }

    /// Writes `bytes` at an offset. Threads may write different parts at the same time.
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
            true => file::rename(&self.temporary, &self.name),
            // Unlike a rename, this fails if a file with the name has appeared meanwhile.
            false => file::publish(&self.temporary, &self.name),
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
            // The rest of an interrupted restore has no use.
            let _ = file::remove(&self.temporary);
        }
    }
}
