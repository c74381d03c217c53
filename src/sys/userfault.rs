//! `userfaultfd`, and asynchronous write protection by it. (What is filled on first touch is in `missing.rs`.)
//!
//! Write protection: the kernel notes a first write to a page and lets
//! it go on at once; nobody has to answer. What was written is asked by `PAGEMAP_SCAN`
//! (`pagemap.rs`).
//!
//! Only faults of user mode are asked for (`UFFD_USER_MODE_ONLY`), which needs no privilege, whatever
//! `vm.unprivileged_userfaultfd` says. The kernel's own writes (a `read` into a protected page) are
//! noted all the same, because in this mode no fault is ever handed to user mode.

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
    /// (before Linux 6.7), `ENOSYS` where it has no `userfaultfd`, `EPERM` where a sandbox forbids it.
    pub(crate) fn new() -> io::Result<Userfault> {
        let descriptor = open(Faults::OfUserMode)?;
        agree(&descriptor, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED)?;
        Ok(Userfault { descriptor })
    }

    /// Registers whole pages at these addresses. Registering them again does nothing. `EBUSY` where
    /// another `userfaultfd` has some of them.
    pub(crate) fn register(&self, range: Range<u64>) -> io::Result<()> {
        register_mode(&self.descriptor, range, REGISTER_MODE_WP)
    }

    /// Takes the registration and all protection away. To be called although dropping does the same: a child
    /// that was forked meanwhile holds the descriptor too.
    pub(crate) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        unregister(&self.descriptor, range)
    }
}

/// Whose faults a descriptor is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Faults {
    /// Also those of the kernel, as in a `read` into the memory. Needs a privilege (`CAP_SYS_PTRACE`), or
    /// that `vm.unprivileged_userfaultfd` is 1; else `EPERM`.
    All,
    /// Only those of programs.
    OfUserMode,
}

/// A descriptor with which nothing is registered. `ENOSYS` where the kernel has no `userfaultfd`, `EPERM`
/// where a sandbox forbids it.
pub(super) fn open(faults: Faults) -> io::Result<OwnedFd> {
    let user_mode_only = if faults == Faults::OfUserMode { USER_MODE_ONLY } else { 0 };
    let flags = OFlags::CLOEXEC.bits() | OFlags::NONBLOCK.bits() | user_mode_only;
    // SAFETY: the call takes flags only.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let descriptor = i32::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0);
    let descriptor = descriptor.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Agrees on the interface and on these features; `EINVAL` where the kernel lacks one.
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

/// Takes the registration of these pages away, and wakes who waits for them.
pub(super) fn unregister(descriptor: &OwnedFd, range: Range<u64>) -> io::Result<()> {
    let mut argument = [range.start, range.end - range.start];
    // SAFETY: the ioctl reads one `uffdio_range`, which is two 64-bit numbers: start and length.
    let answer = unsafe { libc::ioctl(descriptor.as_raw_fd(), UNREGISTER as _, argument.as_mut_ptr()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An error (`ENOMEM`) unless something is mapped at each of these addresses, which begin at a page.
/// Cost: a look at each mapping.
pub(crate) fn check_mapped(range: Range<u64>) -> io::Result<()> {
    let overflow = || io::Error::from_raw_os_error(libc::ENOMEM);
    let start = usize::try_from(range.start).map_err(|_| overflow())?;
    let length_bytes = usize::try_from(range.end - range.start).map_err(|_| overflow())?;
    // SAFETY: with MS_ASYNC the call has looked at the mappings and done nothing else since Linux
    // 2.6.19; it takes any address.
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
