//! Host ranges: the host of the memory reports what has changed.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ledger::{Finding, Ledger};
use super::{DirtySet, TrackError, TrackMethod, Tracker, check_one_memory};
use crate::address_space::AddressSpace;
use crate::ranges::merge;
use crate::record::SnapshotId;
use crate::units::AddressRange;

/// Marks are sorted and merged when their number has doubled since the last merge and is at least
/// this.
const MERGE_AT: usize = 4096;

/// The changes to one memory, as reported by its host: ranges, or a hypervisor's dirty bitmap.
///
/// Report all changes since the last capture began, at the latest when the next capture begins.
/// [`SourceExt`](crate::source::SourceExt) combines a source with its ranges. Ranges may overlap
/// and come in any order. The first capture reads everything.
///
/// ```
/// use stillframe::{AddressRange, CaptureOptions, Store};
/// use stillframe::source::SourceExt;
/// use stillframe::track::DirtyRanges;
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let mut memory = vec![7u8; 1 << 20];
/// let changes = DirtyRanges::new(memory.len() as u64);
/// let vm = store.process("vm-7");
/// vm.capture(&memory.tracked_by(&changes), &CaptureOptions::default())?;
///
/// memory[5000] = 8;
/// changes.mark(AddressRange::new(5000, 5001)?)?;
/// let taken = vm.capture(&memory.tracked_by(&changes), &CaptureOptions::default())?;
/// assert_eq!(taken.changed_regions, 1);
/// assert_eq!(taken.tracking.to_string(), "host-ranges");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct DirtyRanges {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    memory_bytes: u64,
    marked: Vec<Range<u64>>,
    merge_at: usize,
}

impl DirtyRanges {
    /// For one memory of `memory_bytes`. Nothing is known about its changes yet.
    pub fn new(memory_bytes: u64) -> DirtyRanges {
        Self::with(memory_bytes, Ledger::default())
    }

    /// For a memory that equals snapshot `id`, except for the ranges that will be marked.
    pub fn since(id: SnapshotId, memory_bytes: u64) -> DirtyRanges {
        Self::with(memory_bytes, Ledger::since(id))
    }

    fn with(memory_bytes: u64, ledger: Ledger) -> DirtyRanges {
        let state = State { ledger, memory_bytes, marked: Vec::new(), merge_at: MERGE_AT };
        DirtyRanges { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the bytes in `range` as possibly changed. The range is counted from the start of the
    /// memory.
    ///
    /// # Errors
    ///
    /// [`TrackError::Outside`] if the range lies outside the memory.
    pub fn mark(&self, range: AddressRange) -> Result<(), TrackError> {
        let mut state = self.state();
        let memory_bytes = state.memory_bytes;
        if range.end() > memory_bytes {
            return Err(TrackError::Outside { range, memory_bytes });
        }
        state.mark(range.start()..range.end());
        Ok(())
    }

    /// Marks the bytes of a dirty bitmap: bit `n % 64` of word `n / 64` stands for the `page_bytes`
    /// bytes from `n * page_bytes` on, as in KVM's dirty log.
    ///
    /// # Errors
    ///
    /// [`TrackError::Bitmap`] unless there are exactly as many words as the memory needs, and
    /// [`TrackError::BitOutside`] if a bit after the end of the memory is set. Nothing is marked
    /// then.
    pub fn mark_bitmap(&self, page_bytes: u64, words: &[u64]) -> Result<(), TrackError> {
        let mut state = self.state();
        let memory_bytes = state.memory_bytes;
        // A page size of zero is refused below.
        let pages = memory_bytes.div_ceil(page_bytes.max(1));
        let (expected_words, found_words) = (pages.div_ceil(64), words.len() as u64);
        if page_bytes == 0 || expected_words != found_words {
            return Err(TrackError::Bitmap { page_bytes, memory_bytes, expected_words, found_words });
        }
        if let Some(last) = words.last()
            && !pages.is_multiple_of(64)
            && last >> (pages % 64) != 0
        {
            let bit = (found_words - 1) * 64 + u64::from(63 - last.leading_zeros());
            return Err(TrackError::BitOutside { bit, memory_bytes });
        }
        for (at, word) in (0u64..).zip(words) {
            let mut left = *word;
            while left != 0 {
                // A run of bits becomes one range.
                let first = left.trailing_zeros();
                let run = (left >> first).trailing_ones();
                let start = (at * 64 + u64::from(first)) * page_bytes;
                state.mark(start..start.saturating_add(u64::from(run) * page_bytes).min(memory_bytes));
                left =
                    left.checked_shr(first + run).and_then(|rest| rest.checked_shl(first + run)).unwrap_or(0);
            }
        }
        Ok(())
    }

    /// Sets a new length of the memory. The added bytes count as changed.
    pub fn set_memory_bytes(&self, memory_bytes: u64) {
        let mut state = self.state();
        if state.memory_bytes < memory_bytes {
            // The parent may have bytes there too, from before the memory shrank.
            let grown = state.memory_bytes..memory_bytes;
            state.mark(grown);
        }
        state.memory_bytes = memory_bytes;
        state.marked.iter_mut().for_each(|range| range.end = range.end.min(memory_bytes));
        state.marked.retain(|range| range.start < range.end);
    }
}

impl State {
    fn mark(&mut self, range: Range<u64>) {
        match self.marked.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.marked.push(range),
        }
        if self.marked.len() >= self.merge_at {
            merge(&mut self.marked);
            self.merge_at = MERGE_AT.max(2 * self.marked.len());
        }
    }
}

impl Tracker for DirtyRanges {
    fn method(&self) -> TrackMethod {
        TrackMethod::DirtyRanges
    }

    fn take(&self, space: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
        let mut state = self.state();
        check_one_memory(space, state.memory_bytes)?;
        let marked = std::mem::take(&mut state.marked);
        let (number, changes) = state.ledger.take(Finding::Bytes(marked.into()), since);
        Ok(DirtySet { number, changes: changes.map(|ranges| vec![ranges]) })
    }

    fn committed(&self, number: u64, id: SnapshotId) {
        self.state().ledger.committed(number, id);
    }

    fn basis(&self) -> Option<SnapshotId> {
        self.state().ledger.basis()
    }

    fn estimate_bytes(&self) -> u64 {
        self.state().marked.iter().map(|range| range.end - range.start).sum()
    }
}
