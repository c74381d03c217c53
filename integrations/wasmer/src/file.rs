//! Wasmer's journal files: imported as a line of snapshots, and exported as a file that
//! `wasmer run --journal` accepts.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stillframe::{SnapshotId, Store};

use crate::encoding::{Decoder, Encoder};
use crate::error::Error;
use crate::line::Line;
use crate::replay::Replay;

/// The result of an import.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Import {
    /// One snapshot for each mark, in order. They are durable.
    pub snapshots: Vec<SnapshotId>,
    /// How many entries came after the last mark. No process could be resumed from them, so they
    /// are not kept.
    pub unmarked: usize,
}

/// Imports a journal file of Wasmer: each mark in it becomes a snapshot of the process.
///
/// Cost: that of taking each snapshot. The file is read once, record by record.
///
/// # Errors
///
/// [`Error::Damaged`] if it is no journal, or a damaged or truncated one. The error says where and
/// why, and holds the snapshots that were read before that. [`Error::File`], [`Error::Store`].
pub fn import(store: &Arc<Store>, process: &str, path: impl AsRef<Path>) -> Result<Import, Error> {
    let path = path.as_ref();
    let failed = |action| move |source| Error::File { path: path.to_owned(), action, source };
    let file = File::open(path).map_err(failed("open"))?;
    let metadata = file.metadata().map_err(failed("read"))?;
    if !metadata.is_file() {
        return Err(failed("read")(io::Error::other("it is not a regular file")));
    }
    let mut import = Import::default();
    let damaged = |at_bytes, source: Box<_>, import: &mut Import| {
        let snapshots = std::mem::take(&mut import.snapshots);
        Error::Damaged { path: path.to_owned(), at_bytes, snapshots, source }
    };
    let mut decoder = Decoder::new(BufReader::new(file), metadata.len())
        .map_err(|source| damaged(0, Box::new(source), &mut import))?;
    let mut line = Line::begin(store, process);
    loop {
        let at_bytes = decoder.at_bytes();
        let entry = match decoder.read() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(import),
            Err(source) => return Err(damaged(decoder.at_bytes(), Box::new(source), &mut import)),
        };
        match line.take(entry) {
            Ok(Some(id)) => {
                import.snapshots.push(id);
                import.unmarked = 0;
            }
            Ok(None) => import.unmarked += 1,
            Err(source @ (Error::Extent { .. } | Error::Incomplete { .. })) => {
                return Err(damaged(at_bytes, Box::new(source), &mut import));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Writes a snapshot as a journal file of Wasmer, from which a process resumes at the snapshot. The
/// file appears only when it is complete.
///
/// Cost: that of resuming it.
///
/// # Errors
///
/// [`Error::File`] if the file exists already; [`Error::NotOfAJournal`]; [`Error::Store`].
pub fn export(store: &Store, id: SnapshotId, path: impl AsRef<Path>) -> Result<(), Error> {
    let path = path.as_ref();
    let failed = |action| move |source| Error::File { path: path.to_owned(), action, source };
    let replay = Replay::of(store, id)?;
    let partial = Partial::create(path).map_err(failed("create"))?;
    let mut encoder = Encoder::new(BufWriter::new(&partial.file))?;
    for entry in replay {
        encoder.write(entry)?;
    }
    encoder.into_inner().flush().and_then(|()| partial.file.sync_all()).map_err(failed("write"))?;
    partial.finish(path).map_err(failed("create"))
}

/// A file that has another name until it is complete, and is removed if it never is.
struct Partial {
    file: File,
    path: PathBuf,
}

impl Partial {
    fn create(path: &Path) -> io::Result<Partial> {
        if path.symlink_metadata().is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let path = path.with_file_name(name);
        let file = File::options().write(true).create_new(true).open(&path)?;
        Ok(Partial { file, path })
    }

    fn finish(self, path: &Path) -> io::Result<()> {
        // A link, because a rename would replace a file that was created there meanwhile.
        fs::hard_link(&self.path, path)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
