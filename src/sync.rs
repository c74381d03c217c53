//! Locks that ignore poison.
//!
//! A lock of the standard library is poisoned when a thread panics while it holds the lock, and
//! every later caller gets an error. Here such a panic ends only the work of that thread. This is
//! safe because every lock guards data that each step leaves consistent, and a store that stays
//! usable is better than one that panics in all threads.

use std::sync::{MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};

/// A [`std::sync::Mutex`] that ignores poison.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

/// A [`std::sync::RwLock`] that ignores poison.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T>(std::sync::RwLock<T>);

/// A [`std::sync::Condvar`] for a [`Mutex`].
#[derive(Debug, Default)]
pub(crate) struct Condvar(std::sync::Condvar);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Mutex(std::sync::Mutex::new(value))
    }

    /// Waits for the lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value. The caller owns the lock, so no other thread can have it.
    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> RwLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        RwLock(std::sync::RwLock::new(value))
    }

    /// Waits until no thread writes.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no thread reads or writes.
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Condvar {
    /// Releases the lock, waits for a notification, and locks it again.
    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the condition holds.
    pub(crate) fn wait_while<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        holds: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        self.0.wait_while(guard, holds).unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes one thread that waits.
    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all threads that wait.
    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn locks_go_on_after_a_thread_has_panicked_with_them() {
        let locks = Arc::new((Mutex::new(1), RwLock::new(2), Condvar::default()));
        let held = locks.clone();
        let panicked = std::thread::spawn(move || {
            let (mut first, mut second) = (held.0.lock(), held.1.write());
            (*first, *second) = (3, 4);
            panic!("with both locks held");
        });
        assert!(panicked.join().is_err());
        assert_eq!((*locks.0.lock(), *locks.1.read()), (3, 4));
        *locks.1.write() += 1;
        let guard = locks.2.wait_while(locks.0.lock(), |value| *value != 3);
        assert_eq!(*guard + *locks.1.read(), 8);
    }
}
