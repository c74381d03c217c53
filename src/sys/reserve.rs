//! Addresses reserved for one memory, which can grow, shrink and be replaced in place.
//!
//! ```text
//! | guard | length: readable, writable | up to the capacity | guard |
//!         ^ start                      not accessible ─────────────
//! ```
//!
//! Only this file makes references to these bytes, and only while it has the addresses by `&mut`.
//! Other code that uses the returned pointer does so in its own unsafe code. That code must not
//! access the bytes while a method runs, and must not keep a reference across a method call.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr;

use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};

use super::missing::Missing;
use super::pages::{explain, lock_when_touched};

/// Addresses of this process, reserved until this is dropped.
#[derive(Debug)]
pub(crate) struct Addresses {
    /// The start of the first guard.
    mapped: *mut u8,
    mapped_bytes: usize,
    guard_bytes: usize,
    capacity_bytes: usize,
    length_bytes: usize,
}

// SAFETY: the pointer is to memory that these addresses own, whichever thread uses them.
unsafe impl Send for Addresses {}
// SAFETY: a shared reference allows no change and gives no access to the bytes.
unsafe impl Sync for Addresses {}

impl Addresses {
    /// Reserves `capacity_bytes` with guards before and after, all of it inaccessible. All sizes
    /// are rounded up to whole pages. `ENOMEM` if the address space is too small.
    pub(crate) fn new(capacity_bytes: usize, guard_bytes: usize) -> io::Result<Addresses> {
        let too_many = || io::Error::from_raw_os_error(libc::ENOMEM);
        let pages = |bytes: usize| bytes.checked_next_multiple_of(rustix::param::page_size());
        let (capacity_bytes, guard_bytes) =
            pages(capacity_bytes.max(1)).zip(pages(guard_bytes)).ok_or_else(too_many)?;
        let mapped_bytes = guard_bytes
            .checked_mul(2)
            .and_then(|guards| guards.checked_add(capacity_bytes))
            .ok_or_else(too_many)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address that the kernel chooses disturbs no other memory.
        let mapped = unsafe { mm::mmap_anonymous(ptr::null_mut(), mapped_bytes, ProtFlags::empty(), flags) };
        let mapped = mapped.map_err(|error| explain(error.into()))?;
        Ok(Addresses { mapped: mapped.cast(), mapped_bytes, guard_bytes, capacity_bytes, length_bytes: 0 })
    }

    /// The start of the memory; it does not depend on the length.
    pub(crate) fn start(&self) -> *mut u8 {
        self.mapped.wrapping_add(self.guard_bytes)
    }

    pub(crate) fn length_bytes(&self) -> usize {
        self.length_bytes
    }

    pub(crate) fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }

    /// Extends the memory with zeros, or truncates it and discards the rest. `ENOMEM` beyond the
    /// capacity.
    pub(crate) fn set_length_bytes(&mut self, length_bytes: usize) -> io::Result<()> {
        let page_bytes = rustix::param::page_size();
        let before = self.length_bytes.next_multiple_of(page_bytes);
        let after = length_bytes.checked_next_multiple_of(page_bytes).unwrap_or(usize::MAX);
        if after > before {
            self.map_fresh(before..after, ProtFlags::READ | ProtFlags::WRITE)?;
        } else if after < before {
            self.map_fresh(after..before, ProtFlags::empty())?;
        }
        // The rest of its last page, so that growing yields zeros.
        let rest_bytes = self.length_bytes.min(after);
        self.length_bytes = rest_bytes;
        self.bytes_mut().get_mut(length_bytes..).unwrap_or_default().fill(0);
        self.length_bytes = length_bytes;
        Ok(())
    }

    /// Clears the bytes after the end in the last page, so that growing yields zeros.
    pub(crate) fn clear_behind(&mut self) {
        let length_bytes = self.length_bytes;
        self.length_bytes = length_bytes.next_multiple_of(rustix::param::page_size());
        let behind = self.bytes_mut().get_mut(length_bytes..).unwrap_or_default();
        if behind.iter().any(|byte| *byte != 0) {
            behind.fill(0);
        }
        self.length_bytes = length_bytes;
    }

    /// Sets all bytes to zero.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        let pages = 0..self.length_bytes.next_multiple_of(rustix::param::page_size());
        self.map_fresh(pages, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Replaces the content by the first `length_bytes` of a memory file, copy-on-write. The file
    /// must be sealed against changes (`F_SEAL_WRITE`, `F_SEAL_SHRINK`).
    pub(crate) fn map_copy(&mut self, file: &File, length_bytes: usize) -> io::Result<()> {
        let (pages, before) = (self.pages(length_bytes)?, self.pages(self.length_bytes)?);
        if pages.is_empty() {
            return self.set_length_bytes(0);
        }
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let none = ProtFlags::empty();
        // SAFETY: the replaced pages lie inside these addresses (checked), and no reference to them
        // exists: see the head of this file. The file's bytes do not change, because the caller has
        // sealed it.
        let mapped = unsafe { mm::mmap(self.start().cast(), pages.len(), none, flags, file, 0) };
        mapped.map_err(|error| explain(error.into()))?;
        // In case a step below fails.
        self.length_bytes = 0;
        if pages.end < before.end {
            self.map_fresh(pages.end..before.end, ProtFlags::empty())?;
        }
        self.open_up(pages, length_bytes, || Ok(()))
    }

    /// Replaces the content by `length_bytes` bytes, all of which are missing. If that fails, the
    /// length is 0 or unchanged.
    pub(crate) fn map_missing(&mut self, missing: Missing, length_bytes: usize) -> io::Result<Missing> {
        let pages = self.pages(length_bytes)?;
        let before = self.pages(self.length_bytes)?;
        self.map_fresh(0..pages.end.max(before.end), ProtFlags::empty())?;
        let start = self.start().addr() as u64;
        let missing = self.open_up(pages, length_bytes, || missing.register(start, length_bytes as u64))?;
        let kept = self.keep_from_children().and_then(|()| missing.check_nothing_is_there());
        kept.map(|()| missing)
    }

    /// The pages of this many bytes; `ENOMEM` beyond the capacity.
    fn pages(&self, length_bytes: usize) -> io::Result<Range<usize>> {
        match length_bytes.checked_next_multiple_of(rustix::param::page_size()) {
            Some(end) if end <= self.capacity_bytes => Ok(0..end),
            _ => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }

    /// Makes these first pages, which are mapped without access, the memory. `before` is called
    /// before anybody can access them.
    fn open_up<T>(
        &mut self,
        pages: Range<usize>,
        length_bytes: usize,
        before: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        // In case a step below fails.
        self.length_bytes = 0;
        lock_when_touched(self.start(), pages.len());
        let done = before()?;
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: the pages are inside these addresses, and this changes no byte.
        unsafe { mm::mprotect(self.start().cast(), pages.len(), access)? };
        self.length_bytes = length_bytes;
        Ok(done)
    }

    /// Requests huge pages, for a memory that is about to be written entirely.
    pub(crate) fn prefer_huge_pages(&mut self) {
        let length_bytes = self.length_bytes.next_multiple_of(rustix::param::page_size());
        // SAFETY: this changes no byte. Only advice: without huge pages the memory is the same, but
        // is populated more slowly.
        let _ = unsafe { mm::madvise(self.start().cast(), length_bytes, Advice::LinuxHugepage) };
    }

    /// A forked child does not get the memory as it is mapped now.
    fn keep_from_children(&mut self) -> io::Result<()> {
        if self.length_bytes == 0 {
            return Ok(());
        }
        let length_bytes = self.length_bytes.next_multiple_of(rustix::param::page_size());
        // SAFETY: this changes nothing for this process.
        unsafe { mm::madvise(self.start().cast(), length_bytes, Advice::LinuxDontFork)? };
        Ok(())
    }

    /// The bytes.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `length_bytes` bytes from the start on are mapped readable and writable until
        // `self`, which is borrowed, is changed or dropped. Nobody else uses them meanwhile: see
        // the head of this file.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.length_bytes) }
    }

    /// Replaces whole pages of the memory by fresh zeros.
    fn map_fresh(&mut self, pages: Range<usize>, protection: ProtFlags) -> io::Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        if pages.end > self.capacity_bytes {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let start = self.start().wrapping_add(pages.start);
        // SAFETY: the replaced pages lie inside these addresses (checked), and no reference to them
        // exists: see the head of this file.
        let mapped = unsafe { mm::mmap_anonymous(start.cast(), pages.len(), protection, flags) };
        mapped.map_err(|error| explain(error.into()))?;
        Ok(())
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        // SAFETY: this owns the addresses, and no reference to them exists: see the head of this
        // file.
        let unmapped = unsafe { mm::munmap(self.mapped.cast(), self.mapped_bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process_memory;

    #[test]
    fn what_it_grows_by_is_zeros_also_after_it_was_shorter() {
        let page_bytes = rustix::param::page_size();
        let mut addresses = Addresses::new(8 * page_bytes, page_bytes).unwrap();
        let start = addresses.start();
        addresses.set_length_bytes(3 * page_bytes).unwrap();
        addresses.bytes_mut().fill(7);
        addresses.set_length_bytes(page_bytes).unwrap();
        addresses.set_length_bytes(4 * page_bytes).unwrap();
        assert_eq!(addresses.start(), start);
        assert!(addresses.bytes_mut()[..page_bytes].iter().all(|byte| *byte == 7));
        assert!(addresses.bytes_mut()[page_bytes..].iter().all(|byte| *byte == 0));
        addresses.set_length_bytes(page_bytes - 5).unwrap();
        addresses.set_length_bytes(4 * page_bytes).unwrap();
        assert_eq!(addresses.bytes_mut()[page_bytes - 6..page_bytes], [7, 0, 0, 0, 0, 0]);
        assert!(addresses.set_length_bytes(9 * page_bytes).is_err());
        assert_eq!(addresses.length_bytes(), 4 * page_bytes);
    }

    #[test]
    fn nothing_before_it_and_nothing_behind_it_can_be_touched() {
        let page_bytes = rustix::param::page_size();
        let mut addresses = Addresses::new(4 * page_bytes, page_bytes).unwrap();
        addresses.set_length_bytes(page_bytes).unwrap();
        let start = addresses.start().addr() as u64;
        let can_be_read =
            |at: u64| process_memory::copy_own(std::slice::from_ref(&(at..at + 1)), &mut [0]).is_ok();
        assert!(can_be_read(start) && can_be_read(start + page_bytes as u64 - 1));
        for outside in [start - 1, start + page_bytes as u64, start + 4 * page_bytes as u64] {
            assert!(!can_be_read(outside), "{outside:#x} of {start:#x}");
        }
    }
}
