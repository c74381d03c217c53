//! Memory maps.

use std::io;

use memmap2::{Advice, Mmap, MmapMut, MmapOptions};

use super::file::File;

/// Maps the first `length_bytes` of a pack for reading.
///
/// Fails where the file is shorter: touching a page past the end of a file is a fatal signal.
pub(crate) fn map_pack(file: &File, length_bytes: usize) -> io::Result<Mmap> {
    if file.length_bytes()? < length_bytes as u64 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pack is shorter than recorded"));
    }
    // SAFETY: the bytes must not change while they are borrowed. A pack's bytes below
    // `length_bytes` are written once, before its length is published, and the store's LOCK keeps
    // other stillframe processes out. The length was checked above.
    file.map(|file| unsafe { MmapOptions::new().len(length_bytes).map(file) })
}

/// A fresh private mapping of zeros, in huge pages where the kernel has them to give.
pub(crate) fn map_zeros(length_bytes: usize) -> io::Result<MmapMut> {
    let map = MmapOptions::new().len(length_bytes).map_anon()?;
    // Advice only: without huge pages the mapping is the same, populated more slowly.
    let _ = map.advise(Advice::HugePage);
    Ok(map)
}
