//! Files that are written through a mapping, as they cannot be written otherwise: those of huge pages.

use std::io;
use std::sync::atomic::AtomicU8;

use memmap2::{MmapOptions, MmapRaw};

use super::process_memory::write_own;

/// The kernel's number for files of huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// All of a file, mapped so that what is written is the file's.
#[derive(Debug)]
pub(crate) struct SharedMap(MmapRaw);

impl SharedMap {
    /// Maps the file if it has huge pages, which no system call writes; other files are written as files.
    pub(crate) fn of_huge_pages(file: &std::fs::File) -> io::Result<Option<SharedMap>> {
        // As wide as the machine's words, and unsigned on some.
        #[allow(clippy::unnecessary_cast, clippy::cast_lossless)]
        let magic = rustix::fs::fstatfs(file)?.f_type as i64;
        if magic != HUGETLBFS_MAGIC || file.metadata()?.len() == 0 {
            return Ok(None);
        }
        MmapOptions::new().map_raw(file).map(|map| Some(SharedMap(map)))
    }

    /// Writes at an offset. An error (`EFAULT`), and no signal, where the kernel has no pages left, or the file became
    /// shorter.
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        // SAFETY: the mapping is valid for `len` bytes as long as `self` lives. Others may write it at the same time,
        // which bytes that are atomic allow; they are only handed to the kernel, which checks the pages.
        let all = unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast::<AtomicU8>(), self.0.len()) };
        let start = usize::try_from(offset_bytes).ok().and_then(|at| all.get(at..));
        let target = start.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        write_own(target, bytes)
    }
}
