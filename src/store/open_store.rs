//! The open store: the log of packs, the index, the catalog and the gate, and the steps that keep
//! them in agreement.
//!
//! A capture appends objects to the log ([`append`](OpenStore::append)) and commits facts
//! (commit.rs). [`sync`](OpenStore::sync) makes them durable and passes them to the settler
//! (settle.rs). A look-up asks the log for objects that the index does not have yet, then the
//! index. damage.rs records known damage, and dangling.rs handles deltas whose bases are missing.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLockReadGuard};
use std::thread::JoinHandle;

use crossbeam_channel::Sender;
use jiff::Timestamp;

use super::catalog::Catalog;
use super::clock::Clock;
use super::damage::Damage;
use super::error::StoreError;
use super::format::Format;
use super::gate::Gate;
use super::index::Index;
use super::lane::{Lane, LaneGuard};
use super::lock::Lock;
use super::open::Opened;
use super::packs::batch::Batch;
use super::packs::location::{Location, Position};
use super::packs::log::{self, Appended, Log, Synced};
use super::packs::lost::Lost;
use super::pinned::Pinned;
use super::tree::{IndexEntry, Tree};
use crate::hash::Hash;
use crate::record::{Record, SnapshotId};
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::{Dir, Name};

/// If the index lags behind by this many entries, captures wait for it. They take about 50 MB of
/// memory.
const MAX_PENDING_OBJECTS: usize = 512 * 1024;

/// A task of the settler, which does them in order.
pub(super) enum Task {
    /// Put into the index what became durable.
    Settle(Synced),
    /// Make durable what was appended in the meantime.
    SyncEarly,
    /// Report that all earlier tasks are done.
    Barrier(Sender<()>),
}

/// An open store, shared by the threads that work with it.
pub(crate) struct OpenStore {
    /// The path under which it was opened, for messages.
    pub(crate) path: PathBuf,
    /// Its directory. Everything in it is reached through this.
    pub(crate) dir: Dir,
    pub(crate) format: Format,
    pub(crate) log: Log,
    pub(super) index: Index,
    catalog: RwLock<Catalog>,
    pub(crate) gate: Arc<Gate>,
    /// One lane for each process: captures of the same process queue.
    lanes: Mutex<HashMap<String, Arc<Lane>>>,
    /// Threads that finish captures whose source has already resumed.
    background: Mutex<Vec<JoinHandle<()>>>,
    pub(super) clock: Clock,
    /// Held by gc, so that only one gc runs at a time.
    pub(crate) collecting: Mutex<()>,
    tasks: Mutex<Option<Sender<Task>>>,
    early_sync_asked: AtomicBool,
    damage: Damage,
    pub(crate) unusable: Vec<(Name, String)>,
    /// Packs that are missing, and what is known to have been in them.
    pub(crate) lost: Vec<Lost>,
    pub(crate) index_rebuilt: bool,
    /// Deltas in the packs that the index does not refer to, because it has other copies of the
    /// same objects.
    pub(crate) other_deltas: Vec<IndexEntry>,
    lock: Arc<Lock>,
}

impl OpenStore {
    /// The store that results from what the opening found. `tasks` leads to its settler.
    pub(super) fn new(
        dir: &Dir,
        format: Format,
        lock: Arc<Lock>,
        opened: Opened,
        tasks: Sender<Task>,
    ) -> OpenStore {
        let newest = opened.catalog.newest().map_or(Timestamp::MIN, |(moment, _)| moment);
        OpenStore {
            path: dir.into(),
            dir: dir.clone(),
            log: Log::new(
                opened.dir,
                format.clone(),
                opened.packs,
                opened.active,
                opened.ragged,
                opened.next_number,
            ),
            format,
            clock: Clock::after(newest),
            catalog: RwLock::new(opened.catalog),
            gate: Arc::default(),
            lanes: Mutex::default(),
            background: Mutex::default(),
            collecting: Mutex::default(),
            tasks: Mutex::new(Some(tasks)),
            early_sync_asked: AtomicBool::new(false),
            damage: Damage::new(opened.index.damage_known()),
            index: opened.index,
            unusable: opened.unusable,
            lost: opened.lost,
            index_rebuilt: opened.index_rebuilt,
            other_deltas: opened.other_deltas,
            lock,
        }
    }

    /// The index.
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn catalog(&self) -> RwLockReadGuard<'_, Catalog> {
        self.catalog.read()
    }

    pub(crate) fn change_catalog<T>(&self, change: impl FnOnce(&mut Catalog) -> T) -> T {
        change(&mut self.catalog.write())
    }

    /// The record of a live snapshot.
    pub(crate) fn record(&self, id: SnapshotId) -> Result<Arc<Record>, StoreError> {
        let held = self.catalog().live(&id).map(|entry| entry.held().clone());
        held.map(|held| held.record()).ok_or_else(|| StoreError::NoSuchSnapshot { text: id.to_string() })
    }

    /// Opens a live snapshot for reading.
    pub(crate) fn pin(&self, id: SnapshotId) -> Result<Pinned, StoreError> {
        // The check and the pin are one step. Otherwise the snapshot could be forgotten and dropped
        // in between, and the next gc would fail to mark it.
        self.check_process()?;
        let catalog = self.catalog();
        let entry = catalog.live(&id).ok_or_else(|| StoreError::NoSuchSnapshot { text: id.to_string() })?;
        Ok(Pinned::new(&self.gate, id, entry.held()))
    }

    /// Updates the index with the catalog's state of a snapshot.
    pub(crate) fn store_catalog_entry(&self, id: SnapshotId) {
        let stored = self.catalog().stored(id);
        stored.into_iter().for_each(|(key, value)| self.index.set_snapshot(key, value));
    }

    /// Where an object is.
    pub(crate) fn locate(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        self.check_process()?;
        // The log is asked first: an object leaves the pending ones only when the index has it.
        match self.log.pending(tree, hash) {
            Some(location) => Ok(Some(location)),
            None => self.index.get(tree, hash),
        }
    }

    /// Waits for its turn in the lane of a process: its snapshots are taken one after the other.
    pub(crate) fn lane(&self, process: &str) -> LaneGuard {
        let lane = {
            let mut lanes = self.lanes.lock();
            lanes.retain(|name, lane| name == process || Arc::strong_count(lane) > 1);
            lanes.entry(process.to_owned()).or_default().clone()
        };
        lane.enter()
    }

    /// Runs `work` in a new thread. Dropping the store waits for that thread.
    pub(crate) fn in_background(&self, work: impl FnOnce() + Send + 'static) -> Result<(), StoreError> {
        let thread = std::thread::Builder::new()
            .name("stillframe-capture".to_owned())
            .spawn(work)
            .map_err(StoreError::io("start a thread for", &self.path))?;
        let mut background = self.background.lock();
        background.retain(|thread| !thread.is_finished());
        background.push(thread);
        Ok(())
    }

    /// Waits for the threads that [`in_background`](Self::in_background) started.
    pub(super) fn join_background(&self) {
        for thread in std::mem::take(&mut *self.background.lock()) {
            // The thread that waits for the capture receives the panic.
            let _ = thread.join();
        }
    }

    /// Lets the settler end once its queue is empty.
    pub(super) fn end_tasks(&self) {
        *self.tasks.lock() = None;
    }

    fn ask(&self, task: Task) {
        if let Some(tasks) = &*self.tasks.lock() {
            // The settler ends only after the sender is dropped.
            let _ = tasks.send(task);
        }
    }

    /// Whether this process opened the store. A process forked from it did not.
    pub(super) fn is_of_this_process(&self) -> bool {
        self.lock.is_of_this_process()
    }

    /// Returns an error if nothing in the store can be changed.
    pub(crate) fn check_writable(&self) -> Result<(), StoreError> {
        self.lock.check_writable()
    }

    /// Returns an error in a process that was forked from the one that has the store open: it has
    /// none of the store's threads, and it does not hold the lock.
    pub(crate) fn check_process(&self) -> Result<(), StoreError> {
        self.lock.check_process()
    }

    /// A cheaper [`check_process`](Self::check_process), for frequent calls.
    pub(crate) fn check_fork(&self) -> Result<(), StoreError> {
        self.lock.check_fork()
    }

    /// Whether this process was forked from the one that has the store open, for functions that
    /// cannot return an error. It logs the error.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.check_process().inspect_err(|error| tracing::error!("{error}")).is_err()
    }

    /// Appends the objects of a batch. It slows large captures to the speed of the disk and the
    /// index, so that the memory for pending objects stays bounded.
    pub(crate) fn append(&self, batch: &mut Batch) -> Result<Appended, StoreError> {
        self.check_writable()?;
        let appended = self.log.append(batch)?;
        if appended.unsynced_bytes > 4 * log::SYNC_EARLY_BYTES {
            self.sync()?;
        } else if appended.unsynced_bytes > log::SYNC_EARLY_BYTES
            && !self.early_sync_asked.swap(true, Ordering::Relaxed)
        {
            self.ask(Task::SyncEarly);
        }
        if self.log.pending_objects() > MAX_PENDING_OBJECTS {
            self.settle_all();
        }
        Ok(appended)
    }

    /// Makes all earlier appends durable.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.log.sync(|durable| {
            self.change_catalog(|catalog| {
                for entry in &durable.entries {
                    if let log::Unsynced::Fact(fact) = entry {
                        catalog.apply(fact.clone());
                    }
                }
            });
            self.ask(Task::Settle(durable));
        })
    }

    pub(super) fn sync_early(&self) -> Result<(), StoreError> {
        self.early_sync_asked.store(false, Ordering::Relaxed);
        self.sync()
    }

    /// Waits until the index has everything that is durable.
    pub(crate) fn settle_all(&self) {
        let (done, wait) = crossbeam_channel::bounded(1);
        self.ask(Task::Barrier(done));
        // An error means that the settler has ended, so there is nothing to wait for.
        let _ = wait.recv();
    }

    /// Removes files and the remains of failed writes: [`Log::clear_away`].
    pub(crate) fn clear_away(&self, files: Vec<Name>) -> Result<(), StoreError> {
        self.lock.check_writable()?;
        match self.log.clear_away(files) {
            // Under some quotas, truncating a file needs space: the index is deleted to free some.
            Err(StoreError::DiskFull { .. }) if self.index.make_room()? => self.log.clear_away(Vec::new()),
            other => other,
        }
    }

    /// Whether damage is known that captures should repair.
    pub(crate) fn damage_known(&self) -> bool {
        self.damage.is_known()
    }

    /// Records that there is damage. The record survives a reopening.
    pub(crate) fn note_damage(&self) {
        self.damage.found(&self.index);
    }

    /// How often damage was found.
    pub(crate) fn damage_findings(&self) -> u64 {
        self.damage.findings()
    }

    /// Records that there is no damage, unless some was found after `findings_before`.
    pub(crate) fn no_damage_since(&self, findings_before: u64) {
        self.damage.none_since(findings_before, &self.index);
    }

    /// Removes from the index the object that an error reports as damaged.
    pub(crate) fn forget_culprit(&self, error: &StoreError) {
        let Some((kind, hash, at)) = error.culprit() else { return self.note_damage() };
        let tree = Tree::of(kind);
        match self.locate(tree, &hash) {
            Ok(Some(location)) if Position::from(location) == at => {
                self.forget_damaged(tree, &hash, location)
            }
            _ => self.note_damage(),
        }
    }

    /// Removes a damaged object from the index, so that the next capture stores it again.
    pub(crate) fn forget_damaged(&self, tree: Tree, hash: &Hash, location: Location) {
        self.note_damage();
        if let Err(error) = self.index.replace(tree, hash, location, None) {
            tracing::warn!("{error}");
        }
    }
}
