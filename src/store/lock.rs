//! The lock of a store: one process owns it at a time.
//!
//! ```text
//! STORE/        flock    check_writable detects when the directory was moved or replaced
//! STORE/LOCK    flock    the lock of earlier versions; contains the owner's pid, for messages
//! ```
//!
//! The kernel releases both locks when the process that holds them ends, even if it is killed, so
//! no stale lock ever needs to be removed. The pid in the file only tells others which process they
//! wait for. If a directory cannot be locked (NFS), LOCK is the only lock, and must not be
//! replaced.
//!
//! A store in which nothing can be written (a read-only file system, modes, an immutable flag) has
//! any number of *readers* instead of an owner. They share the lock, which excludes an owner to
//! whom the same files are writable under another mount. Readers write no pid. If there is no LOCK,
//! a reader cannot exclude an owner.
//!
//! A process that is forked from the one that opened the store does not have the store open
//! ([`fork`](crate::sys::fork)).

use std::fs::TryLockError;
use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::error::StoreError;
use super::names::PACKS_DIR;
use crate::sys::dir::{Dir, Identity, Name};
use crate::sys::file::{self, File};
use crate::sys::fork::{NotInherited, ProcessId, not_inherited};

const LOCK_FILE: &str = "LOCK";

/// How often a waiting process tries again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// An owner writes its pid as soon as it has the lock. Until then the pid of a dead owner may still
/// be in the file.
const PID_WITHIN: Duration = Duration::from_millis(200);

/// What a process may do with a store that it has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Change it. There is one owner.
    Owner,
    /// Only read it: nothing can be written there.
    Reader,
}

/// Holds the lock of a store until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    store: Dir,
    access: Access,
    /// The process that took the lock.
    process: ProcessId,
    /// `None` in a process that was forked from that one, and after the lock was released.
    held: Option<Held>,
}

/// The locked files. The fields are dropped in this order: a descriptor leaves the list of those
/// that children must not have before it is closed.
#[derive(Debug)]
struct Held {
    _not_inherited: Vec<NotInherited>,
    directory: Option<std::fs::File>,
    file: Option<(File, Identity)>,
}

impl Lock {
    /// Takes the lock of a store. Waits up to `wait` if another process has it.
    pub(crate) fn take(store: &Dir, wait: Duration) -> Result<Lock, StoreError> {
        // All stores of a process share the threads of the database and of rayon. They are started
        // once and do not exist in a forked process, which would wait for them without end.
        static FIRST: OnceLock<ProcessId> = OnceLock::new();
        let first = *FIRST.get_or_init(ProcessId::this);
        if !first.is_this() {
            let (opened_by, used_by) = (first.pid(), ProcessId::this().pid());
            return Err(StoreError::Forked { path: store.into(), opened_by, used_by });
        }
        let started = Instant::now();
        loop {
            if let Some((access, held)) = attempt(store)? {
                return Ok(Lock {
                    store: store.clone(),
                    access,
                    process: ProcessId::this(),
                    held: Some(held),
                });
            }
            if started.elapsed() >= wait {
                let owner = owner(&store.join(LOCK_FILE));
                return Err(StoreError::Owned { path: store.into(), owner });
            }
            std::thread::sleep(RETRY_EVERY);
        }
    }

    /// What the holder may do.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// Whether this process took it.
    pub(crate) fn is_of_this_process(&self) -> bool {
        self.process.is_this()
    }

    /// Returns an error in a process that was forked from the one that has the store open.
    pub(crate) fn check_process(&self) -> Result<(), StoreError> {
        if self.is_of_this_process() {
            Ok(())
        } else {
            Err(StoreError::of_other_process(&self.store, self.process))
        }
    }

    /// As [`check_process`](Self::check_process) at no cost, but it misses children that were not
    /// made by `fork`.
    pub(crate) fn check_fork(&self) -> Result<(), StoreError> {
        if self.process.may_be_this() { Ok(()) } else { self.check_process() }
    }

    /// Returns an error if this process cannot change the store: because it was forked, because the
    /// store is read-only, because the store is not where it was opened, or because another program
    /// may have it open.
    pub(crate) fn check_writable(&self) -> Result<(), StoreError> {
        self.check_process()?;
        match self.access {
            Access::Owner => self.check_place(),
            Access::Reader => Err(StoreError::ReadOnly { path: (&self.store).into() }),
        }
    }

    /// Returns an error if another directory is at the store's path, or another file at that of its
    /// LOCK.
    fn check_place(&self) -> Result<(), StoreError> {
        if !self.store.is_at_its_path().map_err(StoreError::io("find", &self.store))? {
            return Err(StoreError::Moved { path: (&self.store).into() });
        }
        let Some(Held { directory, file: Some((_, locked)), .. }) = &self.held else { return Ok(()) };
        let name = self.store.join(LOCK_FILE);
        match name.look().map_err(StoreError::io("find", &name))? {
            Some(found) if found.identity() == *locked => Ok(()),
            // The lock of the directory excludes all programs that lock it too.
            None if directory.is_some() => Ok(()),
            _ => Err(StoreError::LockReplaced { path: (&name).into() }),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let held = self.held.take();
        if !self.is_of_this_process() {
            // In this process the descriptor numbers may belong to other files.
            return std::mem::forget(held);
        }
        if let Some(Held { directory, file, .. }) = &held {
            // Closing is not enough: a process that was forked from this one without our knowledge
            // may have the descriptors too.
            let _ = file.as_ref().map(|(file, _)| file.unlock());
            let _ = directory.as_ref().map(std::fs::File::unlock);
        }
    }
}

/// Tries to take the lock once. `None` if another process has it.
fn attempt(store: &Dir) -> Result<Option<(Access, Held)>, StoreError> {
    let name = store.join(LOCK_FILE);
    let access = access(store, &name)?;
    // If the directory cannot be opened or locked, LOCK is the lock.
    let directory = match store.open_to_read() {
        Err(_) => None,
        Ok(directory) => match try_lock(access, || directory.try_lock(), || directory.try_lock_shared()) {
            Ok(true) => Some(directory),
            Ok(false) => return Ok(None),
            Err(_) => None,
        },
    };
    let there_was = name.exists();
    let opened = match access {
        Access::Owner => file::open_or_create(&name),
        Access::Reader => file::open_to_read(&name),
    };
    let mut file = match opened {
        Err(error) if access == Access::Reader && error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some((access, held(store, directory, None))));
        }
        other => other.map_err(StoreError::io("open", &name))?,
    };
    let lock = |file: &File| {
        try_lock(access, || file.try_lock(), || file.try_lock_shared()).map_err(|source| {
            if !there_was && access == Access::Owner {
                let _ = file::remove(&name);
            }
            StoreError::CannotLock { path: (&name).into(), source }
        })
    };
    if !lock(&file)? {
        return Ok(None);
    }
    if access == Access::Owner {
        if file.has_other_names().map_err(StoreError::io("read", &name))? {
            // The file has another name, perhaps in a backup, and our pid must not be written into
            // that.
            file::remove(&name).map_err(StoreError::io("remove", &name))?;
            file = file::create_new(&name).map_err(StoreError::io("create", &name))?;
            if !lock(&file)? {
                return Ok(None);
            }
        }
        let pid = format!("{}\n", std::process::id());
        match file.set_length(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0)) {
            // A full disk must not prevent freeing space, and nothing depends on the pid.
            Err(error) if !file::is_no_room(&error) => return Err(StoreError::io("write", &name)(error)),
            _ => {}
        }
    }
    let identity = file.identity().map_err(StoreError::io("read", &name))?;
    // The previous owner may have replaced the file after this process opened it.
    match name.look().map_err(StoreError::io("find", &name))? {
        Some(found) if found.identity() == identity => {
            Ok(Some((access, held(store, directory, Some((file, identity))))))
        }
        _ => Ok(None),
    }
}

fn held(store: &Dir, directory: Option<std::fs::File>, file: Option<(File, Identity)>) -> Held {
    let directories = directory.iter().filter_map(|it| not_inherited(it.as_fd(), store.as_fd()));
    let files = file.iter().filter_map(|(it, _)| not_inherited(it.as_fd(), store.as_fd()));
    Held { _not_inherited: directories.chain(files).collect(), directory, file }
}

/// Whether the store can be changed: its directory, its packs and its LOCK, if they exist.
fn access(store: &Dir, lock: &Name) -> Result<Access, StoreError> {
    let is_read_only = |dir: &Dir| file::is_read_only(dir).map_err(StoreError::io("open", dir));
    if is_read_only(store)? {
        return Ok(Access::Reader);
    }
    if let Ok(packs) = store.join(PACKS_DIR).open_dir()
        && is_read_only(&packs)?
    {
        return Ok(Access::Reader);
    }
    if lock.exists() && !lock.is_writable() { Ok(Access::Reader) } else { Ok(Access::Owner) }
}

/// Tries to lock. Returns whether that worked: no if another process has the lock.
fn try_lock(
    access: Access,
    alone: impl FnOnce() -> Result<(), TryLockError>,
    shared: impl FnOnce() -> Result<(), TryLockError>,
) -> io::Result<bool> {
    let locked = match access {
        Access::Owner => alone(),
        Access::Reader => shared(),
    };
    match locked {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The owner's pid, if it can be known. Never that of a dead owner; readers have none.
fn owner(lock: &Name) -> Option<u32> {
    let started = Instant::now();
    loop {
        let read = file::read_bounded(lock, 32).ok();
        let pid = read.and_then(|text| str::from_utf8(&text).ok()?.trim().parse().ok());
        if pid.is_some_and(is_there) || started.elapsed() > PID_WITHIN {
            return pid.filter(|pid| is_there(*pid));
        }
        std::thread::sleep(RETRY_EVERY);
    }
}

fn is_there(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_the_first_ones_pid_and_may_wait() {
        let dir = tempfile::tempdir().unwrap();
        let store = Dir::open(dir.path()).unwrap();
        let first = Lock::take(&store, Duration::ZERO).unwrap();
        match Lock::take(&store, Duration::from_millis(30)) {
            Err(StoreError::Owned { owner, .. }) => assert_eq!(owner, Some(std::process::id())),
            other => panic!("expected to be refused, got {other:?}"),
        }
        let waiting = std::thread::spawn(move || Lock::take(&store, Duration::from_secs(60)).map(drop));
        drop(first);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn the_pid_of_a_dead_owner_is_never_told() {
        let dir = tempfile::tempdir().unwrap();
        let store = Dir::open(dir.path()).unwrap();
        let first = Lock::take(&store, Duration::ZERO).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let path = dir.path().join(LOCK_FILE);
        // This stands for an owner that has not written its pid yet.
        std::fs::write(&path, format!("{}\n", child.id())).unwrap();
        assert!(matches!(Lock::take(&store, Duration::ZERO), Err(StoreError::Owned { owner: None, .. })));
        std::fs::write(&path, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(owner(&store.join(LOCK_FILE)), Some(std::process::id()));
        drop(first);
    }

    #[test]
    fn a_lock_that_is_removed_lets_nobody_in() {
        let dir = tempfile::tempdir().unwrap();
        let store = Dir::open(dir.path()).unwrap();
        let first = Lock::take(&store, Duration::ZERO).unwrap();
        std::fs::remove_file(dir.path().join(LOCK_FILE)).unwrap();
        assert!(matches!(Lock::take(&store, Duration::ZERO), Err(StoreError::Owned { .. })));
        first.check_writable().unwrap();
        // An older program locks only LOCK, so it could now have the store open.
        std::fs::write(dir.path().join(LOCK_FILE), "").unwrap();
        assert!(matches!(first.check_writable(), Err(StoreError::LockReplaced { .. })));
    }

    #[test]
    fn a_lock_with_a_second_name_elsewhere_is_not_written_into() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (lock, second) = (dir.path().join(LOCK_FILE), elsewhere.path().join("precious"));
        std::fs::write(&second, "precious").unwrap();
        std::fs::hard_link(&second, &lock).unwrap();
        let store = Dir::open(dir.path()).unwrap();
        let taken = Lock::take(&store, Duration::ZERO).unwrap();
        assert_eq!(std::fs::read(&second).unwrap(), b"precious");
        assert_eq!(std::fs::read_to_string(&lock).unwrap(), format!("{}\n", std::process::id()));
        taken.check_writable().unwrap();
    }
}
