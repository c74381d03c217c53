//! The open store: the log of packs, the index, the catalog and the gate, and the steps that keep them in agreement.
//!
//! A capture appends objects to the log ([`append`](OpenStore::append)) and commits facts (commit.rs), which
//! [`sync`](OpenStore::sync) makes durable and hands to the settler (settle.rs). A look-up asks the log for what the index
//! does not have yet, then the index. What is known to be damaged is in damage.rs.

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
use super::gate::{Gate, SnapshotGuard};
use super::index::Index;
use super::lane::{Lane, LaneGuard};
use super::lock::Lock;
use super::open::Opened;
use super::packs::batch::Batch;
use super::packs::location::Location;
use super::packs::log::{self, Appended, Log, Synced};
use super::packs::lost::Lost;
use super::tree::{IndexEntry, Tree};
use crate::hash::Hash;
use crate::record::{Record, SnapshotId};
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::{Dir, Name};

/// When the index is so many entries behind, captures wait for it: about 50 MB of memory.
const MAX_PENDING_OBJECTS: usize = 512 * 1024;

/// What the settler is asked to do, in order.
pub(super) enum Task {
    /// Put into the index what became durable.
    Settle(Synced),
    /// Make durable what was appended meanwhile.
    SyncEarly,
    /// Say when everything before this is done.
    Barrier(Sender<()>),
}

/// An open store, as the threads that work with it share it.
pub(crate) struct OpenStore {
    /// As what it was opened, for messages.
    pub(crate) path: PathBuf,
    /// What it is reached by.
    pub(crate) dir: Dir,
    pub(crate) format: Format,
    pub(crate) log: Log,
    pub(super) index: Index,
    catalog: RwLock<Catalog>,
    pub(crate) gate: Arc<Gate>,
    /// One lock a process: captures of the same process queue.
    lanes: Mutex<HashMap<String, Arc<Lane>>>,
    /// Threads that finish captures whose source goes on already.
    background: Mutex<Vec<JoinHandle<()>>>,
    pub(super) clock: Clock,
    /// Held by gc: one at a time.
    pub(crate) collecting: Mutex<()>,
    tasks: Mutex<Option<Sender<Task>>>,
    early_sync_asked: AtomicBool,
    pub(super) damage: Damage,
    pub(crate) unusable: Vec<(Name, String)>,
    /// Packs that were there once, and what is known to have been in them.
    pub(crate) lost: Vec<Lost>,
    pub(crate) index_rebuilt: bool,
    /// Deltas in the packs that the index does not mean, as it has others of the same objects.
    pub(crate) other_deltas: Vec<IndexEntry>,
    lock: Arc<Lock>,
}

impl OpenStore {
    /// The store of what was found when it was opened. `tasks` leads to its settler.
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

    /// The record of a live snapshot, which gc leaves alone while it is pinned.
    pub(crate) fn pin(&self, id: SnapshotId) -> Result<(Arc<Record>, SnapshotGuard), StoreError> {
        // In one step: a snapshot that is forgotten when it is pinned may be gone, and the next gc would
        // fail to mark it.
        self.check_process()?;
        let catalog = self.catalog();
        let held = catalog.live(&id).map(|entry| entry.held());
        let held = held.ok_or_else(|| StoreError::NoSuchSnapshot { text: id.to_string() })?;
        let pin = self.gate.pin_snapshot(id, held.clone());
        Ok((held.record(), pin))
    }

    /// Tells the index what the catalog knows of a snapshot.
    pub(crate) fn store_catalog_entry(&self, id: SnapshotId) {
        let stored = self.catalog().stored(id);
        stored.into_iter().for_each(|(key, value)| self.index.set_snapshot(key, value));
    }

    /// Where an object is.
    pub(crate) fn locate(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        self.check_process()?;
        // First the pending ones: an object leaves them only when the index has it.
        match self.log.pending(tree, hash) {
            Some(location) => Ok(Some(location)),
            None => self.index.get(tree, hash),
        }
    }

    /// Waits for its turn in the lane in which snapshots of a process are taken one after the other.
    pub(crate) fn lane(&self, process: &str) -> LaneGuard {
        let lane = {
            let mut lanes = self.lanes.lock();
            lanes.retain(|name, lane| name == process || Arc::strong_count(lane) > 1);
            lanes.entry(process.to_owned()).or_default().clone()
        };
        lane.enter()
    }

    /// Does `work` in a thread of its own, which the store waits for when it is dropped.
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

    /// Waits for the threads that were started by [`in_background`](Self::in_background).
    pub(super) fn join_background(&self) {
        for thread in std::mem::take(&mut *self.background.lock()) {
            // Whoever waits for that capture hears of a panic.
            let _ = thread.join();
        }
    }

    /// Lets the settler end when it has done what it was asked to do.
    pub(super) fn end_tasks(&self) {
        *self.tasks.lock() = None;
    }

    fn ask(&self, task: Task) {
        if let Some(tasks) = &*self.tasks.lock() {
            // The settler ends only after the sender is gone.
            let _ = tasks.send(task);
        }
    }

    /// Whether this process opened the store, and was not forked from the one that did.
    pub(super) fn is_of_this_process(&self) -> bool {
        self.lock.is_of_this_process()
    }

    /// An error where nothing in the store can be changed.
    pub(crate) fn check_writable(&self) -> Result<(), StoreError> {
        self.lock.check_writable()
    }

    /// An error in a process that was forked from the one that has the store open: it has none of the store's threads,
    /// and the lock is not its own.
    pub(crate) fn check_process(&self) -> Result<(), StoreError> {
        self.lock.check_process()
    }

    /// The same for what is done very often.
    pub(crate) fn check_fork(&self) -> Result<(), StoreError> {
        self.lock.check_fork()
    }

    /// Whether this is such a process, for what cannot answer with an error; then it is told here.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.check_process().inspect_err(|error| tracing::error!("{error}")).is_err()
    }

    /// Appends the objects of a batch. Large captures are slowed to the pace of the disk and the
    /// index, so that what waits in memory stays bounded.
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

    /// Makes durable what was appended before.
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
        // An error means that the settler is gone, and with it what there is to wait for.
        let _ = wait.recv();
    }

    /// Removes files and what failed writes have left: [`Log::clear_away`].
    pub(crate) fn clear_away(&self, files: Vec<Name>) -> Result<(), StoreError> {
        self.lock.check_writable()?;
        match self.log.clear_away(files) {
            // There are quotas under which cutting a file takes room: the index gives its own for it.
            Err(StoreError::DiskFull { .. }) if self.index.make_room()? => self.log.clear_away(Vec::new()),
            other => other,
        }
    }
}
