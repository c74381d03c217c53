//! The store: packs as the log, sled as the index, and what holds them together.
//!
//! ```text
//! STORE/               directory.rs 0700; every file 0600: memory holds secrets
//!   FORMAT             format.rs    what the store is; identity.rs holds it against the packs
//!   LOCK               lock.rs      held, as the directory is, by the process that has it open
//!   packs/N.pack       packs/       the truth: objects, appended by the log
//!   index/             index/       derived: where each object is; fed by the settler (settle.rs)
//!   damaged/                        what was set aside
//! ```
//!
//! `open.rs` opens all that and `recover.rs` scans what the index lacks; together they are the open store
//! (`open_store.rs`, with `commit.rs` and `damage.rs`), of which `read.rs` reads objects, checked. The catalog (`catalog.rs`) has all snapshots in memory; the gate
//! (`gate.rs`) keeps gc from dropping what a running capture refers to. `Store` is the handle on it.

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
pub(crate) use open_store::OpenStore as Shared;

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
    shared: Arc<OpenStore>,
    settler: Option<JoinHandle<()>>,
}

/// How to create or open a store. See [`Store::options`].
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    region_size: RegionSize,
    codec: Codec,
    wait: Duration,
    trust_owner: bool,
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
        let (region_size, codec) = (self.region_size, self.codec);
        Format { version: FORMAT_VERSION, region_size, codec, id: StoreId::new() }.write(&dir)?;
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
            replace::finish_interrupted(dir)?;
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
        let save = opened.save;
        let shared = Arc::new(OpenStore::new(dir, format, lock.clone(), opened, tasks));
        let settler =
            settle::start(shared.clone(), receiver).map_err(StoreError::io("start a thread for", dir))?;
        // From here on dropping it, also for an error, ends the thread.
        let store = Store { shared, settler: Some(settler) };
        let shared = &store.shared;
        // Saved no sooner: the next opening sees only what lies past the watermarks.
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
    /// [`StoreError::ReadOnly`], [`StoreError::Moved`], [`StoreError::LockReplaced`], [`StoreError::OtherPid`].
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
            // A forked process has the memory of all this and none of the threads. Whatever were done here would be
            // done to the files of the process that has it open; so it is left as it is.
            std::mem::forget((self.shared.clone(), self.settler.take()));
            return;
        }
        self.shared.join_background();
        self.shared.end_tasks();
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
