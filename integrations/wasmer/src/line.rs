//! A line: the entries of a process as they arrive, and a snapshot for each mark among them.

use std::collections::BTreeMap;
use std::sync::Arc;

use stillframe::record::Trigger;
use stillframe::source::Attachment;
use stillframe::{CaptureOptions, SnapshotId, Store};
use wasmer_journal::{JournalEntry, SnapshotTrigger};
use wasmer_wasix_types::wasix::ThreadStartType;

use crate::encoding::{Decoder, Encoder};
use crate::entries::Entries;
use crate::error::Error;
use crate::extents::Extents;

/// The attachment with the journal of a snapshot, without the memory.
pub(crate) const ATTACHMENT: &str = "wasmer-journal";

/// The label that identifies the module of a snapshot, so that instances of one module find each
/// other.
const MODULE_LABEL: &str = "wasm-module";

/// The entries that a process has written since its last snapshot, on top of that snapshot.
#[derive(Debug)]
pub(crate) struct Line {
    store: Arc<Store>,
    process: String,
    /// The parent of the next snapshot.
    tip: Option<SnapshotId>,
    module: Option<Box<[u8]>>,
    entries: Entries,
    threads: BTreeMap<u32, JournalEntry<'static>>,
    memory: Extents,
}

impl Line {
    /// An empty line.
    pub(crate) fn begin(store: &Arc<Store>, process: &str) -> Line {
        Line {
            store: store.clone(),
            process: process.to_owned(),
            tip: None,
            module: None,
            entries: Entries::default(),
            threads: BTreeMap::new(),
            memory: Extents::default(),
        }
    }

    /// The line that continues from a snapshot, of this process or of another one.
    pub(crate) fn resume(store: &Arc<Store>, process: &str, id: SnapshotId) -> Result<Line, Error> {
        let mut line = Line::begin(store, process);
        for entry in beside(store, id)? {
            line.take_beside(entry);
        }
        line.tip = Some(id);
        line.memory = Extents::over(store, id, store.snapshot(id)?.record().memory_bytes);
        Ok(line)
    }

    /// Adds an entry that resuming would replay, except for the memory.
    fn take_beside(&mut self, entry: JournalEntry<'static>) {
        match entry {
            JournalEntry::InitModuleV1 { wasm_hash } => self.module = Some(wasm_hash),
            JournalEntry::SetThreadV1 { id, .. } => drop(self.threads.insert(id, entry)),
            JournalEntry::SnapshotV1 { .. } => self.entries.mark(),
            entry => self.entries.push(entry),
        }
    }

    /// The parent of the next snapshot.
    pub(crate) fn tip(&self) -> Option<SnapshotId> {
        self.tip
    }

    /// The hash of the module, in hexadecimal digits.
    pub(crate) fn module(&self) -> Option<String> {
        self.module.as_deref().map(hex)
    }

    /// Adds the next entry. A mark becomes a snapshot, which is durable when this returns.
    pub(crate) fn take(&mut self, entry: JournalEntry<'_>) -> Result<Option<SnapshotId>, Error> {
        match entry {
            JournalEntry::InitModuleV1 { wasm_hash } => {
                self.begin_life();
                self.module = Some(wasm_hash);
                self.memory = Extents::default();
            }
            JournalEntry::ClearEtherealV1 => self.begin_life(),
            JournalEntry::UpdateMemoryRegionV1 { region, compressed_data } => {
                self.memory.write_compressed(&region, &compressed_data)?;
            }
            JournalEntry::SetThreadV1 { id, .. } => drop(self.threads.insert(id, entry.into_owned())),
            JournalEntry::CloseThreadV1 { id, .. } => drop(self.threads.remove(&id)),
            JournalEntry::ProcessExitV1 { .. } => self.threads.clear(),
            JournalEntry::SnapshotV1 { trigger, .. } => {
                return self.snapshot(entry.into_owned(), trigger).map(Some);
            }
            entry => self.entries.push(entry.into_owned()),
        }
        Ok(None)
    }

    /// A new life of the process begins: entries after the last mark belong to the previous one.
    fn begin_life(&mut self) {
        self.threads.clear();
        self.memory.undo();
        self.entries.abandon();
    }

    fn snapshot(
        &mut self,
        mark: JournalEntry<'static>,
        trigger: SnapshotTrigger,
    ) -> Result<SnapshotId, Error> {
        let Some(module) = &self.module else {
            return Err(Error::Incomplete { missing: "the module was named" });
        };
        let is_main = |thread: &JournalEntry<'_>| {
            matches!(thread, JournalEntry::SetThreadV1 { start: ThreadStartType::MainThread, .. })
        };
        if !self.threads.values().any(is_main) {
            return Err(Error::Incomplete { missing: "the state of the main thread" });
        }
        if self.memory.length_bytes() == 0 {
            return Err(Error::Incomplete { missing: "any memory" });
        }
        let mut journal = Encoder::new(Vec::new())?;
        journal.write(JournalEntry::InitModuleV1 { wasm_hash: module.clone() })?;
        for entry in self.entries.iter().chain(self.threads.values()).chain([&mark]) {
            journal.write(entry.clone())?;
        }
        let module = hex(module);
        let mut options = CaptureOptions::new()
            .trigger(trigger_of(trigger))
            .parent(self.tip)
            .label(MODULE_LABEL, &module)
            .attachments([Attachment { name: ATTACHMENT.to_owned(), bytes: journal.into_inner() }])
            // Nobody writes to the extents during the capture.
            .staging_bytes(0);
        options.like = self.like(&module);
        let taken = self.store.process(&self.process).capture(&self.memory, &options)?;
        self.entries.mark();
        self.memory = Extents::over(&self.store, taken.id, taken.memory_bytes);
        self.tip = Some(taken.id);
        Ok(taken.id)
    }

    /// For the first snapshot of a process: another process that runs the same module.
    fn like(&self, module: &str) -> Option<String> {
        if self.tip.is_some() || self.store.process(&self.process).latest().is_some() {
            return None;
        }
        let same =
            |it: &stillframe::Snapshot<'_>| it.labels().get(MODULE_LABEL).is_some_and(|it| it == module);
        self.store.snapshots().iter().rfind(|it| same(it)).map(|it| it.record().process.clone())
    }
}

/// The journal in the attachment of a snapshot.
pub(crate) fn beside(store: &Store, id: SnapshotId) -> Result<Vec<JournalEntry<'static>>, Error> {
    let bytes = store.snapshot(id)?.attachment(ATTACHMENT)?.ok_or(Error::NotOfAJournal { id })?;
    let damaged = |source| Error::Beside { id, source };
    let mut decoder = Decoder::new(&bytes[..], bytes.len() as u64).map_err(damaged)?;
    let mut entries = Vec::new();
    while let Some(entry) = decoder.read().map_err(damaged)? {
        entries.push(entry);
    }
    match &entries[..] {
        [JournalEntry::InitModuleV1 { .. }, .., JournalEntry::SnapshotV1 { .. }] => Ok(entries),
        _ => Err(Error::NotOfAJournal { id }),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn trigger_of(trigger: SnapshotTrigger) -> Trigger {
    match trigger {
        SnapshotTrigger::Explicit => Trigger::Explicit,
        SnapshotTrigger::PeriodicInterval => Trigger::Periodic,
        SnapshotTrigger::Idle => Trigger::Idle,
        SnapshotTrigger::FirstListen => Trigger::FirstListen,
        SnapshotTrigger::FirstStdin => Trigger::FirstStdin,
        SnapshotTrigger::FirstEnviron => Trigger::FirstEnviron,
        SnapshotTrigger::Bootstrap => Trigger::Bootstrap,
        SnapshotTrigger::FirstSigint | SnapshotTrigger::Sigint => Trigger::Signal("SIGINT".to_owned()),
        SnapshotTrigger::Sigalrm => Trigger::Signal("SIGALRM".to_owned()),
        SnapshotTrigger::Sigtstp => Trigger::Signal("SIGTSTP".to_owned()),
        SnapshotTrigger::Sigstop => Trigger::Signal("SIGSTOP".to_owned()),
        other => Trigger::Other(other.to_string()),
    }
}
