//! The LOCK file: one process owns a store at a time.
//!
//! The lock is the kernel's (`flock`), so it goes with the process that held it however that
//! ended; nothing ever needs to be unlocked by hand. The pid in the file only tells others whom
//! they are waiting for.

use std::fs::TryLockError;
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::StoreError;
use crate::sys::file::{self, File};

const LOCK_FILE: &str = "LOCK";

/// How often a waiting process looks again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Holds the store until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the store at `store`, waiting up to `wait` for another owner.
    pub(crate) fn take(store: &Path, wait: Duration) -> Result<Lock, StoreError> {
        let path = store.join(LOCK_FILE);
        let file = file::open_or_create(&path).map_err(StoreError::io("open", &path))?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if started.elapsed() < wait => std::thread::sleep(RETRY_EVERY),
                Err(TryLockError::WouldBlock) => {
                    let read = file::read_bounded(&path, 32).ok();
                    let owner = read.and_then(|text| str::from_utf8(&text).ok()?.trim().parse().ok());
                    return Err(StoreError::Owned { path: store.to_owned(), owner });
                }
                Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", &path)(error)),
            }
        }
        let pid = format!("{}\n", std::process::id());
        match file.set_length(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0)) {
            // A full disk must not keep anybody from freeing space; the pid is only a courtesy.
            Err(error) if error.kind() != std::io::ErrorKind::StorageFull => {
                Err(StoreError::io("write", path)(error))
            }
            _ => Ok(Lock { _file: file }),
        }
    }
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
}
