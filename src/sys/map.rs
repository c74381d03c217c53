//! Memory maps.

use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};

use super::file::File;
use super::pages::{self, Pages};

/// A pack mapped for reading.
///
/// Accessing a page that the disk cannot deliver, or a page past the end of the file, raises a
/// fatal signal. So callers request bytes with [`PackMap::ready`] before they access them; it
/// returns an error instead.
pub(crate) struct PackMap {
    map: Pages,
    path: PathBuf,
    ready: Ready,
}

impl Deref for PackMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Set when the kernel proves to be older than Linux 5.14. Then pages are read at their first
/// access.
static IS_OLD_KERNEL: AtomicBool = AtomicBool::new(false);

impl PackMap {
    /// The path under which the pack's file was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads these bytes into memory, so that they can be accessed. Bytes past the end of the map
    /// are ignored.
    ///
    /// Cost (AMD EPYC, 2 cores): a third of a microsecond where the pages are in memory already, a
    /// microsecond for 64 KiB.
    pub(crate) fn ready(&self, bytes: Range<usize>) -> io::Result<()> {
        let bytes = bytes.start..bytes.end.min(self.map.len());
        if bytes.is_empty() || IS_OLD_KERNEL.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.populate(bytes)
    }

    /// Like [`PackMap::ready`], for sequential readers that began at `since`. It also populates the
    /// pages around these bytes, and reads ahead. Pages that any reader populated after `since`,
    /// and less than a second ago, are assumed to be resident. (If such a page is evicted or cut
    /// off within that second and the disk cannot deliver it, the access raises the signal after
    /// all.)
    ///
    /// Cost: a few nanoseconds where the bytes are ready.
    pub(crate) fn ready_since(&self, bytes: Range<usize>, since: Since) -> io::Result<()> {
        let bytes = bytes.start..bytes.end.min(self.map.len());
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(blocks) = self.ready.lacks(&bytes, since) else { return Ok(()) };
        match self.ready(blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES) {
            Ok(()) => {
                self.ready.note(blocks);
                Ok(())
            }
            // If the surrounding bytes cannot all be read, perhaps the bytes needed now can.
            Err(_) => self.ready(bytes),
        }
    }

    fn populate(&self, bytes: Range<usize>) -> io::Result<()> {
        let (start, end) = (bytes.start, bytes.end);
        match self.map.populate_to_read(bytes) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IS_OLD_KERNEL.store(true, Ordering::Relaxed);
                Ok(())
            }
            // The kernel reports only that an access would be fatal.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                let why = "the disk cannot read it there, or it was cut while it was open";
                Err(io::Error::other(format!("{why} (bytes {start} to {end})")))
            }
            other => other,
        }
    }
}

/// The least number of bytes that is populated at a time. Objects read in random order still lie
/// close to each other, and one system call for each took a fifth of the time of a restore.
const BLOCK_BYTES: usize = 64 << 10;
/// A sequential reader reads ahead as many blocks as are already ready, up to this number.
const MAX_AHEAD_BLOCKS: usize = (1 << 20) / BLOCK_BYTES;
/// How long a populated page is assumed to be resident.
const READY_SECONDS: i64 = 1;

/// A moment; a later moment compares greater.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since(u64);

impl Since {
    pub(crate) fn now() -> Since {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Since(COUNT.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// The parts of a map that were populated recently.
struct Ready {
    /// One bit for each block.
    blocks: Box<[AtomicU64]>,
    /// The bits count from here: since the last reader began, and for one second at most. The clock
    /// is monotonic.
    since: AtomicU64,
    second: AtomicI64,
}

impl Ready {
    fn new(length_bytes: usize) -> Ready {
        let words = length_bytes.div_ceil(BLOCK_BYTES).div_ceil(64);
        Ready {
            blocks: std::iter::repeat_with(AtomicU64::default).take(words).collect(),
            since: AtomicU64::new(0),
            second: AtomicI64::new(0),
        }
    }

    /// The blocks to populate so that these bytes are ready, read-ahead included; `None` if they
    /// are ready.
    fn lacks(&self, bytes: &Range<usize>, since: Since) -> Option<Range<usize>> {
        self.forget_what_is_old(since);
        let (first, end) = (bytes.start / BLOCK_BYTES, bytes.end.div_ceil(BLOCK_BYTES));
        let start = (first..end).find(|block| !self.has(*block))?;
        let before =
            (1..=MAX_AHEAD_BLOCKS).take_while(|back| *back <= start && self.has(start - back)).count();
        let ahead = (end..end + before).take_while(|block| !self.has(*block)).count();
        Some(start..end + ahead)
    }

    fn has(&self, block: usize) -> bool {
        self.blocks
            .get(block / 64)
            .is_some_and(|bits| bits.load(Ordering::Relaxed) & (1 << (block % 64)) != 0)
    }

    fn note(&self, blocks: Range<usize>) {
        for block in blocks {
            if let Some(bits) = self.blocks.get(block / 64) {
                bits.fetch_or(1 << (block % 64), Ordering::Relaxed);
            }
        }
    }

    fn forget_what_is_old(&self, since: Since) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse).tv_sec;
        let second = self.second.load(Ordering::Relaxed);
        if now - second > READY_SECONDS || self.since.load(Ordering::Relaxed) < since.0 {
            // This comes before the bits are set: a bit that another reader sets meanwhile may be
            // lost, and then its block is requested again.
            self.since.fetch_max(since.0, Ordering::Relaxed);
            self.second.store(now, Ordering::Relaxed);
            self.blocks.iter().for_each(|bits| bits.store(0, Ordering::Relaxed));
        }
    }
}

/// Maps the first `length_bytes` of a pack for reading.
///
/// Fails if the file is shorter.
pub(crate) fn map_pack(file: &File, length_bytes: usize) -> io::Result<PackMap> {
    if file.length_bytes()? < length_bytes as u64 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the pack is shorter than recorded"));
    }
    // The bytes must not change while they are borrowed. A pack's bytes below `length_bytes` are
    // written once, before the length is published, and the store's LOCK keeps other stillframe
    // processes out. The length was checked above.
    let map = file.map(|file| Pages::to_read(file, length_bytes))?;
    Ok(PackMap { ready: Ready::new(map.len()), map, path: file.path().to_owned() })
}

/// A fresh private mapping of zeros, in huge pages if the kernel has any free.
pub(crate) fn map_zeros(length_bytes: usize) -> io::Result<MmapMut> {
    let map = MmapOptions::new().len(length_bytes).map_anon().map_err(pages::explain)?;
    // Only advice: without huge pages the mapping is the same, but is populated more slowly.
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_on_finds_ever_more_ready_and_who_jumps_what_lies_around() {
        let block = |number: usize| number * BLOCK_BYTES + 7..number * BLOCK_BYTES + 9;
        let since = Since::now();
        let ready = Ready::new(100 * BLOCK_BYTES);
        let mut asked = Vec::new();
        for number in (0..50).chain([80, 79]) {
            if let Some(blocks) = ready.lacks(&block(number), since) {
                ready.note(blocks.clone());
                asked.push(blocks);
            }
            assert_eq!(ready.lacks(&block(number), since), None);
        }
        // The last one ends at the end of the map.
        assert_eq!(asked, [0..1, 1..3, 3..7, 7..15, 15..31, 31..48, 48..65, 80..81, 79..80]);
        assert_eq!(ready.lacks(&(64 * BLOCK_BYTES..68 * BLOCK_BYTES), since), Some(65..79));
    }

    #[test]
    fn what_was_ready_long_ago_or_before_is_asked_for_again() {
        let ready = Ready::new(10 * BLOCK_BYTES);
        let (since, later) = (Since::now(), Since::now());
        assert_eq!(ready.lacks(&(0..1), since), Some(0..1));
        ready.note(0..1);
        assert_eq!(ready.lacks(&(0..1), since), None);
        ready.second.fetch_sub(READY_SECONDS + 1, Ordering::Relaxed);
        assert_eq!(ready.lacks(&(0..1), since), Some(0..1));
        ready.note(0..1);
        assert_eq!(ready.lacks(&(0..1), later), Some(0..1));
        ready.note(0..1);
        assert_eq!(ready.lacks(&(0..1), since), None, "who began earlier may know it too");
    }
}
