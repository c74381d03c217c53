//! Write protection: the kernel records which pages of this process's memory are written.
//!
//! The memory is registered with a userfaultfd in asynchronous mode. Each take is one scan of the
//! page tables. In one step the scan finds the pages that were written since the last scan and
//! protects them again. So no write is missed: this take or the next one finds it. For this reason
//! bytes are copied after the take, never before.
//!
//! | what happens to a page | what the scan reports |
//! |---|---|
//! | written, by the program or by the kernel for it | written; a huge page is split first, so 4 KiB |
//! | swapped out and in again | protected or written as before: the kernel keeps the state |
//! | discarded (MADV_DONTNEED), moved away (mremap) | absent, which counts as changed |
//! | a guard (MADV_GUARD_INSTALL) | a guard, at every take: counts as changed, is not accessed |
//! | never present, protected | the kernel puts a marker in its place; the first write is reported |
//! | unmapped and mapped again | the new mapping is not registered: `EPERM`, and everything is read |
//! | unmapped | nothing at all, so the mappings are checked as well |
//! | copied by `fork` | the parent's page is still tracked; the child's is not |
//!
//! Cost, measured on 4 GiB: a scan takes 3 ms if nothing was written and 4.4 ms if 1 % of the pages
//! were written. The first write to a protected page takes about a microsecond longer. Protected
//! memory gets no new huge pages. One thread scans: with two threads, each waited for the other
//! whenever it protected pages (5 to 30 ms), because they share the address space.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ledger::{Finding, Ledger};
use super::{DirtySet, RescanReason, TrackError, TrackMethod, Tracker, check_one_memory};
use crate::address_space::AddressSpace;
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::sys::pagemap;
use crate::sys::userfault::{self, Userfault};
use crate::units::AddressRange;

/// The write protection of one memory of this process.
#[derive(Debug)]
pub(crate) struct WriteProtection {
    userfault: Userfault,
    pagemap: File,
    made_by: u32,
    start: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    memory_bytes: u64,
    /// What the last take found absent, from the memory's start, until it is asked for.
    absent: Ranges,
    /// The guards that the last take found, from the memory's start.
    guards: Ranges,
}

impl WriteProtection {
    /// For the memory of this process at these addresses. It may be empty yet.
    pub(crate) fn new(addresses: Range<u64>) -> Result<WriteProtection, TrackError> {
        let page_bytes = rustix::param::page_size() as u64;
        let start = addresses.start;
        if !start.is_multiple_of(page_bytes) {
            return Err(TrackError::NotAligned { address: start, page_bytes });
        }
        let userfault = Userfault::new().map_err(unavailable)?;
        let pagemap = File::open("/proc/self/pagemap").map_err(unavailable)?;
        // Kernels before 6.7 report here that they do not have this scan.
        pagemap::count_written(&pagemap, start..start + page_bytes).map_err(unavailable)?;
        let state = State {
            ledger: Ledger::default(),
            memory_bytes: 0,
            absent: Ranges::new(),
            guards: Ranges::new(),
        };
        let protection = WriteProtection {
            userfault,
            pagemap,
            made_by: std::process::id(),
            start,
            state: Mutex::new(state),
        };
        protection.set_memory_bytes(addresses.end - addresses.start)?;
        Ok(protection)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a new length of the memory. The added bytes count as changed.
    pub(crate) fn set_memory_bytes(&self, memory_bytes: u64) -> Result<(), TrackError> {
        let mut state = self.state();
        if memory_bytes > state.memory_bytes {
            self.register(self.pages(memory_bytes))?;
        } else {
            self.unregister(self.pages(memory_bytes).end..self.pages(state.memory_bytes).end);
        }
        state.memory_bytes = memory_bytes;
        Ok(())
    }

    /// What the last take found absent: zeros since then, unless it was written later. Answers
    /// once.
    pub(crate) fn forget_absent(&self) -> Ranges {
        std::mem::take(&mut self.state().absent)
    }

    /// The guards that the last take found (`MADV_GUARD_INSTALL`), which must not be touched.
    pub(crate) fn guards(&self) -> Ranges {
        self.state().guards.clone()
    }

    /// The pages that contain the first `memory_bytes` of the memory.
    fn pages(&self, memory_bytes: u64) -> Range<u64> {
        let length_bytes = memory_bytes.next_multiple_of(rustix::param::page_size() as u64);
        self.start..self.start.saturating_add(length_bytes)
    }

    fn register(&self, pages: Range<u64>) -> Result<(), TrackError> {
        let Ok(range) = AddressRange::new(pages.start, pages.end) else { return Ok(()) };
        check_private(range)?;
        self.userfault.register(pages).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TrackError::AlreadyTracked { range },
            _ => TrackError::System { action: "write-protect the memory", source },
        })
    }

    fn unregister(&self, pages: Range<u64>) {
        if !pages.is_empty()
            && self.made_by == std::process::id()
            && let Err(error) = self.userfault.unregister(pages)
        {
            // Memory that is no longer mapped is no longer registered.
            tracing::debug!("memory could not be unregistered: {error}");
        }
    }

    /// Converts addresses into offsets in the memory.
    fn offsets(&self, ranges: &Ranges, memory_bytes: u64) -> Ranges {
        ranges.from_start_of(self.start..self.start.saturating_add(memory_bytes))
    }
}

impl Tracker for WriteProtection {
    fn method(&self) -> TrackMethod {
        TrackMethod::WriteProtection
    }

    fn take(&self, space: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
        let used_by = std::process::id();
        if used_by != self.made_by {
            return Err(TrackError::OtherPid { made_by: self.made_by, used_by });
        }
        let mut state = self.state();
        let memory_bytes = state.memory_bytes;
        check_one_memory(space, memory_bytes)?;
        let pages = self.pages(memory_bytes);
        let was_registered = match pagemap::take_touched(&self.pagemap, pages.clone()) {
            Ok(touched) => Some(touched),
            // Parts may be protected already and what was written there is lost: so be it all.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            Err(source) => {
                let _ = state.ledger.take(Finding::Anything(RescanReason::Interrupted), since);
                return Err(TrackError::System { action: "find what was written", source });
            }
        };
        let found = match was_registered {
            Some(touched) => {
                let written = self.offsets(&touched.written, memory_bytes);
                state.guards = self.offsets(&touched.guards, memory_bytes);
                state.absent = self.offsets(&touched.absent, memory_bytes);
                // Something may have been there before the guard.
                let changed = written.union(&state.absent).union(&state.guards);
                Finding::Bytes(changed)
            }
            None => {
                state.absent = Ranges::new();
                state.guards = Ranges::new();
                Finding::Anything(RescanReason::Interrupted)
            }
        };
        // Entered before anything can fail: what the scan took is known to nobody else.
        let interrupted = matches!(found, Finding::Anything(_));
        let (number, changes) = state.ledger.take(found, since);
        if interrupted {
            self.register(pages.clone())?;
            let touched = pagemap::take_touched(&self.pagemap, pages.clone())
                .map_err(|source| TrackError::System { action: "write-protect the memory", source })?;
            state.guards = self.offsets(&touched.guards, memory_bytes);
        }
        if let Ok(range) = AddressRange::new(pages.start, pages.end) {
            userfault::check_mapped(pages).map_err(|_| TrackError::NotPrivate {
                range,
                found: "a part that is not mapped".to_owned(),
            })?;
        }
        Ok(DirtySet { number, changes: changes.map(|ranges| vec![ranges]) })
    }

    fn committed(&self, number: u64, id: SnapshotId) {
        self.state().ledger.committed(number, id);
    }

    fn basis(&self) -> Option<SnapshotId> {
        self.state().ledger.basis()
    }

    fn estimate_bytes(&self) -> u64 {
        let pages = self.pages(self.state().memory_bytes);
        pagemap::count_written(&self.pagemap, pages).unwrap_or(0)
    }
}

impl Drop for WriteProtection {
    fn drop(&mut self) {
        let memory_bytes = self.state().memory_bytes;
        self.unregister(self.pages(memory_bytes));
    }
}

/// The reason why the kernel does not offer write protection.
fn unavailable(source: io::Error) -> TrackError {
    let why = match source.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel was built without userfaultfd",
        Some(libc::EPERM | libc::EACCES) => {
            "userfaultfd or /proc/self/pagemap is forbidden here; allow them in the sandbox (seccomp, \
             container profile)"
        }
        Some(libc::EINVAL | libc::ENOTTY) => {
            "the kernel has no asynchronous write protection; it came with Linux 6.7"
        }
        _ => "the kernel refuses it",
    };
    TrackError::Unavailable { means: TrackMethod::WriteProtection, why: why.to_owned(), source }
}

/// Fails unless all of `range` is mapped, private and without a file. Others could write shared
/// memory unnoticed.
fn check_private(range: AddressRange) -> Result<(), TrackError> {
    let maps = std::fs::read_to_string("/proc/self/maps")
        .map_err(|source| TrackError::System { action: "read the mappings of this process", source })?;
    let not_private = |found: &str| Err(TrackError::NotPrivate { range, found: found.to_owned() });
    let mut end = range.start();
    for line in maps.lines() {
        // "55d0c8a5b000-55d0c8a5d000 rw-p 00000000 00:00 0 [heap]"
        let mut fields = line.split_ascii_whitespace();
        let addresses = fields.next().and_then(|addresses| addresses.split_once('-'));
        let address = |digits| u64::from_str_radix(digits, 16).ok();
        let Some((Some(from), Some(to))) = addresses.map(|(from, to)| (address(from), address(to))) else {
            return not_private("a mapping of an unknown form");
        };
        if to <= range.start() || range.end() <= from {
            continue;
        }
        if end < from {
            return not_private("a part that is not mapped");
        }
        let is_private = fields.next().is_some_and(|protection| protection.ends_with('p'));
        let has_no_file = fields.nth(2) == Some("0");
        if !is_private || !has_no_file {
            return not_private(line);
        }
        end = to;
    }
    if end < range.end() { not_private("a part that is not mapped") } else { Ok(()) }
}
