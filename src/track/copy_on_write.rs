//! Copy-on-write: which pages of a private mapping of a sealed file are no longer the file's.
//!
//! The kernel needs this information itself, so writers have no extra cost. But a capture cannot
//! reset it: each take finds everything that was written since the template.
//!
//! *Why the result is right for every snapshot of the instance*: if a page differed from the
//! template when a snapshot was taken, an earlier take found it. So the pages that may have changed
//! since that snapshot are those that this take or an earlier one found.
//!
//! | what happens to a page | what the scan says |
//! |---|---|
//! | written, by the program or by the kernel for it | copied |
//! | written by a rollback | copied; a later take finds it, before the snapshot counts as known |
//! | swapped out | copied |
//! | discarded (MADV_DONTNEED) | the file's again; earlier takes found it |
//! | read only | the file's |
//!
//! A tracker does not notice if another mapping replaces the instance. The owner of an instance
//! cannot do that.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{DirtySet, RescanReason, TrackError, TrackMethod, Tracker};
use crate::address_space::AddressSpace;
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::sys::pagemap;

/// How many snapshots of one instance are remembered.
const MAX_KNOWN: usize = 64;

/// The tracker of the writes to one instance of a template.
#[derive(Debug)]
pub(crate) struct CopyOnWrite {
    start: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    template: SnapshotId,
    length_bytes: u64,
    /// The snapshots that were taken of it, newest last.
    snapshots: Vec<SnapshotId>,
    next_number: u64,
    /// Everything that any take found, as offsets in the image.
    found: Ranges,
}

impl CopyOnWrite {
    /// A tracker for the mapping of the image of snapshot `template` at these addresses.
    pub(crate) fn new(template: SnapshotId, addresses: Range<u64>) -> CopyOnWrite {
        let length_bytes = addresses.end - addresses.start;
        let state =
            State { template, length_bytes, snapshots: Vec::new(), next_number: 0, found: Ranges::new() };
        CopyOnWrite { start: addresses.start, state: Mutex::new(state) }
    }

    /// Sets a new length of the memory. The added bytes are private memory without a file, even
    /// where the file had been.
    pub(crate) fn set_length_bytes(&self, length_bytes: u64) {
        let mut state = self.state();
        if length_bytes > state.length_bytes {
            // A snapshot from before the memory shrank may have bytes there too.
            let grown = state.length_bytes..length_bytes;
            state.found.insert(grown);
        }
        state.length_bytes = length_bytes;
    }

    /// The newest snapshot taken of it, or the template.
    pub(crate) fn newest(&self) -> SnapshotId {
        let state = self.state();
        state.snapshots.last().copied().unwrap_or(state.template)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages that now belong to the instance, as offsets in the image.
    fn copied(&self) -> io::Result<Ranges> {
        let page_bytes = rustix::param::page_size() as u64;
        let (start, end) = (self.start, self.start + self.state().length_bytes);
        // Opened for each call. Otherwise a thousand instances would need a thousand descriptors.
        // Also, a descriptor from before a fork shows the page tables of the parent process.
        let pagemap = File::open("/proc/self/pagemap")?;
        let copied = pagemap::copied(&pagemap, start..end.next_multiple_of(page_bytes))?;
        Ok(copied.from_start_of(start..end))
    }
}

impl Tracker for CopyOnWrite {
    fn method(&self) -> TrackMethod {
        TrackMethod::CopyOnWrite
    }

    fn take(&self, space: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
        let (expected_bytes, found_bytes) = (self.state().length_bytes, space.image_bytes());
        if expected_bytes != found_bytes {
            return Err(TrackError::OtherMemory {
                expected: format!("an instance of {expected_bytes} bytes"),
                found: format!("memory of {found_bytes} bytes"),
            });
        }
        let copied = self.copied();
        let mut state = self.state();
        let number = state.next_number;
        state.next_number += 1;
        let known = match copied {
            Ok(copied) => {
                state.found.extend(copied);
                Ok(())
            }
            Err(error) => {
                // The contents of the snapshot that is being taken are then unknown, so later
                // anything may have changed.
                state.found = Ranges::from(0..expected_bytes);
                Err(RescanReason::Unavailable(format!("/proc/self/pagemap cannot be read: {error}")))
            }
        };
        let changes = known.and_then(|()| match since {
            None => Err(RescanReason::NoParent),
            Some(since) if since == state.template || state.snapshots.contains(&since) => {
                Ok(by_mapping(&state.found, space))
            }
            Some(_) => Err(RescanReason::OtherParent),
        });
        Ok(DirtySet { number, changes })
    }

    fn committed(&self, _number: u64, id: SnapshotId) {
        let mut state = self.state();
        if state.snapshots.len() == MAX_KNOWN {
            state.snapshots.remove(0);
        }
        state.snapshots.push(id);
    }

    fn basis(&self) -> Option<SnapshotId> {
        Some(self.newest())
    }

    fn estimate_bytes(&self) -> u64 {
        self.copied().map_or(0, |copied| copied.length_bytes())
    }
}

/// Converts ranges of the image into ranges of each mapping.
fn by_mapping(ranges: &Ranges, space: &AddressSpace) -> Vec<Ranges> {
    let mut image_bytes = 0;
    let mapping_ranges = space.mappings().iter().map(|mapping| {
        if !mapping.captured {
            return Ranges::new();
        }
        let start = image_bytes;
        image_bytes += mapping.range.length_bytes();
        ranges.from_start_of(start..image_bytes)
    });
    mapping_ranges.collect()
}
