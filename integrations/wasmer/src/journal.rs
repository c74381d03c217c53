//! The journal that Wasmer writes to and reads from.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stillframe::{SnapshotId, Store};
use wasmer_journal::{
    DynReadableJournal, DynWritableJournal, Journal, JournalEntry, LogReadResult, LogWriteResult,
    ReadableJournal, WritableJournal,
};

use crate::error::Error;
use crate::line::{Line, hex};
use crate::replay::Replay;

/// Where a process resumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// At its latest snapshot; at the beginning if it has none.
    #[default]
    Latest,
    /// At this snapshot, which belongs to it or to another process of the same module. Its next
    /// snapshots form a branch.
    At(SnapshotId),
    /// Not at a snapshot: it starts from the beginning.
    Nothing,
}

/// A Wasmer journal for one process, kept in a stillframe store: each mark in it is a snapshot.
///
/// Attach it to the runtime with `PluggableRuntime::add_writable_journal`. When the runtime starts,
/// it reads the snapshot to resume, if there is one. What it writes later becomes snapshots; the
/// first has the resumed one as its parent. A snapshot is durable when the system call that took it
/// returns. Entries after the last mark are not stored.
///
/// One journal serves one process: a guest that starts others in the same runtime must not have
/// one.
///
/// Cost: memory for what changed since the last snapshot; while a process resumes, memory for its
/// whole image.
///
/// ```
/// use std::sync::Arc;
/// use stillframe::Store;
/// use stillframe_wasmer::{Resume, StoreJournal};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("vault");
///
/// let store = Arc::new(Store::options().open_or_create(&path)?);
/// let journal = StoreJournal::open(&store, "web-1", Resume::Latest)?;
/// assert!(journal.tip().is_none()); // it has no snapshot yet
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct StoreJournal {
    writer: Writer,
    reader: Reader,
}

impl StoreJournal {
    /// The journal of the process of this name.
    ///
    /// # Errors
    ///
    /// [`Error::NotOfAJournal`] if the snapshot to resume was not taken through a journal,
    /// [`Error::Store`] if there is no such snapshot or it cannot be read.
    pub fn open(store: &Arc<Store>, process: &str, resume: Resume) -> Result<StoreJournal, Error> {
        let resumed = match resume {
            Resume::Latest => store.process(process).latest(),
            Resume::At(id) => Some(id),
            Resume::Nothing => None,
        };
        let line = match resumed {
            Some(id) => Line::resume(store, process, id)?,
            None => Line::begin(store, process),
        };
        let written = Written { line, resumed, written_bytes: 0, error: None };
        Ok(StoreJournal {
            writer: Writer { written: Arc::new(Mutex::new(written)) },
            reader: Reader::new(store.clone(), resumed),
        })
    }

    /// The parent of the next snapshot: the last one taken, or the one that was resumed.
    pub fn tip(&self) -> Option<SnapshotId> {
        self.writer.written().line.tip()
    }

    /// The last error in writing the journal; a second call returns `None`. The runtime itself only
    /// reports `error 79` to the guest and its host, and ends the guest: a process must not
    /// continue from a state that is not on the disk.
    pub fn take_error(&self) -> Option<Error> {
        self.writer.written().error.take()
    }
}

impl WritableJournal for StoreJournal {
    fn write<'a>(&'a self, entry: JournalEntry<'a>) -> Result<LogWriteResult, anyhow::Error> {
        self.writer.write(entry)
    }

    fn flush(&self) -> Result<(), anyhow::Error> {
        self.writer.flush()
    }
}

impl ReadableJournal for StoreJournal {
    fn read(&self) -> Result<Option<LogReadResult<'_>>, anyhow::Error> {
        self.reader.read()
    }

    fn as_restarted(&self) -> Result<Box<DynReadableJournal>, anyhow::Error> {
        self.reader.as_restarted()
    }
}

impl Journal for StoreJournal {
    fn split(self) -> (Box<DynWritableJournal>, Box<DynReadableJournal>) {
        (Box::new(self.writer), Box::new(self.reader))
    }
}

/// The writing side.
#[derive(Clone, Debug)]
struct Writer {
    written: Arc<Mutex<Written>>,
}

#[derive(Debug)]
struct Written {
    line: Line,
    /// The snapshot that the runtime must resume, until the process that does so ends.
    resumed: Option<SnapshotId>,
    written_bytes: u64,
    error: Option<Error>,
}

impl Writer {
    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Written {
    fn take(&mut self, entry: JournalEntry<'_>) -> Result<(), Error> {
        match (&entry, self.resumed) {
            (JournalEntry::InitModuleV1 { wasm_hash }, Some(resumed)) => {
                let expected = self.line.module().unwrap_or_default();
                return Err(Error::BeganAnew { resumed, expected, found: hex(wasm_hash) });
            }
            (JournalEntry::ProcessExitV1 { .. }, _) => self.resumed = None,
            _ => {}
        }
        self.line.take(entry).map(drop)
    }
}

impl WritableJournal for Writer {
    fn write<'a>(&'a self, entry: JournalEntry<'a>) -> Result<LogWriteResult, anyhow::Error> {
        let mut written = self.written();
        let record_start = written.written_bytes;
        written.written_bytes += entry.estimate_size() as u64;
        if let Err(error) = written.take(entry) {
            let text = anyhow::Error::msg(error.to_string());
            written.error = Some(error);
            return Err(text);
        }
        Ok(LogWriteResult { record_start, record_end: written.written_bytes })
    }

    fn flush(&self) -> Result<(), anyhow::Error> {
        // A snapshot is durable already.
        Ok(())
    }
}

/// The reading side.
struct Reader {
    store: Arc<Store>,
    id: Option<SnapshotId>,
    state: Mutex<Reading>,
}

enum Reading {
    NotBegun,
    Of { replay: Box<Replay>, read_bytes: u64 },
    Done,
}

impl Reader {
    fn new(store: Arc<Store>, id: Option<SnapshotId>) -> Reader {
        Reader { store, id, state: Mutex::new(Reading::NotBegun) }
    }
}

impl ReadableJournal for Reader {
    fn read(&self) -> Result<Option<LogReadResult<'_>>, anyhow::Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Reading::NotBegun, Some(id)) = (&*state, self.id) {
            *state = Reading::Of { replay: Box::new(Replay::of(&self.store, id)?), read_bytes: 0 };
        }
        let Reading::Of { replay, read_bytes } = &mut *state else { return Ok(None) };
        let Some(record) = replay.next() else {
            *state = Reading::Done;
            return Ok(None);
        };
        let record_start = *read_bytes;
        *read_bytes += record.estimate_size() as u64;
        Ok(Some(LogReadResult { record_start, record_end: *read_bytes, record }))
    }

    fn as_restarted(&self) -> Result<Box<DynReadableJournal>, anyhow::Error> {
        Ok(Box::new(Reader::new(self.store.clone(), self.id)))
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("id", &self.id).finish_non_exhaustive()
    }
}
