//! Helpers that the tests with a real engine share.

// Each test binary uses a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

#[path = "../../examples/host/mod.rs"]
pub mod host;

use std::path::Path;
use std::sync::{Arc, Mutex};

use stillframe::{SnapshotId, Store};
use stillframe_wasmer::{Resume, StoreJournal};
use wasmer_wasix::journal::{
    DynJournal, DynReadableJournal, DynWritableJournal, Journal, JournalEntry, LogFileJournal, LogReadResult,
    LogWriteResult, ReadableJournal, WritableJournal,
};

#[allow(unused_imports)]
pub use host::{Guest, Life};

/// A store in a temporary directory.
pub struct Vault {
    pub dir: tempfile::TempDir,
    pub store: Arc<Store>,
}

impl Vault {
    pub fn new() -> Vault {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::options().create(dir.path().join("vault")).unwrap());
        Vault { dir, store }
    }

    pub fn journal(&self, process: &str, resume: Resume) -> Arc<StoreJournal> {
        Arc::new(StoreJournal::open(&self.store, process, resume).unwrap())
    }

    pub fn snapshots(&self, process: &str) -> Vec<SnapshotId> {
        self.store.process(process).snapshots().iter().map(|snapshot| snapshot.id()).collect()
    }

    pub fn parent(&self, id: SnapshotId) -> Option<SnapshotId> {
        self.store.snapshot(id).unwrap().record().parent
    }

    pub fn memory_bytes(&self, id: SnapshotId) -> u64 {
        self.store.snapshot(id).unwrap().record().memory_bytes
    }

    /// How many bytes the store's packs use on disk.
    pub fn stored_bytes(&self) -> u64 {
        let packs = std::fs::read_dir(self.dir.path().join("vault/packs")).unwrap();
        packs.map(|pack| pack.unwrap().metadata().unwrap().len()).sum()
    }
}

/// A journal that keeps every entry that is written to it.
#[derive(Debug)]
pub struct Spy {
    inner: Arc<DynJournal>,
    written: Mutex<Vec<JournalEntry<'static>>>,
}

impl Spy {
    pub fn on(inner: Arc<DynJournal>) -> Arc<Spy> {
        Arc::new(Spy { inner, written: Mutex::default() })
    }

    pub fn written(&self) -> Vec<JournalEntry<'static>> {
        self.written.lock().unwrap().clone()
    }

    /// How many bytes of memory were written.
    pub fn memory_bytes(&self) -> u64 {
        self.written()
            .iter()
            .map(|entry| match entry {
                JournalEntry::UpdateMemoryRegionV1 { region, .. } => region.end - region.start,
                _ => 0,
            })
            .sum()
    }
}

impl WritableJournal for Spy {
    fn write<'a>(&'a self, entry: JournalEntry<'a>) -> anyhow::Result<LogWriteResult> {
        self.written.lock().unwrap().push(entry.clone().into_owned());
        self.inner.write(entry)
    }

    fn flush(&self) -> anyhow::Result<()> {
        self.inner.flush()
    }
}

impl ReadableJournal for Spy {
    fn read(&self) -> anyhow::Result<Option<LogReadResult<'_>>> {
        self.inner.read()
    }

    fn as_restarted(&self) -> anyhow::Result<Box<DynReadableJournal>> {
        self.inner.as_restarted()
    }
}

impl Journal for Spy {
    fn split(self) -> (Box<DynWritableJournal>, Box<DynReadableJournal>) {
        unimplemented!("nobody splits it")
    }
}

/// Writes entries to a log file with Wasmer's own journal.
pub fn write_log<'a>(path: &Path, entries: impl IntoIterator<Item = &'a JournalEntry<'static>>) {
    let log = LogFileJournal::new(path).unwrap();
    for entry in entries {
        log.write(entry.clone()).unwrap();
    }
    log.flush().unwrap();
}

/// The entries up to and including the mark number `count`.
pub fn up_to_mark(entries: &[JournalEntry<'static>], count: usize) -> Vec<JournalEntry<'static>> {
    let marks = entries.iter().enumerate().filter(|(_, it)| matches!(it, JournalEntry::SnapshotV1 { .. }));
    let end = marks.map(|(at, _)| at).nth(count - 1).unwrap();
    entries[..=end].to_vec()
}
