//! Memory maps.

use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{Advice, Mmap, MmapMut, MmapOptions};

use super::file::File;

/// A pack mapped for reading.
///
/// Touching a page that the disk cannot give, or one past the end of the file, is a fatal signal. So bytes
/// are asked for with [`PackMap::ready`] before they are touched, which gives an error instead.
pub(crate) struct PackMap {
    map: Mmap,
    path: PathBuf,
}

impl Deref for PackMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Set when the kernel turns out to be older than Linux 5.14: then pages are read when they are touched.
static IS_OLD_KERNEL: AtomicBool = AtomicBool::new(false);

impl PackMap {
    /// The pack's file, as it was called when it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Has these bytes read, so that they can be touched; what is past the end of the map is left out.
    ///
    /// Cost: where the pages are in memory already, a third of a microsecond; a whole one for a mebibyte.
    pub(crate) fn ready(&self, bytes: Range<usize>) -> io::Result<()> {
        let end = bytes.end.min(self.map.len());
        if bytes.start >= end || IS_OLD_KERNEL.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.map.advise_range(Advice::PopulateRead, bytes.start, end - bytes.start) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IS_OLD_KERNEL.store(true, Ordering::Relaxed);
                Ok(())
            }
            // All that the kernel says is that an access would be fatal.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                let why = "the disk cannot read it there, or it was cut while it was open";
                Err(io::Error::other(format!("{why} (bytes {} to {end})", bytes.start)))
            }
            other => other,
        }
    }
}

/// Maps the first `length_bytes` of a pack for reading.
///
/// Fails where the file is shorter.
pub(crate) fn map_pack(file: &File, length_bytes: usize) -> io::Result<PackMap> {
    if file.length_bytes()? < length_bytes as u64 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pack is shorter than recorded"));
    }
    // SAFETY: the bytes must not change while they are borrowed. A pack's bytes below
    // `length_bytes` are written once, before its length is published, and the store's LOCK keeps
    // other stillframe processes out. The length was checked above.
    let map = file.map(|file| unsafe { MmapOptions::new().len(length_bytes).map(file) })?;
    Ok(PackMap { map, path: file.path().to_owned() })
}

/// The first `length_bytes` of a file of memory, copy-on-write: what is written is private to the mapping.
/// The file must be sealed against changes (`F_SEAL_WRITE`, `F_SEAL_SHRINK`), or this process's alone.
pub(crate) fn map_copy(file: &std::fs::File, length_bytes: usize) -> io::Result<MmapMut> {
    // SAFETY: the bytes must not change under the mapping, nor the file become shorter: the caller has sealed
    // it. Without a reservation: only what is written takes memory.
    unsafe { MmapOptions::new().len(length_bytes).no_reserve_swap().map_copy(file) }
}

/// A fresh private mapping of zeros, in huge pages where the kernel has them to give.
pub(crate) fn map_zeros(length_bytes: usize) -> io::Result<MmapMut> {
    let map = MmapOptions::new().len(length_bytes).map_anon()?;
    // Advice only: without huge pages the mapping is the same, populated more slowly.
    let _ = map.advise(Advice::HugePage);
    Ok(map)
}
