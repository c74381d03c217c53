//! This program's own mappings, populated on demand even in a process that locks all of its memory.
//!
//! After `mlockall(MCL_FUTURE)` the kernel populates a mapping at the moment it is made: a
//! copy-on-write mapping is copied entirely, a buffer takes all memory that it might need, and no
//! page is ever missing for a `userfaultfd`. So a mapping is made in four steps:
//!
//! | step | effect on locked memory (Linux 6.18) |
//! |---|---|
//! | `mmap` without access | counts towards RLIMIT_MEMLOCK; populates nothing |
//! | `mlock2(MLOCK_ONFAULT)`, if it is locked | pages are locked as they are populated |
//! | a `userfaultfd` is registered, if there is one | every page is missing |
//! | `mprotect` with access | would populate locked memory without the steps before |
//!
//! Memory that the user maps and locks is populated as the user asked.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr;

use rustix::mm::{self, Advice, MapFlags, MlockFlags, MprotectFlags, ProtFlags};
use rustix::process::{Resource, getrlimit};

/// A mapping that only this program uses, until it is dropped. It can be read; it can also be
/// written unless it was made by [`Pages::to_read`].
#[derive(Debug)]
pub(crate) struct Pages {
    start: *mut u8,
    length_bytes: usize,
    is_writable: bool,
}

// SAFETY: the pointer is to memory that this owns, whichever thread uses it.
unsafe impl Send for Pages {}
// SAFETY: through a shared reference it can only be read.
unsafe impl Sync for Pages {}

/// What is mapped.
#[derive(Clone, Copy)]
enum Content<'a> {
    Zeros,
    /// The file's bytes; what is written is private.
    Copy(&'a File),
    /// The file's bytes, which cannot be written.
    ToRead(&'a File),
}

impl Pages {
    /// Private zeros, without a reservation: memory that is never accessed needs no free memory.
    pub(crate) fn zeros(length_bytes: usize) -> io::Result<Pages> {
        Self::zeros_with(length_bytes, |_| Ok(())).map(|(pages, ())| pages)
    }

    /// The same. `before` is called with the addresses after they are mapped and before anybody can
    /// access them.
    pub(crate) fn zeros_with<T>(
        length_bytes: usize,
        before: impl FnOnce(Range<u64>) -> io::Result<T>,
    ) -> io::Result<(Pages, T)> {
        Self::map(Content::Zeros, length_bytes, before)
    }

    /// The first `length_bytes` of a memory file, copy-on-write. The file must be sealed against
    /// changes (`F_SEAL_WRITE`, `F_SEAL_SHRINK`), or belong to this process alone.
    pub(crate) fn copy_of(file: &File, length_bytes: usize) -> io::Result<Pages> {
        Self::map(Content::Copy(file), length_bytes, |_| Ok(())).map(|(pages, ())| pages)
    }

    /// The first `length_bytes` of a file, for reading. The caller makes sure that they do not
    /// change.
    pub(crate) fn to_read(file: &File, length_bytes: usize) -> io::Result<Pages> {
        Self::map(Content::ToRead(file), length_bytes, |_| Ok(())).map(|(pages, ())| pages)
    }

    fn map<T>(
        content: Content<'_>,
        length_bytes: usize,
        before: impl FnOnce(Range<u64>) -> io::Result<T>,
    ) -> io::Result<(Pages, T)> {
        let mapped_bytes =
            mapped_bytes(length_bytes).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let (none, start) = (ProtFlags::empty(), ptr::null_mut());
        let private = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let start = match content {
            // SAFETY: a fresh mapping at an address that the kernel chooses disturbs no other
            // memory.
            Content::Zeros => unsafe { mm::mmap_anonymous(start, mapped_bytes, none, private) },
            // SAFETY: as above. The bytes must not change and the file must not become shorter: the
            // caller makes sure of that.
            Content::Copy(file) => unsafe { mm::mmap(start, mapped_bytes, none, private, file, 0) },
            Content::ToRead(file) => {
                // SAFETY: as above.
                match unsafe { mm::mmap(start, mapped_bytes, none, MapFlags::SHARED, file, 0) } {
                    // A file that cannot be mapped shared may still be mapped privately. Nothing is
                    // written through the mapping, so both show the file's bytes.
                    Err(rustix::io::Errno::NODEV | rustix::io::Errno::INVAL) => {
                        // SAFETY: as above.
                        unsafe { mm::mmap(start, mapped_bytes, none, MapFlags::PRIVATE, file, 0) }
                    }
                    other => other,
                }
            }
        };
        let start: *mut u8 = start.map_err(|error| explain(error.into()))?.cast();
        let is_writable = !matches!(content, Content::ToRead(_));
        // From here on, dropping the value unmaps it. No reference to its bytes is made before it
        // is accessible.
        let pages = Pages { start, length_bytes, is_writable };
        lock_when_touched(start, mapped_bytes);
        let address = start.addr() as u64;
        let done = before(address..address + length_bytes as u64)?;
        let access =
            if is_writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        // SAFETY: the mapping has just been made here, and nobody uses it yet.
        unsafe { mm::mprotect(start.cast(), mapped_bytes, access)? };
        Ok((pages, done))
    }

    /// Requests huge pages. Only advice: without them the mapping is the same, but is populated
    /// more slowly.
    pub(crate) fn prefer_huge_pages(&self) {
        let _ = self.advise(Advice::LinuxHugepage, 0..self.length_bytes);
    }

    /// A forked child does not get the mapping.
    pub(crate) fn keep_from_children(&self) -> io::Result<()> {
        self.advise(Advice::LinuxDontFork, 0..self.length_bytes)
    }

    /// Reads the missing pages of these bytes into memory; bytes past the end are ignored. `EFAULT`
    /// where an access would raise a signal.
    pub(crate) fn populate_to_read(&self, bytes: Range<usize>) -> io::Result<()> {
        self.advise(Advice::LinuxPopulateRead, bytes)
    }

    /// Gives advice about the pages of these bytes; the advice changes no byte.
    fn advise(&self, advice: Advice, bytes: Range<usize>) -> io::Result<()> {
        let start = bytes.start - bytes.start % rustix::param::page_size();
        let end = bytes.end.min(self.length_bytes);
        if start >= end {
            return Ok(());
        }
        // SAFETY: the range is inside the mapping, and none of the advice used above changes a byte
        // of it.
        unsafe { mm::madvise(self.start.wrapping_add(start).cast(), end - start, advice) }?;
        Ok(())
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length_bytes` bytes from `start` on are mapped readable until this is dropped,
        // and they are written only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start, self.length_bytes) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        assert!(self.is_writable, "a mapping to be read is not borrowed to be written");
        // SAFETY: `length_bytes` bytes from `start` on are mapped readable and writable until this
        // is dropped, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length_bytes) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // It was mapped with this length.
        let mapped_bytes = mapped_bytes(self.length_bytes).unwrap_or(usize::MAX);
        // SAFETY: this owns the mapping, and no reference to it exists any more.
        let unmapped = unsafe { mm::munmap(self.start.cast(), mapped_bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// How many bytes are mapped for a length, which may be 0.
fn mapped_bytes(length_bytes: usize) -> Option<usize> {
    length_bytes.max(1).checked_next_multiple_of(rustix::param::page_size())
}

/// For memory that is mapped and not yet accessible. If the process locks all that it maps, the
/// pages are locked as they are populated, instead of being populated at once. Returns whether the
/// memory is locked.
pub(super) fn lock_when_touched(start: *mut u8, mapped_bytes: usize) -> bool {
    let is_locked = is_locked(start, mapped_bytes);
    if is_locked {
        // SAFETY: this changes no byte.
        let answer = unsafe { mm::mlock_with(start.cast(), mapped_bytes, MlockFlags::ONFAULT) };
        if let Err(error) = answer {
            // Then it is populated at once.
            tracing::debug!("locked memory cannot be locked page by page: {error}");
        }
    }
    is_locked
}

/// Whether pages that are mapped here are locked.
fn is_locked(start: *mut u8, mapped_bytes: usize) -> bool {
    // The kernel accepts this advice for all memory except memory that cannot be reclaimed.
    // SAFETY: this changes no byte: it only makes the present pages the first candidates for swap.
    let advised = unsafe { mm::madvise(start.cast(), mapped_bytes, Advice::LinuxCold) };
    advised == Err(rustix::io::Errno::INVAL)
}

/// Explains a refused mapping where the error number alone is unclear.
pub(super) fn explain(error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(libc::EAGAIN) {
        return error;
    }
    let allowed = match getrlimit(Resource::Memlock).current {
        Some(bytes) => format!("{bytes} bytes in all"),
        None => "no more".to_owned(),
    };
    io::Error::new(
        io::ErrorKind::OutOfMemory,
        format!(
            "this process locks all memory that it maps (mlockall with MCL_FUTURE), and may lock {allowed} \
             (RLIMIT_MEMLOCK); raise that limit, or lock only what must be (mlock)"
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn each_kind_of_mapping_has_its_bytes_and_no_page_before_it_is_touched() {
        let page_bytes = rustix::param::page_size();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 3 * page_bytes], 0).unwrap();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut seen = None;
        let (mut zeros, ()) = Pages::zeros_with(3 * page_bytes - 5, |addresses| {
            seen = Some(addresses);
            Ok(())
        })
        .unwrap();
        let addresses = zeros.as_ptr().addr() as u64..zeros.as_ptr().addr() as u64 + 3 * page_bytes as u64;
        assert_eq!(seen, Some(addresses.start..addresses.end - 5));
        assert!(!super::super::pagemap::is_anything_there(&pagemap, addresses.clone()).unwrap());
        zeros[page_bytes] = 1;
        assert!(super::super::pagemap::is_anything_there(&pagemap, addresses).unwrap());
        assert_eq!((zeros.len(), zeros[page_bytes], zeros[page_bytes + 1]), (3 * page_bytes - 5, 1, 0));

        let mut copy = Pages::copy_of(&file, 2 * page_bytes).unwrap();
        copy[5] = 8;
        let read = Pages::to_read(&file, 2 * page_bytes).unwrap();
        assert_eq!((copy[5], copy[6], read[5], read.len()), (8, 7, 7, 2 * page_bytes));
        read.populate_to_read(5..usize::MAX).unwrap();
        assert!(Pages::zeros(0).unwrap().is_empty());
        assert!(Pages::zeros(usize::MAX).is_err());
        assert_eq!(
            Pages::zeros_with(1, |_| Err::<(), _>(io::ErrorKind::Other.into())).unwrap_err().kind(),
            io::ErrorKind::Other
        );
    }
}
