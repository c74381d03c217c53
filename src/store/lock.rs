//! The LOCK file: one process owns a store at a time.
//!
//! The lock is the kernel's (`flock`), so it goes with the process that held it however that
//! ended; nothing ever needs to be unlocked by hand. The pid in the file only tells others whom
//! they are waiting for.
//!
//! A store on a read-only file system has *readers* instead of an owner, any number of them. They share
//! the lock, so that an owner who has the same files writable elsewhere and they keep each other out; no pid is
//! written, and where there is no LOCK nobody can be kept out.

use std::fs::TryLockError;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::StoreError;
use crate::sys::file::{self, File};

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
    /// Nothing that writes a single byte: the file system is read-only.
    Reader,
}

/// Holds the store until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    access: Access,
    _file: Option<File>,
}

impl Lock {
    /// Takes the lock of the store at `store`, waiting up to `wait` for another owner.
    pub(crate) fn take(store: &Path, wait: Duration) -> Result<Lock, StoreError> {
        let path = store.join(LOCK_FILE);
        let access = match file::is_read_only(store).map_err(StoreError::io("open", store))? {
            true => Access::Reader,
            false => Access::Owner,
        };
        let opened = match access {
            Access::Owner => file::open_or_create(&path),
            Access::Reader => file::open_to_read(&path),
        };
        let file = match opened {
            Err(error) if access == Access::Reader && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Lock { access, _file: None });
            }
            other => other.map_err(StoreError::io("open", &path))?,
        };
        let started = Instant::now();
        loop {
            let taken = match access {
                Access::Owner => file.try_lock(),
                Access::Reader => file.try_lock_shared(),
            };
            match taken {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if started.elapsed() < wait => std::thread::sleep(RETRY_EVERY),
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::Owned { path: store.to_owned(), owner: owner(&path) });
                }
                Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", &path)(error)),
            }
        }
        if access == Access::Owner {
            let pid = format!("{}\n", std::process::id());
            match file.set_length(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0)) {
                // A full disk must not keep anybody from freeing space; the pid is only a courtesy.
                Err(error) if error.kind() != io::ErrorKind::StorageFull => {
                    return Err(StoreError::io("write", path)(error));
                }
                _ => {}
            }
        }
        Ok(Lock { access, _file: Some(file) })
    }

    /// What its holder may do.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// An error where the store at `store`, which this holds, cannot be changed.
    pub(crate) fn check_writable(&self, store: &Path) -> Result<(), StoreError> {
        match self.access {
            Access::Owner => Ok(()),
            Access::Reader => Err(StoreError::ReadOnly { path: store.to_owned() }),
        }
    }
}

/// The pid of the owner, where it can be known: not that of a dead one, and none of readers.
fn owner(path: &Path) -> Option<u32> {
    let started = Instant::now();
    loop {
        let read = file::read_bounded(path, 32).ok();
        let pid = read.and_then(|text| str::from_utf8(&text).ok()?.trim().parse().ok());
        if pid.is_some_and(is_there) || started.elapsed() > PID_WITHIN {
            return pid.filter(|pid| is_there(*pid));
        }
        std::thread::sleep(RETRY_EVERY);
    }
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_the_first_ones_pid_and_may_wait() {
        let store = tempfile::tempdir().unwrap();
        let first = Lock::take(store.path(), Duration::ZERO).unwrap();
        match Lock::take(store.path(), Duration::from_millis(30)) {
            Err(StoreError::Owned { owner, .. }) => assert_eq!(owner, Some(std::process::id())),
            other => panic!("expected to be refused, got {other:?}"),
        }
        let path = store.path().to_owned();
        let waiting = std::thread::spawn(move || Lock::take(&path, Duration::from_secs(60)).map(drop));
        drop(first);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn the_pid_of_a_dead_owner_is_never_told() {
        let store = tempfile::tempdir().unwrap();
        let first = Lock::take(store.path(), Duration::ZERO).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let path = store.path().join(LOCK_FILE);
        // As if the owner had not come to write its own yet.
        std::fs::write(&path, format!("{}\n", child.id())).unwrap();
        assert!(matches!(
            Lock::take(store.path(), Duration::ZERO),
            Err(StoreError::Owned { owner: None, .. })
        ));
        std::fs::write(&path, format!("{}\n", std::process::id())).unwrap();
        assert_eq!(owner(&path), Some(std::process::id()));
        drop(first);
    }
}
