//! The store: packs as the log, sled as the index, and what holds them together.
//!
//! ```text
//! STORE/               directory.rs 0700; every file 0600: memory holds secrets
//!   FORMAT             format.rs    what the store is
//!   LOCK               lock.rs      held, as the directory is, by the process that has it open
//!   packs/N.pack       pack.rs      objects (object.rs), appended by the log (log.rs)
//!   index/             index.rs     where each object is (location.rs); fed by the settler (settle.rs)
//!                      … overlay.rs in memory, database.rs in blocks (block.rs); durable.rs
//!   damaged/                        what was set aside
//! ```
//!
//! The catalog (catalog.rs) has all snapshots in memory; the gate (gate.rs) keeps gc from dropping
//! what a running capture refers to.

pub(crate) mod aside;
pub(crate) mod catalog;
pub(crate) mod compact;
pub(crate) mod directory;
pub(crate) mod error;
pub(crate) mod fact;
pub(crate) mod format;
pub(crate) mod gate;
pub(crate) mod held;
pub(crate) mod id;
pub(crate) mod identity;
pub(crate) mod index;
pub(crate) mod lane;
pub(crate) mod lock;
pub(crate) mod marks;
pub(crate) mod names;
mod open;
pub(crate) mod packs;
mod recover;
mod settle;
pub(crate) mod tree;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Sender;
use jiff::{SignedDuration, Timestamp};

use crate::codec::Codec;
use crate::hash::Hash;
use crate::progress::Progress;
use crate::record::{self, Note, Record, SnapshotId, Tombstone};
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::{Dir, Name};
use crate::sys::file;
use crate::units::RegionSize;
use catalog::{Catalog, Entry, Fact, Labels};
use error::StoreError;
use format::{FORMAT_VERSION, Format};
use gate::{Gate, SnapshotGuard};
use held::Held;
use id::StoreId;
use index::Index;
use lane::{Lane, LaneGuard};
use lock::{Access, Lock};
use packs::batch::Batch;
use packs::location::{Location, Position};
use packs::log::{Appended, FactAt, Log};
use packs::object::Kind;
use packs::read::{Check, Reader};
use settle::Task;
use tree::{IndexEntry, Tree};

/// When the index is so many entries behind, captures wait for it: about 50 MB of memory.
const MAX_PENDING_OBJECTS: usize = 512 * 1024;

/// A store of snapshots, open in this process and in no other.
///
/// It is `Send + Sync`: put it into an [`Arc`], and any number of threads may capture into it and
/// restore from it at once. Nothing is lost if it is never dropped. Dropping it waits for captures
/// that go on in the background ([`Process::start_capture`]).
///
/// [`Process::start_capture`]: crate::Process::start_capture
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("vault");
/// let store = Store::options().create(&path)?;
/// let mut memory = vec![0u8; 1 << 20];
/// memory[4096..4100].copy_from_slice(b"then");
/// let then = store.process("web-1").capture(&memory, &CaptureOptions::default())?;
/// memory[4096..4100].copy_from_slice(b"now!");
/// store.process("web-1").capture(&memory, &CaptureOptions::default())?;
///
/// let map = store.restore(then.id)?.into_mapping()?;
/// assert_eq!(&map[4096..4100], b"then");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Store {
    shared: Arc<Shared>,
    settler: Option<JoinHandle<()>>,
}

/// How to create or open a store. See [`Store::options`].
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    region_size: RegionSize,
    codec: Codec,
    pub(crate) wait: Duration,
    pub(crate) trust_owner: bool,
}

/// What a store is, fixed when it was created.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreInfo {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: u32,
    /// The size of its regions.
    pub region_size: RegionSize,
    /// How it encodes what is stored.
    pub codec: Codec,
    /// Its name among all stores.
    pub id: StoreId,
}

/// What the threads of a store share.
pub(crate) struct Shared {
    /// As what it was opened, for messages.
    pub(crate) path: PathBuf,
    /// What it is reached by.
    pub(crate) dir: Dir,
    pub(crate) format: Format,
    pub(crate) log: Log,
    index: Index,
    catalog: RwLock<Catalog>,
    pub(crate) gate: Arc<Gate>,
    /// One lock a process: captures of the same process queue.
    lanes: Mutex<HashMap<String, Arc<Lane>>>,
    /// Threads that finish captures whose source goes on already.
    background: Mutex<Vec<JoinHandle<()>>>,
    /// Where the newest snapshot stands that was taken or begun.
    newest_moment: Mutex<Timestamp>,
    /// Held by gc: one at a time.
    pub(crate) collecting: Mutex<()>,
    tasks: Mutex<Option<Sender<Task>>>,
    early_sync_asked: AtomicBool,
    /// Set when damage was found: then captures look up also what their parent has.
    damage_known: AtomicBool,
    damage_findings: AtomicU64,
    pub(crate) unusable: Vec<(Name, String)>,
    /// Packs that were there once, and what is known to have been in them.
    pub(crate) lost: Vec<packs::lost::Lost>,
    pub(crate) index_rebuilt: bool,
    /// Deltas in the packs that the index does not mean, as it has others of the same objects.
    pub(crate) other_deltas: Vec<IndexEntry>,
    lock: Arc<Lock>,
}

impl StoreOptions {
    /// The size of regions of a store that is created; 16 KiB unless set.
    pub fn region_size(mut self, size: RegionSize) -> Self {
        self.region_size = size;
        self
    }

    /// How a store that is created encodes; LZ4 unless set.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// How long to wait for another process that has the store open; not at all unless set.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Uses a directory that belongs to another user also as root. Otherwise that is refused, as that user can
    /// change what is in it at any moment, and with it what root does to other files. No, unless set.
    pub fn trust_owner(mut self, trust: bool) -> Self {
        self.trust_owner = trust;
        self
    }

    /// Creates a store in the directory `path`, which must not exist or be empty, and opens it.
    ///
    /// # Errors
    ///
    /// [`StoreError::AlreadyAStore`] where there is one; [`StoreError::NotAStore`] where there is
    /// something else.
    pub fn create(&self, path: impl AsRef<Path>) -> Result<Store, StoreError> {
        let path = path.as_ref();
        match directory::open(path, self.trust_owner).and_then(|dir| Format::read(&dir)) {
            Ok(_) | Err(StoreError::NewerFormat { .. } | StoreError::FormatFile { .. }) => {
                return Err(StoreError::AlreadyAStore { path: path.to_owned() });
            }
            Err(StoreError::NotAStore { .. }) if path.is_dir() || !path.exists() => {}
            Err(error) => return Err(error),
        }
        let is_new = !path.is_dir();
        if is_new {
            file::create_dir_at(path).map_err(StoreError::io("create", path))?;
        }
        let dir = directory::open(path, self.trust_owner)?;
        // Also one that was there: whoever made it may have been killed, or not have cared.
        file::sync_parent(path).map_err(StoreError::io("make durable", path))?;
        // What a creation leaves behind that was interrupted.
        let is_left =
            |found: &Name| ["LOCK", "FORMAT.new", names::PACKS_DIR].iter().any(|it| found.name() == *it);
        let others = !file::list(&dir).map_err(StoreError::io("list", path))?.iter().all(is_left);
        if others {
            let why = "the directory has other files in it; choose an empty or a new one".to_owned();
            return Err(StoreError::NotAStore { path: path.to_owned(), why });
        }
        file::make_dir_private(&dir).map_err(StoreError::io("protect", path))?;
        let lock = Lock::take(&dir, self.wait).inspect_err(|error| {
            // Where no store can be, nothing is left of one.
            if is_new && matches!(error, StoreError::CannotLock { .. }) {
                let _ = std::fs::remove_dir(path);
            }
        })?;
        let packs = dir.join(names::PACKS_DIR);
        file::create_dir(&packs).map_err(StoreError::io("create", &packs))?;
        crate::migrations::create::write(&dir, self.region_size, self.codec)?;
        Store::open_locked(&dir, lock)
    }

    /// Opens the store in the directory `path`.
    ///
    /// The first time after a crash it reads what the index lacks, at about 1 GB/s. On a read-only file system
    /// it reads all packs, each time, and everything works but what changes the store; any number of processes may
    /// have it open there.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotAStore`], [`StoreError::NewerFormat`], [`StoreError::OlderFormat`],
    /// [`StoreError::Owned`], or what the operating system said.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Store, StoreError> {
        let dir = directory::open(path.as_ref(), self.trust_owner)?;
        Format::read(&dir)?;
        Store::open_locked(&dir, Lock::take(&dir, self.wait)?)
    }

    /// Opens the store in the directory `path`, or creates it if there is nothing.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open) and [`create`](Self::create).
    pub fn open_or_create(&self, path: impl AsRef<Path>) -> Result<Store, StoreError> {
        let path = path.as_ref();
        match self.open(path) {
            Err(StoreError::NotAStore { .. }) => self.create(path),
            other => other,
        }
    }
}

impl Store {
    /// Opens the store in the directory `path`.
    ///
    /// # Errors
    ///
    /// As [`StoreOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Store, StoreError> {
        StoreOptions::default().open(path)
    }

    /// Options for creating and opening stores.
    pub fn options() -> StoreOptions {
        StoreOptions::default()
    }

    fn open_locked(dir: &Dir, lock: Lock) -> Result<Store, StoreError> {
        if let Some(exposed) = file::exposed(dir) {
            tracing::warn!(
                "{} is open to other users, and memory holds secrets: `chmod -R go= {}` closes it",
                exposed.display(),
                dir.path().display()
            );
        }
        if lock.access() == Access::Owner {
            crate::migrations::finish_interrupted(dir)?;
        }
        let format = Format::read(dir)?;
        Store::open_as(dir, &Arc::new(lock), format, false, &Progress::default())
    }

    /// Opens a store of a known format, whose lock is taken. `rebuild` throws its index away first.
    pub(crate) fn open_as(
        dir: &Dir,
        lock: &Arc<Lock>,
        format: Format,
        rebuild: bool,
        progress: &Progress,
    ) -> Result<Store, StoreError> {
        if format.version < FORMAT_VERSION {
            let (found, supported) = (format.version, FORMAT_VERSION);
            return Err(StoreError::OlderFormat { path: dir.into(), found, supported });
        }
        let access = lock.access();
        let opened = open::open(dir, &format, access, rebuild, progress)?;
        let (tasks, receiver) = crossbeam_channel::unbounded();
        let shared = Arc::new(Shared {
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
            newest_moment: Mutex::new(opened.catalog.newest().map_or(Timestamp::MIN, |(moment, _)| moment)),
            catalog: RwLock::new(opened.catalog),
            gate: Arc::default(),
            lanes: Mutex::default(),
            background: Mutex::default(),
            collecting: Mutex::default(),
            tasks: Mutex::new(Some(tasks)),
            early_sync_asked: AtomicBool::new(false),
            damage_known: AtomicBool::new(opened.index.damage_known()),
            damage_findings: AtomicU64::new(0),
            index: opened.index,
            unusable: opened.unusable,
            lost: opened.lost,
            index_rebuilt: opened.index_rebuilt,
            other_deltas: opened.other_deltas,
            lock: lock.clone(),
        });
        let settler =
            settle::start(shared.clone(), receiver).map_err(StoreError::io("start a thread for", dir))?;
        // From here on dropping it, also for an error, ends the thread.
        let store = Store { shared, settler: Some(settler) };
        let shared = &store.shared;
        // Saved no sooner: the next opening sees only what lies past the watermarks.
        shared.ground(&shared.other_deltas)?;
        match opened.save {
            true => {
                shared.index.save()?;
                shared.index.set_rebuilding(false)?;
            }
            false => shared.index.save_if_much()?,
        }
        if !shared.damage_known() {
            shared.drop_ungrounded()?;
        }
        Ok(store)
    }

    /// What the store is.
    pub fn info(&self) -> StoreInfo {
        let Format { version, region_size, codec, id } = self.shared.format.clone();
        StoreInfo { path: self.shared.path.clone(), format: version, region_size, codec, id }
    }

    /// An error where the store cannot be changed: as it is read-only, as it is not any more where it was opened, or as
    /// this process was forked from the one that opened it. Whatever changes it says so itself; this is for who wants
    /// to know before.
    ///
    /// # Errors
    ///
    /// [`StoreError::ReadOnly`], [`StoreError::Moved`], [`StoreError::LockReplaced`], [`StoreError::OtherProcess`].
    pub fn check_writable(&self) -> Result<(), StoreError> {
        self.shared.check_writable()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if !self.shared.lock.is_of_this_process() {
            // A forked process has the memory of all this and none of the threads. Whatever were done here would be
            // done to the files of the process that has it open; so it is left as it is.
            std::mem::forget((self.shared.clone(), self.settler.take()));
            return;
        }
        let background = std::mem::take(&mut *self.shared.background.lock());
        for thread in background {
            // Whoever waits for that capture hears of a panic.
            let _ = thread.join();
        }
        *self.shared.tasks.lock() = None;
        if let Some(settler) = self.settler.take() {
            // It has said what went wrong, if anything did; the packs have it all.
            let _ = settler.join();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl Shared {
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

    fn ask(&self, task: Task) {
        if let Some(tasks) = &*self.tasks.lock() {
            // The settler ends only after the sender is gone.
            let _ = tasks.send(task);
        }
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
        if appended.unsynced_bytes > 4 * packs::log::SYNC_EARLY_BYTES {
            self.sync()?;
        } else if appended.unsynced_bytes > packs::log::SYNC_EARLY_BYTES
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
                    if let packs::log::Unsynced::Fact(fact) = entry {
                        catalog.apply(fact.clone());
                    }
                }
            });
            self.ask(Task::Settle(durable));
        })
    }

    fn sync_early(&self) -> Result<(), StoreError> {
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

    /// Appends facts and makes them, and all that was appended before, durable.
    ///
    /// What the facts refer to is made durable before they are written: should the power fail in
    /// between, whatever of a record is found on the disk, all that it needs is there as well.
    fn commit(&self, facts: Vec<(Kind, Vec<u8>, FactAt)>, failures_before: u64) -> Result<u64, StoreError> {
        self.check_writable()?;
        self.sync()?;
        let added_bytes = self.log.append_facts(facts, failures_before)?;
        self.sync()?;
        // Another thread's sync may have failed with our facts among what it took back.
        match self.log.failures() == failures_before {
            true => Ok(added_bytes),
            false => Err(StoreError::WriteFailedMeanwhile),
        }
    }

    /// The time that the clock says, and the moment at which a snapshot that is taken now stands: later than that of any other.
    pub(crate) fn now(&self) -> (Timestamp, Timestamp) {
        let mut newest = self.newest_moment.lock();
        let (time, moment) = time_and_moment(Timestamp::now(), *newest);
        *newest = moment;
        (time, moment)
    }

    /// Commits a snapshot with its labels: durable when this returns. Returns its id and how many
    /// bytes were added.
    pub(crate) fn commit_snapshot(
        &self,
        record: Record,
        labels: Labels,
        failures_before: u64,
    ) -> Result<(SnapshotId, u64), StoreError> {
        let bytes = encode(Kind::Record, &record)?;
        let refused = |source| StoreError::Unrecordable { source };
        let held = Held::read(&bytes).map_err(refused)?;
        self.catalog().check_room(&held).map_err(refused)?;
        let id = SnapshotId(Hash::of(&bytes));
        let time = record.time;
        let mut facts: Vec<(Kind, Vec<u8>, FactAt)> = vec![(
            Kind::Record,
            bytes,
            Box::new(move |location| Fact::Snapshot(id, Box::new(Entry::new(held, location)))),
        )];
        if !labels.is_empty() {
            facts.push(note(Note { snapshot: id, time, labels })?);
        }
        Ok((id, self.commit(facts, failures_before)?))
    }

    /// Commits new labels of a snapshot.
    pub(crate) fn commit_labels(&self, id: SnapshotId, labels: Labels) -> Result<(), StoreError> {
        let before = self.catalog().live(&id).and_then(|entry| entry.note().map(|(time, _)| time));
        let time = later_than(before);
        self.commit(vec![note(Note { snapshot: id, time, labels })?], self.log.failures()).map(drop)
    }

    /// Commits that snapshots are forgotten.
    pub(crate) fn commit_tombstones(&self, ids: &[SnapshotId]) -> Result<(), StoreError> {
        let tombstone = |id: &SnapshotId| {
            let id = *id;
            let bytes = encode_tombstone(id)?;
            let fact: FactAt = Box::new(move |location| Fact::Tombstone(id, location));
            Ok((Kind::Tombstone, bytes, fact))
        };
        let commit = || {
            let facts = ids.iter().map(tombstone).collect::<Result<Vec<_>, StoreError>>()?;
            self.commit(facts, self.log.failures()).map(drop)
        };
        match commit() {
            // A full disk must not keep anybody from forgetting: the index gives its room for it.
            Err(StoreError::DiskFull { .. }) if self.index.make_room()? => commit(),
            other => other,
        }
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

    /// Whether damage was found that captures should mend.
    pub(crate) fn damage_known(&self) -> bool {
        self.damage_known.load(Ordering::Relaxed)
    }

    /// Remembers, also after a reopening, that there is damage.
    pub(crate) fn note_damage(&self) {
        self.damage_findings.fetch_add(1, Ordering::Relaxed);
        self.store_damage_known(true);
    }

    /// How often damage was found.
    pub(crate) fn damage_findings(&self) -> u64 {
        self.damage_findings.load(Ordering::Relaxed)
    }

    /// There is no damage, unless some was found after `findings_before`.
    pub(crate) fn no_damage_since(&self, findings_before: u64) {
        self.store_damage_known(false);
        if self.damage_findings() != findings_before {
            self.store_damage_known(true);
        }
    }

    fn store_damage_known(&self, known: bool) {
        self.damage_known.store(known, Ordering::Relaxed);
        if let Err(error) = self.index.set_damage_known(known) {
            tracing::warn!("{error}");
        }
    }

    /// Takes deltas out of the index whose bases are not in it, if there may be any: garbage that gc
    /// was dropping, or that came back when the index was rebuilt. Where damage is known they may also be
    /// what a snapshot needs, and stay.
    pub(crate) fn drop_ungrounded(&self) -> Result<(), StoreError> {
        let index = self.index();
        if !index.may_have_ungrounded() {
            return Ok(());
        }
        self.settle_all();
        let mut reader = Reader::new(self, Check::Checksum);
        for tree in [Tree::Regions, Tree::Objects] {
            for entry in index.entries(tree) {
                let (hash, location) = entry?;
                if location.is_delta() && !reader.is_grounded(tree, &hash)? {
                    index.replace(tree, &hash, location, None)?;
                }
            }
        }
        index.set_may_have_ungrounded(false)
    }

    /// Points the index at `others`, deltas that it does not mean, where the one that it means lacks a base
    /// and the other does not. That happens where the packs hold garbage from before: its base may be gone,
    /// and the same bytes stored anew since, from another base.
    pub(crate) fn ground(&self, others: &[IndexEntry]) -> Result<(), StoreError> {
        let index = self.index();
        let mut reader = Reader::new(self, Check::Checksum);
        // One that is grounded now may be the base of another.
        let mut goes_on = true;
        while std::mem::take(&mut goes_on) {
            for (tree, hash, other) in others {
                if reader.is_grounded(*tree, hash)? {
                    continue;
                }
                let base = reader.delta_at((*other).into())?.filter(|(delta, _)| delta == hash);
                if let (Some((_, base)), Some(present)) = (base, index.get(*tree, hash)?)
                    && reader.is_grounded(*tree, &base)?
                {
                    index.replace(*tree, hash, present, Some(*other))?;
                    goes_on |= reader.is_grounded(*tree, hash)?;
                }
            }
        }
        Ok(())
    }

    /// Takes what an error says is damaged out of the index.
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

    /// Takes a damaged object out of the index, so that it is stored anew when it is captured again.
    pub(crate) fn forget_damaged(&self, tree: Tree, hash: &Hash, location: Location) {
        self.note_damage();
        if let Err(error) = self.index.replace(tree, hash, location, None) {
            tracing::warn!("{error}");
        }
    }
}

/// The stored bytes of a tombstone of now.
pub(crate) fn encode_tombstone(snapshot: SnapshotId) -> Result<Vec<u8>, StoreError> {
    encode(Kind::Tombstone, &Tombstone { snapshot, time: Timestamp::now() })
}

fn note(note: Note) -> Result<(Kind, Vec<u8>, FactAt), StoreError> {
    let bytes = encode(Kind::Note, &note)?;
    Ok((Kind::Note, bytes, Box::new(move |location| Fact::Note(note, location))))
}

/// The stored bytes of a value, if they are not too many.
pub(crate) fn encode<T: serde::Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>, StoreError> {
    let bytes = record::encode(value).map_err(|source| StoreError::Record { kind, source })?;
    check_length(kind, bytes.len())?;
    Ok(bytes)
}

/// An error if an object of so many plain bytes cannot be stored.
pub(crate) fn check_length(kind: Kind, plain_bytes: usize) -> Result<(), StoreError> {
    match plain_bytes > Kind::MAX_PLAIN_BYTES {
        true => Err(StoreError::TooLarge { kind, found_bytes: plain_bytes as u64 }),
        false => Ok(()),
    }
}

/// A clock may say the same twice, or step back so little: then the time is moved on.
const CLOCK_STEP: SignedDuration = SignedDuration::from_micros(1);

/// The time of a snapshot that is taken when the clock says `now`, and its moment, which is later than the `newest`.
fn time_and_moment(now: Timestamp, newest: Timestamp) -> (Timestamp, Timestamp) {
    let moment = later(now, newest);
    match moment.duration_since(now) < CLOCK_STEP {
        true => (moment, moment),
        false => (now, moment),
    }
}

/// Now, or just after `before` where the clock says that it is earlier.
fn later_than(before: Option<Timestamp>) -> Timestamp {
    before.map_or_else(Timestamp::now, |before| later(Timestamp::now(), before))
}

fn later(now: Timestamp, before: Timestamp) -> Timestamp {
    match now <= before {
        // A record may claim the last moment there is: then nothing is later.
        true => before.checked_add(SignedDuration::from_nanos(1)).unwrap_or(before),
        false => now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_on_after_whatever_moment_a_record_claims() {
        let now = Timestamp::now();
        assert!(later_than(None) >= now);
        let later = Timestamp::MAX - SignedDuration::from_secs(1);
        assert_eq!(later_than(Some(later)), later + SignedDuration::from_nanos(1));
        assert_eq!(later_than(Some(Timestamp::MAX)), Timestamp::MAX);
    }

    #[test]
    fn a_snapshot_has_the_time_of_the_clock_and_stands_after_the_newest() {
        let now = Timestamp::from_second(1_790_000_000).unwrap();
        let nanos = SignedDuration::from_nanos;
        assert_eq!(time_and_moment(now, Timestamp::MIN), (now, now));
        assert_eq!(time_and_moment(now, now), (now + nanos(1), now + nanos(1)), "a coarse clock");
        let ahead = now + SignedDuration::from_hours(24 * 365 * 17);
        assert_eq!(time_and_moment(now, ahead), (now, ahead + nanos(1)));
        assert_eq!(time_and_moment(now, Timestamp::MAX), (now, Timestamp::MAX));
    }
}
