//! The holes of sparse files. Holes are zeros and need not be read.

use std::fs::File;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::ranges::Ranges;

/// The parts of `within`, in bytes from the file's start, for which the file system stores data.
/// Ranges behind the end of the file are not returned.
///
/// # Errors
///
/// If the file system does not report holes.
pub(super) fn data_ranges(file: &File, within: Range<u64>) -> Result<Ranges, Errno> {
    let mut ranges = Ranges::new();
    let mut at = within.start;
    while at < within.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < within.end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(within.end),
            // The file was truncated before `start` meanwhile.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        if end <= start {
            // A hole may have been punched meanwhile; this loop must terminate.
            return Err(Errno::INVAL);
        }
        ranges.insert(start..end);
        at = end;
    }
    Ok(ranges)
}

/// The parts of a file in memory that are not holes. `None` for other files: they may have been
/// written through a mapping where the disk still has a hole.
pub(crate) fn data_in_memory_file(file: &File, length_bytes: u64) -> Option<Ranges> {
    /// The kernel's number for files in memory: shared memory, memfd, /dev/shm.
    const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
    let is_in_memory = rustix::fs::fstatfs(file).is_ok_and(|it| it.f_type == TMPFS_MAGIC);
    is_in_memory.then(|| data_ranges(file, 0..length_bytes).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_is_found_inside_the_range_asked_for() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[1; 1 << 20], 1 << 20).unwrap();
        file.write_all_at(&[1; 1 << 20], 4 << 20).unwrap();
        let mib = |range: Range<u64>| range.start << 20..range.end << 20;
        assert_eq!(data_ranges(&file, mib(0..8)).unwrap(), [mib(1..2), mib(4..5)]);
        assert_eq!(
            data_ranges(&file, (1 << 20) + 4096..(4 << 20) + 1).unwrap(),
            [(1 << 20) + 4096..2 << 20, 4 << 20..(4 << 20) + 1]
        );
        assert_eq!(data_ranges(&file, mib(5..9)).unwrap(), []);
        assert_eq!(data_ranges(&file, mib(20..30)).unwrap(), []);
    }
}
