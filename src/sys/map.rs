//! Memory maps.

use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use memmap2::{Advice, Mmap, MmapMut, MmapOptions};

use super::file::File;

/// A pack mapped for reading.
///
/// Touching a page that the disk cannot give, or one past the end of the file, is a fatal signal. So bytes
/// are asked for with [`PackMap::ready`] before they are touched, which gives an error instead.
pub(crate) struct PackMap {
    map: Mmap,
    path: PathBuf,
    ready: Ready,
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
    /// Cost: where the pages are in memory already, a third of a microsecond; a microsecond for 64 KiB.
    pub(crate) fn ready(&self, bytes: Range<usize>) -> io::Result<()> {
        let bytes = bytes.start..bytes.end.min(self.map.len());
        if bytes.is_empty() || IS_OLD_KERNEL.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.populate(bytes)
    }

    /// The same for who reads many objects from `since` on. What lies around these bytes is made ready with them, and
    /// more ahead of who reads on; and what was made ready since then, by whomever, is taken to be so for a
    /// second. (Should it be taken back or cut off within that, and the disk not give it again, it is the signal
    /// after all.)
    ///
    /// Cost: a few nanoseconds where it is ready.
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
            // Where not all that lies around can be read, perhaps what is needed now can.
            Err(_) => self.ready(bytes),
        }
    }

    fn populate(&self, bytes: Range<usize>) -> io::Result<()> {
        match self.map.advise_range(Advice::PopulateRead, bytes.start, bytes.len()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IS_OLD_KERNEL.store(true, Ordering::Relaxed);
                Ok(())
            }
            // All that the kernel says is that an access would be fatal.
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                let why = "the disk cannot read it there, or it was cut while it was open";
                Err(io::Error::other(format!("{why} (bytes {} to {})", bytes.start, bytes.end)))
            }
            other => other,
        }
    }
}

/// What is made ready at once at least. Objects that are read in no order lie near one another all the same, and
/// a system call for each took a fifth of a restore.
const BLOCK_BYTES: usize = 64 << 10;
/// Ahead of who reads on as many blocks are made ready as are already, up to this.
const MAX_AHEAD_BLOCKS: usize = (1 << 20) / BLOCK_BYTES;
/// How long what was made ready is taken to be so.
const READY_SECONDS: i64 = 1;

/// A moment; the later one is greater.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since(u64);

impl Since {
    pub(crate) fn now() -> Since {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Since(COUNT.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// What of a map was made ready to be touched lately.
struct Ready {
    /// A bit for each block.
    blocks: Box<[AtomicU64]>,
    /// Since when the bits tell: since the last reader began, and for a second at most, of a clock that never
    /// goes back.
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

    /// The blocks that must be made ready, or are worth it, for these bytes to be; none if they are.
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
            // Before the bits: what is made ready by others meanwhile may be forgotten, and is asked for again.
            self.since.fetch_max(since.0, Ordering::Relaxed);
            self.second.store(now, Ordering::Relaxed);
            self.blocks.iter().for_each(|bits| bits.store(0, Ordering::Relaxed));
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
    let map = file.map(|file| match unsafe { MmapOptions::new().len(length_bytes).map(file) } {
        // SAFETY: the same. Where a file cannot be mapped together with others it may still be mapped for oneself, and
        // what is never written through the mapping is the file's either way.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => unsafe {
            MmapOptions::new().len(length_bytes).map_copy_read_only(file)
        },
        other => other,
    })?;
    Ok(PackMap { ready: Ready::new(map.len()), map, path: file.path().to_owned() })
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
        // The last one goes no further than to what is there.
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
