//! The store: packs as the log, sled as the index, and the code that keeps them in agreement.
//!
//! ```text
//! STORE/               directory.rs 0700; every file 0600: memory holds secrets
//!   FORMAT             format.rs    what the store is; identity.rs compares it with the packs
//!   LOCK               lock.rs      locked, like the directory, while a process has the store open
//!   packs/N.pack       packs/       the data: objects, appended by the log
//!   index/             index/       a cache: where each object is; written by the settler (settle.rs)
//!   damaged/                        files that repair set aside
//! ```
//!
//! `open.rs` opens all of these and `recover.rs` scans what the index lacks. The result is the open
//! store (`open_store.rs`, with `commit.rs` and `damage.rs`), from which `read.rs` reads objects
//! and verifies them. The catalog (`catalog.rs`) holds all snapshots in memory. The gate
//! (`gate.rs`) keeps gc from dropping objects that a running capture refers to. `Store` is the
//! handle.
//!
//! The packs hold all data. The index is only a cache of them: it may lag behind, and losing it
//! costs time but no data.

pub(crate) mod catalog;
mod clock;
pub(crate) mod commit;
pub(crate) mod cursor;
mod damage;
mod dangling;
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
mod open_store;
pub(crate) mod packs;
pub(crate) mod pinned;
pub(crate) mod read;
mod recover;
pub(crate) mod replace;
mod settle;
pub(crate) mod tables;
pub(crate) mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::codec::Codec;
use crate::progress::Progress;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;
use crate::units::RegionSize;
use format::{FORMAT_VERSION, Format};
use lock::{Access, Lock};

pub use crate::table::REGIONS_PER_TABLE;
pub use catalog::Labels;
pub use error::StoreError;
pub use id::StoreId;
pub use packs::object::ObjectKind;
pub use read::Check;

pub(crate) use open_store::OpenStore;

/// A store of snapshots. At most one process has it open for writing.
///
/// It is `Send + Sync`: put it into an [`Arc`], and any number of threads can capture into it and
/// restore from it at once. No data is lost if it is never dropped. Dropping it waits for captures
/// that run in the background ([`Process::start_capture`]).
///
/// [`Process::start_capture`]: crate::Process::start_capture
///
/// # Examples
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
    shared: Arc<OpenStore>,
    settler: Option<JoinHandle<()>>,
}

/// Options for creating or opening a store. See [`Store::options`].
///
/// ```
/// use std::time::Duration;
/// use stillframe::{RegionSize, Store};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("vault");
/// let store = Store::options().region_size(RegionSize::new(4096)?).create(&path)?;
/// drop(store);
/// let store = Store::options().wait(Duration::from_secs(5)).open(&path)?;
/// assert_eq!(store.info().region_size.bytes(), 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    region_size: RegionSize,
    codec: Codec,
    wait: Duration,
    trust_owner: bool,
}

/// The properties of a store, which are fixed when it is created.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreInfo {
    /// Its path.
    pub path: PathBuf,
    /// The version of its format.
    pub format: u32,
    /// The size of its regions.
    pub region_size: RegionSize,
    /// The codec of new objects.
    pub codec: Codec,
    /// Its identity, which no other store has.
    pub id: StoreId,
}

impl StoreOptions {
    /// The region size of a store that is created. The default is 16 KiB.
    pub fn region_size(mut self, size: RegionSize) -> Self {
        self.region_size = size;
        self
    }

    /// The codec of a store that is created. The default is LZ4.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// How long to wait while another process has the store open. The default is not to wait.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Lets root use a directory that belongs to another user. By default this is refused: that
    /// user can change the directory's content at any moment, and thereby what root does to other
    /// files.
    pub fn trust_owner(mut self, trust: bool) -> Self {
        self.trust_owner = trust;
        self
    }

    /// Creates a store in the directory `path` and opens it. The directory must be empty or not
    /// exist.
    ///
    /// # Errors
    ///
    /// [`StoreError::AlreadyAStore`] if there is a store already; [`StoreError::NotAStore`] if
    /// there is something else.
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
        // A directory that existed before is synced too: the process that made it may not have done
        // so.
        file::sync_parent(path).map_err(StoreError::io("make durable", path))?;
        // An interrupted creation leaves these behind.
        let is_left =
            |found: &Name| ["LOCK", "FORMAT.new", names::PACKS_DIR].iter().any(|it| found.name() == *it);
        let others = !file::list(&dir).map_err(StoreError::io("list", path))?.iter().all(is_left);
        if others {
            let why = "the directory has other files in it; choose an empty or a new one".to_owned();
            return Err(StoreError::NotAStore { path: path.to_owned(), why });
        }
        file::make_dir_private(&dir).map_err(StoreError::io("protect", path))?;
        let lock = Lock::take(&dir, self.wait).inspect_err(|error| {
            // No store can be created here, so the new directory is removed.
            if is_new && matches!(error, StoreError::CannotLock { .. }) {
                let _ = std::fs::remove_dir(path);
            }
        })?;
        let packs = dir.join(names::PACKS_DIR);
        file::create_dir(&packs).map_err(StoreError::io("create", &packs))?;
        let (region_size, codec) = (self.region_size, self.codec);
        Format { version: FORMAT_VERSION, region_size, codec, id: StoreId::new() }.write(&dir)?;
        Store::open_locked(&dir, lock)
    }

    /// Opens the store in the directory `path`.
    ///
    /// The first opening after a crash reads what the index lacks, at about 1 GB/s (AMD EPYC, 2
    /// cores). On a read-only file system every opening reads all packs. Any number of processes
    /// can open the store there, and everything works except changing it.
    ///
    /// # Errors
    ///
    /// [`StoreError::NotAStore`], [`StoreError::NewerFormat`], [`StoreError::OlderFormat`],
    /// [`StoreError::Owned`], or an error of the operating system.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Store, StoreError> {
        let dir = directory::open(path.as_ref(), self.trust_owner)?;
        Format::read(&dir)?;
        Store::open_locked(&dir, Lock::take(&dir, self.wait)?)
    }

    /// Opens the store in the directory `path`, or creates one if there is none.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open) and [`create`](Self::create).
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
    /// Those of [`StoreOptions::open`].
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
            replace::finish_interrupted(dir)?;
        }
        let format = Format::read(dir)?;
        Store::open_as(dir, &Arc::new(lock), format, false, &Progress::default())
    }

    /// Opens a store of a known format, whose lock is held. With `rebuild`, its index is discarded
    /// first.
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
        let save = opened.save;
        let shared = Arc::new(OpenStore::new(dir, format, lock.clone(), opened, tasks));
        let settler =
            settle::start(shared.clone(), receiver).map_err(StoreError::io("start a thread for", dir))?;
        // From here on, dropping the store ends the thread, after an error too.
        let store = Store { shared, settler: Some(settler) };
        let shared = &store.shared;
        // The index is saved only now: the next opening sees only what lies past the watermarks.
        shared.resolve_with(&shared.other_deltas)?;
        if save {
            shared.index().save()?;
            shared.index().set_rebuilding(false)?;
        } else {
            shared.index().save_if_much()?;
        }
        if !shared.damage_known() {
            shared.drop_dangling()?;
        }
        Ok(store)
    }

    /// The store's properties.
    pub fn info(&self) -> StoreInfo {
        let Format { version, region_size, codec, id } = self.shared.format.clone();
        StoreInfo { path: self.shared.path.clone(), format: version, region_size, codec, id }
    }

    /// Returns an error if the store cannot be changed: because it is read-only, because it was
    /// moved or replaced since it was opened, or because this process was forked from the one that
    /// opened it. Every method that changes the store checks this first; call it to fail early.
    ///
    /// # Errors
    ///
    /// [`StoreError::ReadOnly`], [`StoreError::Moved`], [`StoreError::LockReplaced`],
    /// [`StoreError::OtherPid`].
    pub fn check_writable(&self) -> Result<(), StoreError> {
        self.shared.check_writable()
    }

    pub(crate) fn shared(&self) -> &Arc<OpenStore> {
        &self.shared
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if !self.shared.is_of_this_process() {
            // A forked process has a copy of this memory and none of the threads. The files belong
            // to the process that has the store open, so this process must not change them. It
            // leaks the store instead of dropping it.
            std::mem::forget((self.shared.clone(), self.settler.take()));
            return;
        }
        self.shared.join_background();
        self.shared.end_tasks();
        if let Some(settler) = self.settler.take() {
            // The settler has logged its errors, and the packs hold all data.
            let _ = settler.join();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("path", &self.shared.path).finish_non_exhaustive()
    }
}
