//! Copy-on-write: which pages of a private mapping of a sealed file are not the file's any more.
//!
//! The kernel keeps that for its own sake, so writers pay nothing for it. It is never taken back by a
//! capture, however: each take finds all that was written since the template. What a page was when a
//! snapshot was taken, if not the template's, an earlier take has found; so what may have changed since that
//! snapshot are the pages found by now or then, and knowledge refers to all snapshots of the instance alike.
//!
//! | what happens to a page | what the scan says |
//! |---|---|
//! | written, by the program or by the kernel for it | copied |
//! | written by a rollback | copied; found by a take after the writing, before the snapshot is known |
//! | swapped out | copied |
//! | thrown away (MADV_DONTNEED) | the file's again, and among what earlier takes found |
//! | read only | the file's |
//!
//! What is mapped elsewhere in the mapping's place is not noticed: the owner of an instance cannot do that.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{DirtySet, RescanReason, TrackError, TrackMethod, Tracker};
use crate::address_space::AddressSpace;
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::sys::pagemap;

/// Of how many snapshots of one instance it is known that they are.
const MAX_KNOWN: usize = 64;

/// What is written of one instance of a template.
#[derive(Debug)]
pub(crate) struct CopyOnWrite {
    start: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    template: SnapshotId,
    length_bytes: u64,
    /// Snapshots that were taken of it, the newest last.
    snapshots: Vec<SnapshotId>,
    next_number: u64,
    /// All that was ever found, from the start of the image.
    found: Ranges,
}

impl CopyOnWrite {
    /// For a mapping at these addresses of the image of a snapshot.
    pub(crate) fn new(template: SnapshotId, addresses: Range<u64>) -> CopyOnWrite {
        let length_bytes = addresses.end - addresses.start;
        let state =
            State { template, length_bytes, snapshots: Vec::new(), next_number: 0, found: Ranges::new() };
        CopyOnWrite { start: addresses.start, state: Mutex::new(state) }
    }

    /// Says that the memory has another length now, and what it grew by is private memory without a file,
    /// also where the file had been.
    pub(crate) fn set_length_bytes(&self, length_bytes: u64) {
        let mut state = self.state();
        if length_bytes > state.length_bytes {
            // A snapshot may have bytes there too, from before it was shorter.
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

    /// What is the instance's own by now, from the start of the image.
    fn copied(&self) -> io::Result<Ranges> {
        let page_bytes = rustix::param::page_size() as u64;
        let (start, end) = (self.start, self.start + self.state().length_bytes);
        // Opened each time: a thousand instances would need as many descriptors, and a child that was forked
        // with one has its own page tables.
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
                // What is in the snapshot that is being taken is not known, so later it may be anything.
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

/// From ranges of the image to ranges of each mapping.
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
