//! Soft-dirty: the kernel marks the pages that a process writes. A write of 4 to
//! `/proc/PID/clear_refs` clears all marks.
//!
//! Many kernels are built without soft-dirty and then report every page as clean. So it is first
//! tested on a page of this process. There is one set of marks for each process: if another program
//! (CRIU) clears them, changes are lost.
//!
//! A discarded page loses its mark. So absent pages of private anonymous memory count as changed;
//! they are zeros and cost nothing to read. Other processes also write shared memory and files, so
//! all of such a mapping counts as changed.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::ledger::{Finding, Ledger};
use super::{DirtySet, RescanReason, TrackError, TrackMethod, Tracker};
use crate::address_space::{AddressSpace, Mapping};
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::sys::pagemap;

/// The value that clears only the soft-dirty marks.
const CLEAR_SOFT_DIRTY: &[u8] = b"4";

/// The soft-dirty marks of one process.
#[derive(Debug)]
pub(crate) struct SoftDirty {
    pid: u32,
    /// The start time, which distinguishes the process from a later one with the same pid.
    started: String,
    ledger: Mutex<Ledger>,
}

impl SoftDirty {
    /// For the process `pid`.
    pub(crate) fn new(pid: u32) -> Result<SoftDirty, TrackError> {
        static PROBED: OnceLock<bool> = OnceLock::new();
        if !*PROBED.get_or_init(|| probe().unwrap_or(false)) {
            return Err(unavailable(
                "the kernel does not mark what is written (CONFIG_MEM_SOFT_DIRTY)",
                io::ErrorKind::Unsupported.into(),
            ));
        }
        let no_access = |source| unavailable("the files of the process cannot be opened", source);
        let started = started(pid).map_err(no_access)?;
        open(pid, "clear_refs", true).and_then(|_| open(pid, "pagemap", false)).map_err(no_access)?;
        Ok(SoftDirty { pid, started, ledger: Mutex::default() })
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of one mapping that may have changed.
    fn changed(pagemap: &File, mapping: &Mapping) -> io::Result<Ranges> {
        let whole = mapping.range.start()..mapping.range.end();
        if mapping.protection.shared || !mapping.name.is_empty() && !mapping.name.starts_with('[') {
            return Ok(whole.into());
        }
        let absent = pagemap::populated(pagemap, whole.clone())?.complement(whole.clone());
        Ok(absent.union(&pagemap::soft_dirty(pagemap, whole)?))
    }
}

impl Tracker for SoftDirty {
    fn method(&self) -> TrackMethod {
        TrackMethod::SoftDirty
    }

    fn take(&self, space: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
        let took = || -> io::Result<Ranges> {
            // Opened for each take: after an `execve` an open file would still show the old memory,
            // which is empty.
            let pagemap = open(self.pid, "pagemap", false)?;
            if started(self.pid)? != self.started {
                return Err(io::Error::other("another process has its pid now"));
            }
            let mut changed = Vec::new();
            for (_, mapping) in space.captured() {
                changed.extend(Self::changed(&pagemap, mapping)?);
            }
            open(self.pid, "clear_refs", true)?.write_all(CLEAR_SOFT_DIRTY)?;
            Ok(changed.into())
        };
        let (found, error) = match took() {
            Ok(ranges) => (Finding::Bytes(ranges), None),
            Err(error) => (Finding::Anything(RescanReason::Interrupted), Some(error)),
        };
        let (number, changes) = self.ledger().take(found, since);
        if let Some(source) = error {
            return Err(TrackError::System { action: "find what the process wrote", source });
        }
        let changes = changes.map(|ranges| {
            let of = |mapping: &Mapping| ranges.from_start_of(mapping.range.start()..mapping.range.end());
            space.mappings().iter().map(of).collect()
        });
        Ok(DirtySet { number, changes })
    }

    fn committed(&self, number: u64, id: SnapshotId) {
        self.ledger().committed(number, id);
    }

    fn estimate_bytes(&self) -> u64 {
        0
    }
}

fn open(pid: u32, name: &str, write: bool) -> io::Result<File> {
    File::options().read(!write).write(write).open(format!("/proc/{pid}/{name}"))
}

/// When the process started, in the kernel's clock ticks.
fn started(pid: u32) -> io::Result<String> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    // The name stands in brackets and may hold any byte.
    let after_name = stat.rsplit(|byte| *byte == b')').next().unwrap_or_default();
    let start = String::from_utf8_lossy(after_name).split_ascii_whitespace().nth(19).map(str::to_owned);
    start.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn unavailable(why: &str, source: io::Error) -> TrackError {
    TrackError::Unavailable { means: TrackMethod::SoftDirty, why: why.to_owned(), source }
}

/// Tests the marks on a page of this process: a page that is cleared and written must show as
/// dirty, and one that is only cleared must not.
fn probe() -> io::Result<bool> {
    let page_bytes = rustix::param::page_size();
    let mut memory = memmap2::MmapMut::map_anon(2 * page_bytes)?;
    memory.fill(1);
    let start = memory.as_ptr().addr() as u64;
    let pages = start..start + memory.len() as u64;
    let pagemap = File::open("/proc/self/pagemap")?;
    File::options().write(true).open("/proc/self/clear_refs")?.write_all(CLEAR_SOFT_DIRTY)?;
    let clean = pagemap::soft_dirty(&pagemap, pages.clone())?;
    std::hint::black_box(&mut memory)[0] = 2;
    let dirty = pagemap::soft_dirty(&pagemap, pages)?;
    Ok(clean.is_empty() && dirty.len() == 1 && dirty[0] == (start..start + page_bytes as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_agrees_with_what_can_be_opened() {
        // This holds for both kinds of kernels: a tracker exists exactly where the marks work.
        assert_eq!(SoftDirty::new(std::process::id()).is_ok(), probe().unwrap_or(false));
    }
}
