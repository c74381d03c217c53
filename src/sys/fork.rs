//! Processes forked from this one, and the open files that they must not keep.
//!
//! A `flock` lock belongs to the open file, which a forked process shares. So the lock would last
//! as long as the child lives, even after the parent has ended. At the moment of the fork, the
//! child therefore replaces its descriptor of the locked file by another file; then only the parent
//! holds the lock. A process that forks with a direct system call bypasses this; then the lock
//! lasts until the parent releases it or both processes have ended.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::dir::{Dir, Found, Identity};
use crate::sync::Mutex;

/// The number of forks between the first process and this one, as far as they were made by `fork`.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// A process, distinguished from the processes forked from it and from their children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pid: u32,
    forks: u32,
}

impl ProcessId {
    /// This process.
    pub(crate) fn this() -> ProcessId {
        register();
        ProcessId { pid: std::process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }

    /// Its pid.
    pub(crate) fn pid(self) -> u32 {
        self.pid
    }

    /// Whether this is the calling process. Cost: one system call.
    pub(crate) fn is_this(self) -> bool {
        self == ProcessId::this()
    }

    /// The same for the cost of reading a number, but it does not recognize children that were not
    /// made by `fork`.
    pub(crate) fn may_be_this(self) -> bool {
        self.forks == FORKS.load(Ordering::Relaxed)
    }
}

impl Default for ProcessId {
    fn default() -> Self {
        ProcessId::this()
    }
}

fn register() {
    static REGISTERED: Once = Once::new();
    // SAFETY: the handler makes no calls except `dup3` and accesses only atomics, so it may run in
    // the child of a process with several threads. If there is no memory to register it, children
    // are still recognized by their pids.
    REGISTERED.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
}

/// The greatest number of files that children do not inherit. A child inherits further files, as
/// described above.
const MAX_FILES: usize = 128;

const NONE: i32 = -1;

/// Each pair is a descriptor and the one that replaces it in a child.
static FILES: [[AtomicI32; 2]; MAX_FILES] =
    [const { [AtomicI32::new(NONE), AtomicI32::new(NONE)] }; MAX_FILES];

/// Held while a free slot is searched. The child does not take it, because it may be forked while
/// another thread holds it.
static CHANGING: Mutex<()> = Mutex::new(());

/// While this exists, a child of a fork does not get the file.
#[derive(Debug)]
pub(crate) struct NotInherited(usize);

/// In a child of a fork, replaces `file` by `instead`. Both must stay open until the returned value
/// is dropped. Returns `None` if there is no free slot.
pub(crate) fn not_inherited(file: BorrowedFd<'_>, instead: BorrowedFd<'_>) -> Option<NotInherited> {
    register();
    let _changing = CHANGING.lock();
    let at = FILES.iter().position(|[file, _]| file.load(Ordering::Relaxed) == NONE)?;
    FILES[at][1].store(instead.as_raw_fd(), Ordering::Relaxed);
    FILES[at][0].store(file.as_raw_fd(), Ordering::Release);
    Some(NotInherited(at))
}

/// The same for every descriptor in this process that refers to this file: for files of a library
/// that does not expose its descriptors.
pub(crate) fn all_not_inherited(identity: Identity, instead: &Dir) -> Vec<NotInherited> {
    let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let descriptors: Vec<i32> = descriptors.filter_map(number).collect();
    let is_this = |descriptor: &BorrowedFd<'_>| {
        Found::of(descriptor).is_ok_and(|found| found.is_plain_file() && found.identity() == identity)
    };
    descriptors
        .into_iter()
        // SAFETY: the number is used only to inspect what is open there now. If it is closed or
        // reused for another file meanwhile, the identities differ.
        .map(|descriptor| unsafe { BorrowedFd::borrow_raw(descriptor) })
        .filter(is_this)
        .filter_map(|descriptor| not_inherited(descriptor, instead.as_fd()))
        .collect()
}

impl Drop for NotInherited {
    fn drop(&mut self) {
        FILES[self.0][0].store(NONE, Ordering::Release);
    }
}

unsafe extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    for [file, instead] in &FILES {
        let file = file.load(Ordering::Acquire);
        if file != NONE {
            // SAFETY: both descriptors are open in the child as they are in the parent, which keeps
            // them open while they are in the list. The number of the first one stays taken, so it
            // cannot be reused.
            unsafe { libc::dup3(instead.load(Ordering::Relaxed), file, libc::O_CLOEXEC) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself() {
        let this = ProcessId::this();
        assert!(this.is_this() && this.may_be_this());
        let child = ProcessId { forks: this.forks + 1, ..this };
        assert!(!child.is_this() && !child.may_be_this());
        assert!(!ProcessId { pid: this.pid + 1, ..this }.is_this());
    }
}
