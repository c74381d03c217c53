//! The lock of a store: one process owns it at a time.
//!
//! ```text
//! STORE/        flock    nobody can remove it without the store's being gone from its place, which is noticed
//! STORE/LOCK    flock    what earlier versions lock; has the pid of the owner in it, for others to know
//! ```
//!
//! Both locks are the kernel's, so they go with the process that held them however that
//! ended; nothing ever needs to be unlocked by hand. The pid in the file only tells others whom
//! they are waiting for. Where a directory cannot be locked (NFS), LOCK alone is, and must stay where it is.
//!
//! A store in which nothing can be written (a read-only file system, modes, an immutable flag) has *readers* instead of
//! an owner, any number of them. They share the lock, so that an owner who has the same files writable elsewhere and
//! they keep each other out; no pid is written, and where there is no LOCK nobody can be kept out.
//!
//! A process that is forked from the one that opened the store does not have it open ([`fork`](crate::sys::fork)).

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

/// How often a waiting process looks again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// An owner writes its pid as soon as it has the lock. So long a dead one's may still be there.
const PID_WITHIN: Duration = Duration::from_millis(200);

/// What a process that has a store open may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Change it: there is one owner.
    Owner,
    /// Nothing that writes a single byte: nothing can be written there.
    Reader,
}

/// Holds the store until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    store: Dir,
    access: Access,
    /// Who took it.
    process: ProcessId,
    /// `None` in a process that was forked from that one, or when it was given back.
    held: Option<Held>,
}

/// What is locked. Dropped in this order: what a child must not have goes from the list before it is closed.
#[derive(Debug)]
struct Held {
    _not_inherited: Vec<NotInherited>,
    directory: Option<std::fs::File>,
    file: Option<(File, Identity)>,
}

impl Lock {
    /// Takes the lock of a store, waiting up to `wait` for another owner.
    pub(crate) fn take(store: &Dir, wait: Duration) -> Result<Lock, StoreError> {
        // The threads of the database and of rayon are shared by all stores of a process, started once, and are not
        // there in a process that is forked from it; they would be waited for without end.
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

    /// What its holder may do.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// Whether this is the process that took it.
    pub(crate) fn is_of_this_process(&self) -> bool {
        self.process.is_this()
    }

    /// An error in a process that was forked from the one that has the store open.
    pub(crate) fn check_process(&self) -> Result<(), StoreError> {
        if self.is_of_this_process() {
            Ok(())
        } else {
            Err(StoreError::of_other_process(&self.store, self.process))
        }
    }

    /// The same at no cost, but for children that were not made by `fork`.
    pub(crate) fn check_fork(&self) -> Result<(), StoreError> {
        if self.process.may_be_this() { Ok(()) } else { self.check_process() }
    }

    /// An error where the store that this holds cannot be changed: by this process, at all, or as it is not
    /// any more where it was opened, or another program may have it.
    pub(crate) fn check_writable(&self) -> Result<(), StoreError> {
        self.check_process()?;
        match self.access {
            Access::Owner => self.check_place(),
            Access::Reader => Err(StoreError::ReadOnly { path: (&self.store).into() }),
        }
    }

    /// An error where another directory is in the store's place, or another file in the place of its LOCK.
    fn check_place(&self) -> Result<(), StoreError> {
        if !self.store.is_at_its_path().map_err(StoreError::io("find", &self.store))? {
            return Err(StoreError::Moved { path: (&self.store).into() });
        }
        let Some(Held { directory, file: Some((_, locked)), .. }) = &self.held else { return Ok(()) };
        let name = self.store.join(LOCK_FILE);
        match name.look().map_err(StoreError::io("find", &name))? {
            Some(found) if found.identity() == *locked => Ok(()),
            // The directory keeps everybody out who locks that, too.
            None if directory.is_some() => Ok(()),
            _ => Err(StoreError::LockReplaced { path: (&name).into() }),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let held = self.held.take();
        if !self.is_of_this_process() {
            // The descriptors may be those of other files here.
            return std::mem::forget(held);
        }
        if let Some(Held { directory, file, .. }) = &held {
            // Closing them is not enough while a process lives that was forked from this one past our notice.
            let _ = file.as_ref().map(|(file, _)| file.unlock());
            let _ = directory.as_ref().map(std::fs::File::unlock);
        }
    }
}

/// Tries to take the lock once; `None` where somebody else has it.
fn attempt(store: &Dir) -> Result<Option<(Access, Held)>, StoreError> {
    let name = store.join(LOCK_FILE);
    let access = access(store, &name)?;
    // Where it cannot be opened or locked there is LOCK.
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
            // Somebody has it under another name, a backup perhaps, and our pid is not to be written into that.
            file::remove(&name).map_err(StoreError::io("remove", &name))?;
            file = file::create_new(&name).map_err(StoreError::io("create", &name))?;
            if !lock(&file)? {
                return Ok(None);
            }
        }
        let pid = format!("{}\n", std::process::id());
        match file.set_length(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0)) {
            // A full disk must not keep anybody from freeing space; the pid is only a courtesy.
            Err(error) if !file::is_no_room(&error) => return Err(StoreError::io("write", &name)(error)),
            _ => {}
        }
    }
    let identity = file.identity().map_err(StoreError::io("read", &name))?;
    // Who had it before may have put another in its place when it was open here already.
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

/// Whether the store can be changed: its directory, its packs and its LOCK, as far as they are there.
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

/// Whether it is locked now; no if somebody else has it locked.
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

/// The pid of the owner, where it can be known: not that of a dead one, and none of readers.
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
        // As if the owner had not come to write its own yet.
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
        // A program that locks nothing else could have the store now.
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
