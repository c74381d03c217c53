//! Writes files of huge pages through a mapping, because they cannot be written otherwise.

use std::io;
use std::sync::atomic::AtomicU8;

use memmap2::{MmapOptions, MmapRaw};

use super::process_memory::write_own;

/// The kernel's magic number for file systems of huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A whole file, mapped so that writes go to the file.
#[derive(Debug)]
pub(crate) struct SharedMap(MmapRaw);

impl SharedMap {
    /// Maps the file if it has huge pages, which no system call writes; other files are written by
    /// system calls.
    pub(crate) fn of_huge_pages(file: &std::fs::File) -> io::Result<Option<SharedMap>> {
        // The type is as wide as the machine's word, and is unsigned on some machines.
        #[allow(clippy::unnecessary_cast, clippy::cast_lossless)]
        let magic = rustix::fs::fstatfs(file)?.f_type as i64;
        if magic != HUGETLBFS_MAGIC || file.metadata()?.len() == 0 {
            return Ok(None);
        }
        MmapOptions::new().map_raw(file).map(|map| Some(SharedMap(map)))
    }

    /// Writes at an offset. Returns an error (`EFAULT`), instead of raising a signal, if the kernel
    /// has no pages left or the file became shorter.
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        // SAFETY: the mapping is valid for `len` bytes as long as `self` lives. Others may write it
        // at the same time, which atomic bytes allow; the bytes are only passed to the kernel,
        // which checks the pages.
        let all = unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<AtomicU8>(), self.0.len()) };
        let start = usize::try_from(offset_bytes).ok().and_then(|at| all.get(at..));
        let target = start.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        write_own(target, bytes)
    }
}
