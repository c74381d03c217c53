//! `userfaultfd`, and asynchronous write protection with it. (`missing.rs` has memory that is
//! filled on page faults.) See the kernel's [userfaultfd
//! documentation](https://docs.kernel.org/admin-guide/mm/userfaultfd.html).
//!
//! Write protection: the kernel records the first write to a page and lets the thread continue at
//! once; no handler has to answer. `PAGEMAP_SCAN` (`pagemap.rs`) returns the written pages.
//!
//! The descriptor handles only faults of user mode (`UFFD_USER_MODE_ONLY`), which needs no
//! privilege for any value of `vm.unprivileged_userfaultfd`. The kernel's own writes (a `read` into
//! a protected page) are recorded too, because in this mode no fault is ever passed to user mode.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::fs::OFlags;

const USER_MODE_ONLY: u32 = 1;
const API_VERSION: u64 = 0xAA;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`, of 24 (0x18) bytes.
const API: u32 = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`, of 32 (0x20) bytes.
const REGISTER: u32 = 0xc020_aa00;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`, of 16 (0x10) bytes.
const UNREGISTER: u32 = 0x8010_aa01;
const REGISTER_MODE_WP: u64 = 1 << 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// The kernel's `struct uffdio_api`.
#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<ApiArgument>() == 0x18);

/// The kernel's `struct uffdio_register`.
#[repr(C)]
struct RegisterArgument {
    start: u64,
    length_bytes: u64,
    mode: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<RegisterArgument>() == 0x20);

/// Memory of this process whose pages can be write-protected asynchronously.
#[derive(Debug)]
pub(crate) struct Userfault {
    descriptor: OwnedFd,
}

impl Userfault {
    /// Nothing is registered yet. `EINVAL` where the kernel has no asynchronous write protection
    /// (before Linux 6.7), `ENOSYS` where it has no `userfaultfd`, `EPERM` where a sandbox forbids
    /// it.
    pub(crate) fn new() -> io::Result<Userfault> {
        let descriptor = open(Faults::OfUserMode)?;
        agree(&descriptor, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED)?;
        Ok(Userfault { descriptor })
    }

    /// Registers whole pages at these addresses. Registering them again has no effect. `EBUSY`
    /// where another `userfaultfd` has some of them.
    pub(crate) fn register(&self, range: Range<u64>) -> io::Result<()> {
        register_mode(&self.descriptor, range, REGISTER_MODE_WP)
    }

    /// Removes the registration and all protection. Callers must call this although dropping does
    /// the same: a child that was forked meanwhile holds the descriptor too.
    pub(crate) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        unregister(&self.descriptor, range)
    }
}

/// Which faults a descriptor handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Faults {
    /// Faults of the kernel too, as in a `read` into the memory. This needs a privilege
    /// (`CAP_SYS_PTRACE`), or `vm.unprivileged_userfaultfd` set to 1; otherwise `EPERM`.
    All,
    /// Only faults of user mode.
    OfUserMode,
}

/// A descriptor without any registration. `ENOSYS` where the kernel has no `userfaultfd`, `EPERM`
/// where a sandbox forbids it.
pub(super) fn open(faults: Faults) -> io::Result<OwnedFd> {
    let user_mode_only = if faults == Faults::OfUserMode { USER_MODE_ONLY } else { 0 };
    let flags = OFlags::CLOEXEC.bits() | OFlags::NONBLOCK.bits() | user_mode_only;
    // SAFETY: the call takes only flags.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let descriptor = i32::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0);
    let descriptor = descriptor.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Negotiates the interface and these features; `EINVAL` where the kernel lacks one.
pub(super) fn agree(descriptor: &OwnedFd, features: u64) -> io::Result<()> {
    let mut argument = ApiArgument { api: API_VERSION, features, ioctls: 0 };
    // SAFETY: the ioctl reads and writes one `uffdio_api`, whose layout and size `ApiArgument` has.
    let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), API as _, &raw mut argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers whole pages at these addresses.
pub(super) fn register_mode(descriptor: &OwnedFd, range: Range<u64>, mode: u64) -> io::Result<()> {
    let (start, length_bytes) = (range.start, range.end - range.start);
    let mut argument = RegisterArgument { start, length_bytes, mode, ioctls: 0 };
    // SAFETY: the ioctl reads and writes one `uffdio_register`, whose layout and size
    // `RegisterArgument` has. It changes nothing about the bytes at the addresses.
    let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), REGISTER as _, &raw mut argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Removes the registration of these pages and wakes the threads that wait for them.
pub(super) fn unregister(descriptor: &OwnedFd, range: Range<u64>) -> io::Result<()> {
    let mut argument = [range.start, range.end - range.start];
    // SAFETY: the ioctl reads one `uffdio_range`, which is two 64-bit numbers: start and length.
    let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), UNREGISTER as _, argument.as_mut_ptr()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An error (`ENOMEM`) unless each of these addresses is mapped. The range begins at a page. Cost:
/// a lookup of each mapping.
pub(crate) fn check_mapped(range: Range<u64>) -> io::Result<()> {
    let overflow = || io::Error::from_raw_os_error(libc::ENOMEM);
    let start = usize::try_from(range.start).map_err(|_| overflow())?;
    let length_bytes = usize::try_from(range.end - range.start).map_err(|_| overflow())?;
    // SAFETY: since Linux 2.6.19, the call with MS_ASYNC only inspects the mappings; it takes any
    // address.
    let answer =
        unsafe { libc::msync(std::ptr::without_provenance_mut(start), length_bytes, libc::MS_ASYNC) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_mappings_is_noticed() {
        let page_bytes = rustix::param::page_size() as u64;
        let memory = memmap2::MmapMut::map_anon(1 << 20).unwrap();
        let start = memory.as_ptr().addr() as u64;
        check_mapped(start..start + (1 << 20)).unwrap();
        assert_eq!(check_mapped(0..page_bytes).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    }
}
