//! Memory of this process that other code owns and writes: a WebAssembly linear memory, a mapped
//! guest, an arena.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Access, CopyOut, Frozen, Source, SourceError};
use crate::address_space::AddressSpace;
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::ranges::Ranges;
use crate::sys::{pagemap, process_memory};
use crate::track::{RescanReason, TrackError, Tracker, WriteProtection};
use crate::units::AddressRange;

/// Called to pause the owner of the memory, or to resume it.
type Hook = Box<dyn Fn() + Send + Sync>;

/// Memory of this process, given by its address, that other code may write during a capture.
///
/// The kernel copies the bytes, and no Rust reference to them is made. So no action of the owner
/// makes this unsafe; memory that was unmapped is an error. A snapshot shows *one* moment only if
/// nobody writes while the capture copies: use [`stop_with`](Self::stop_with), or pause the writers
/// around [`Process::start_capture`]. Otherwise each byte is as it was at some time during the
/// capture, and a write is in this snapshot or in the next.
///
/// With [`track_writes`](Self::track_writes) the cost of a further snapshot depends on what was
/// written since the last one.
///
/// [`Process::start_capture`]: crate::Process::start_capture
///
/// ```
/// use stillframe::{CaptureOptions, LiveMemory, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// # let mut arena = memmap2::MmapMut::map_anon(1 << 20)?;
/// let memory = LiveMemory::new(arena.as_ptr(), arena.len()).track_writes_if_possible();
/// store.process("arena").capture(&memory, &CaptureOptions::default())?;
/// arena[5000] = 7;
/// let taken = store.process("arena").capture(&memory, &CaptureOptions::default())?;
/// assert_eq!(taken.changed_regions, 1);
/// println!("{}", taken.tracking);         // write-protection, or why it was a rescan
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LiveMemory {
    address: u64,
    memory_bytes: AtomicU64,
    protection: Result<Arc<WriteProtection>, RescanReason>,
    stop: Option<(Hook, Hook)>,
}

impl LiveMemory {
    /// The `length_bytes` at `start`. Each capture reads all of them.
    pub fn new(start: *const u8, length_bytes: usize) -> LiveMemory {
        LiveMemory {
            address: start.addr() as u64,
            memory_bytes: AtomicU64::new(length_bytes as u64),
            protection: Err(RescanReason::NoTracker),
            stop: None,
        }
    }

    /// Makes the kernel record the written pages by write protection (Linux 6.7 or newer, no
    /// privilege needed). Captures then read only these.
    ///
    /// The memory must be private, without a file, and begin at a page boundary. The tracker
    /// notices when pages are discarded, and when the memory grows or is remapped. It does not
    /// notice what a device writes into pinned pages (`io_uring` registered buffers, `O_DIRECT`,
    /// vfio): finish such transfers before a capture, and do not keep buffers registered.
    ///
    /// Cost: about a microsecond for the first write to each page after a capture. The memory gets
    /// no new huge pages.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unavailable`] with the reason if the kernel does not have it or a sandbox
    /// forbids it; [`TrackError::NotPrivate`], [`TrackError::NotAligned`],
    /// [`TrackError::AlreadyTracked`].
    pub fn track_writes(mut self) -> Result<LiveMemory, TrackError> {
        let address = self.address;
        let end = address.saturating_add(self.memory_bytes.load(Ordering::Relaxed));
        self.protection = Ok(Arc::new(WriteProtection::new(address..end)?));
        Ok(self)
    }

    /// As [`track_writes`](Self::track_writes), if it is possible. If not, everything is read, and
    /// [`CaptureStats::tracking`](crate::CaptureStats::tracking) gives the reason.
    pub fn track_writes_if_possible(mut self) -> LiveMemory {
        let address = self.address;
        let end = address.saturating_add(self.memory_bytes.load(Ordering::Relaxed));
        self.protection = WriteProtection::new(address..end).map(Arc::new).map_err(|error| {
            tracing::info!("{error}");
            RescanReason::Unavailable(error.to_string())
        });
        self
    }

    /// Sets two functions: a capture calls `stop` before it reads the memory, and `go` once it has
    /// copied it. In between the owner must not write. All preparation is done before `stop`.
    pub fn stop_with(
        mut self,
        stop: impl Fn() + Send + Sync + 'static,
        go: impl Fn() + Send + Sync + 'static,
    ) -> LiveMemory {
        self.stop = Some((Box::new(stop), Box::new(go)));
        self
    }

    /// Sets a new length of the memory, after it grew in its reservation. The added bytes count as
    /// changed.
    ///
    /// # Errors
    ///
    /// If the added bytes cannot be tracked. The length then stays unchanged.
    pub fn set_length_bytes(&self, length_bytes: usize) -> Result<(), TrackError> {
        if let Ok(protection) = &self.protection {
            protection.set_memory_bytes(length_bytes as u64)?;
        }
        self.memory_bytes.store(length_bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The address of its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Copies ranges, counted from the start of the memory, into `buffer`, side by side.
    pub(crate) fn copy(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<(), SourceError> {
        let address = |offset_bytes: u64| self.address.saturating_add(offset_bytes);
        let addresses: Vec<_> = ranges.iter().map(|range| address(range.start)..address(range.end)).collect();
        process_memory::copy_own(&addresses, buffer)
            .map_err(|source| SourceError::Memory { address: self.address, source })
    }

    /// Its length, in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.memory_bytes.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for LiveMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveMemory")
            .field("address", &self.address)
            .field("length_bytes", &self.length_bytes())
            .field("protection", &self.protection)
            .finish_non_exhaustive()
    }
}

impl Source for LiveMemory {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        if let Some((stop, _)) = &self.stop {
            stop();
        }
        let stopped = Instant::now();
        if let Ok(protection) = &self.protection {
            // What an earlier take said, which nobody asked for, may not hold any more.
            protection.forget_absent();
        }
        let memory_bytes = self.length_bytes();
        let space = AddressSpace::image("", memory_bytes);
        Ok(Box::new(FrozenMemory { memory: self, memory_bytes, space, stopped, paused: Default::default() }))
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        match &self.protection {
            Ok(protection) => Ok(protection.clone()),
            Err(why) => Err(why.clone()),
        }
    }
}

/// The memory during one capture.
struct FrozenMemory<'a> {
    memory: &'a LiveMemory,
    memory_bytes: u64,
    space: AddressSpace,
    stopped: Instant,
    paused: std::sync::OnceLock<Duration>,
}

impl Frozen for FrozenMemory<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn populated(&self, _mapping_index: usize) -> Result<Ranges, SourceError> {
        // If a page was absent when the tracker scanned, it was zeros then. Reading it would
        // allocate it, and reading a guard fails.
        let whole = 0..self.memory_bytes;
        Ok(match &self.memory.protection {
            Ok(protection) => protection.forget_absent().union(&protection.guards()).complement(whole),
            Err(_) => whole.into(),
        })
    }

    fn left_out(&self) -> Vec<LeftOut> {
        // Without a tracker, guards are found when copying fails.
        let guards = self.memory.protection.as_ref().map(|protection| protection.guards());
        let guards = guards.unwrap_or_default();
        guards.addresses().map(|range| LeftOut { range, why: WhyLeftOut::Guard }).collect()
    }

    fn access(&self) -> Access<'_> {
        Access::SharedUntilRelease(self)
    }

    fn release(&self) -> Duration {
        *self.paused.get_or_init(|| {
            if let Some((_, go)) = &self.memory.stop {
                go();
            }
            self.stopped.elapsed()
        })
    }
}

impl Drop for FrozenMemory<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

impl CopyOut for FrozenMemory<'_> {
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let range = offset_bytes..offset_bytes.saturating_add(buffer.len() as u64);
        self.copy_ranges(mapping_index, &[range], buffer, unreadable)
    }

    fn copy_ranges(
        &self,
        _mapping_index: usize,
        ranges: &[Range<u64>],
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let error = match self.memory.copy(ranges, buffer) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let guards = self.guards_in(ranges);
        if guards.is_empty() {
            return Err(error);
        }
        let mut buffer = buffer;
        for range in ranges {
            let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(length);
            buffer = rest;
            part.fill(0);
            for there in guards.complement(range.clone()) {
                let place = |at: u64| usize::try_from(at - range.start).unwrap_or(usize::MAX);
                self.memory
                    .copy(std::slice::from_ref(&there), &mut part[place(there.start)..place(there.end)])?;
            }
            let guards: Ranges = guards.within(range.clone()).collect();
            unreadable.extend(guards.addresses());
        }
        Ok(())
    }
}

impl FrozenMemory<'_> {
    /// The guards in these ranges, as offsets in the memory.
    fn guards_in(&self, ranges: &[Range<u64>]) -> Ranges {
        let page_bytes = rustix::param::page_size() as u64;
        let start = self.memory.address;
        let Ok(pagemap) = File::open("/proc/self/pagemap") else { return Ranges::new() };
        let mut guards = Vec::new();
        for range in ranges {
            let from = start.saturating_add(range.start) / page_bytes * page_bytes;
            let to = start.saturating_add(range.end).checked_next_multiple_of(page_bytes).unwrap_or(u64::MAX);
            let found = pagemap::guards(&pagemap, from..to).unwrap_or_default().into_iter();
            guards.extend(
                found.map(|guard| {
                    guard.start.saturating_sub(start)..(guard.end - start).min(self.memory_bytes)
                }),
            );
        }
        guards.into()
    }
}
