//! Processes that were forked from this one, and what they must not keep.
//!
//! A lock of `flock` belongs to the open file, which a forked process has too. So it would last as long as the
//! child lives, whatever becomes of the parent. In the child another file takes the place of the locked one, in the
//! moment of the fork: then only the parent holds the lock. Who forks by a system call of their own goes past that;
//! then the lock lasts until the parent gives it back, or both have ended.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::dir::{Dir, Found, Identity};
use crate::sync::Mutex;

/// How often this process was forked, and those that it was forked from; as far as that was done by `fork`.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// A process, told apart from those that are forked from it, and those they fork.
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

    /// Whether this process is that one. Cost: a system call.
    pub(crate) fn is_this(self) -> bool {
        self == ProcessId::this()
    }

    /// The same at the cost of reading a number, but for children that were not made by `fork`.
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
    // SAFETY: the handler makes no calls but `dup3` and touches atomics only, so it may run in the child of a process
    // with several threads. Should there be no memory for it, children are still known by their pids.
    REGISTERED.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
}

/// How many files there may be that are not kept. Others are kept by the child, as described above.
const MAX_FILES: usize = 128;

const NONE: i32 = -1;

/// Each is a descriptor and the one that takes its place in a child.
static FILES: [[AtomicI32; 2]; MAX_FILES] =
    [const { [AtomicI32::new(NONE), AtomicI32::new(NONE)] }; MAX_FILES];

/// Held while a place is looked for. Not by the child, which may be forked while another thread holds it.
static CHANGING: Mutex<()> = Mutex::new(());

/// While this is there, a child of a fork does not get the file.
#[derive(Debug)]
pub(crate) struct NotInherited(usize);

/// Sees to it that in a child of a fork `instead` takes the place of `file`. Both must stay open until what is
/// returned is dropped. Nothing, where there is no place for it.
pub(crate) fn not_inherited(file: BorrowedFd<'_>, instead: BorrowedFd<'_>) -> Option<NotInherited> {
    register();
    let _changing = CHANGING.lock();
    let at = FILES.iter().position(|[file, _]| file.load(Ordering::Relaxed) == NONE)?;
    FILES[at][1].store(instead.as_raw_fd(), Ordering::Relaxed);
    FILES[at][0].store(file.as_raw_fd(), Ordering::Release);
    Some(NotInherited(at))
}

/// The same of all open files that are this one: those of a library that tells nobody its descriptors.
pub(crate) fn all_not_inherited(identity: Identity, instead: &Dir) -> Vec<NotInherited> {
    let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let number = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let descriptors: Vec<i32> = descriptors.filter_map(number).collect();
    let is_this = |descriptor: &BorrowedFd<'_>| {
        Found::of(descriptor).is_ok_and(|found| found.is_plain_file() && found.identity() == identity)
    };
    descriptors
        .into_iter()
        // SAFETY: the number is used for a look at what is open there now; should it be closed meanwhile, or be that of
        // another file, it is not taken for this one.
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
            // SAFETY: both descriptors are open in the child as they are in the parent, which keeps them so as long as
            // they are in the list. The number of the first stays taken, so nothing else comes to have it.
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
