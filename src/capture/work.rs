//! The work of a capture: makes regions of pieces of memory and enters them into their tables.
//!
//! There is one worker for each core. A worker takes a piece, gets its bytes from the source or the
//! staging buffer, completes the regions that were only read in part, and enters all into their
//! table ([`Tables::enter`]).

use std::ops::Range;

use super::counts::CaptureCounts;
use super::dense::Dense;
use super::piece::Piece;
use super::plan::Plan;
use super::tables::Tables;
use super::worker::Worker;
use crate::error::Error;
use crate::progress::{Meter, Progress};
use crate::ranges::Ranges;
use crate::root::Root;
use crate::source::{Access, CopyOut, Frozen, InPlace};
use crate::store::gate::CaptureGuard;
use crate::sync::Mutex;
use crate::units::AddressRange;
use crate::workers::{self, cores};

/// The work of one capture.
pub(super) struct Work {
    tables: Tables,
    meter: Meter,
    /// Memory that could not be copied.
    unreadable: Mutex<Vec<AddressRange>>,
}

/// The result of the work.
pub(super) struct Done {
    pub(super) root: Root,
    pub(super) counts: CaptureCounts,
    /// Memory that could not be copied.
    pub(super) unreadable: Vec<AddressRange>,
    /// Pins what was found or stored, while this value exists.
    pub(super) guard: CaptureGuard,
}

impl Work {
    pub(super) fn new(tables: Tables, progress: &Progress) -> Work {
        let meter = progress.begin(tables.plan.wanted_bytes());
        Work { tables, meter, unreadable: Mutex::default() }
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.tables.plan
    }

    /// The plan. It may only be changed before work begins.
    pub(super) fn plan_mut(&mut self) -> &mut Plan {
        &mut self.tables.plan
    }

    /// Processes pieces of memory in place: there is nothing to copy first, or no room for the
    /// copy.
    pub(super) fn on_memory(
        &self,
        frozen: &dyn Frozen,
        pieces: impl Iterator<Item = Piece> + Send,
    ) -> Result<(), Error> {
        match frozen.access() {
            Access::InPlace(memory) => {
                self.on_all(pieces, |worker, piece| self.on_piece_in_place(memory, &piece, worker))
            }
            Access::Shared(memory) | Access::SharedUntilRelease(memory) => {
                self.on_all(pieces, |worker, piece| {
                    self.on_piece(&piece, worker, |range, part| {
                        self.copy_out(memory, piece.mapping_index, &[range], part)
                    })
                })
            }
            Access::UntilRelease(memory) => self.on_memory_of_this_thread(memory, pieces),
        }
    }

    /// Works on pieces whose wanted ranges stand one after the other in a part of `buffer`.
    pub(super) fn on_copied(&self, buffer: &[u8], pieces: Vec<(Piece, Range<usize>)>) -> Result<(), Error> {
        self.on_all(pieces, |worker, (piece, place)| self.on_copied_piece(&piece, &buffer[place], worker))
    }

    /// The result. All pieces must be processed. The source is not needed any more.
    pub(super) fn finish(self) -> Result<Done, Error> {
        let (root, counts, guard) = self.tables.finish()?;
        let unreadable = self.unreadable.into_inner();
        Ok(Done { root, counts, unreadable, guard })
    }

    /// Copies ranges of a mapping into `buffer`, side by side.
    pub(super) fn copy_out<M: CopyOut + ?Sized>(
        &self,
        memory: &M,
        mapping_index: usize,
        ranges: &[Range<u64>],
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        let mut unreadable = Vec::new();
        memory.copy_ranges(mapping_index, ranges, buffer, &mut unreadable)?;
        if !unreadable.is_empty() {
            self.unreadable.lock().append(&mut unreadable);
        }
        Ok(())
    }

    /// Calls `work` on all pieces, on every core, until a call fails.
    fn on_all<T: Send>(
        &self,
        pieces: impl IntoIterator<Item = T, IntoIter: Send>,
        work: impl Fn(&mut Worker<'_>, T) -> Result<(), Error> + Sync,
    ) -> Result<(), Error> {
        workers::for_each(pieces, || Worker::new(&self.tables.shared), work)
    }

    /// Processes memory that only this thread can copy, before the release. It copies ahead of the
    /// workers.
    fn on_memory_of_this_thread(
        &self,
        memory: &dyn CopyOut,
        pieces: impl Iterator<Item = Piece>,
    ) -> Result<(), Error> {
        // A few pieces at a time.
        let (copied_to, copied) = crossbeam_channel::bounded::<(Piece, Vec<u8>)>(cores());
        std::thread::scope(|scope| {
            let working = scope.spawn(|| {
                self.on_all(copied, |worker, (piece, bytes)| self.on_copied_piece(&piece, &bytes, worker))
            });
            let copying = || {
                for piece in pieces {
                    let ranges: Vec<_> = self.plan().wanted_of(&piece).collect();
                    let mut buffer = vec![0; self.plan().wanted_bytes_of(&piece)];
                    self.copy_out(memory, piece.mapping_index, &ranges, &mut buffer)?;
                    if copied_to.send((piece, buffer)).is_err() {
                        // The workers have failed. Their error is returned below.
                        break;
                    }
                }
                Ok(())
            };
            let copied = copying();
            drop(copied_to);
            let worked = working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            copied.and(worked)
        })
    }

    /// Processes a piece whose wanted ranges lie side by side in `bytes`.
    fn on_copied_piece(&self, piece: &Piece, bytes: &[u8], worker: &mut Worker<'_>) -> Result<(), Error> {
        if self.plan().is_whole(piece) {
            return self.enter(piece, &self.plan().regions_of(piece), bytes, worker);
        }
        let mut left = bytes;
        self.on_piece(piece, worker, |_, part| {
            let (bytes, rest) = left.split_at(part.len());
            part.copy_from_slice(bytes);
            left = rest;
            Ok(())
        })
    }

    fn on_piece_in_place(
        &self,
        memory: &(dyn InPlace + Sync),
        piece: &Piece,
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        if self.plan().is_whole(piece) {
            let start = usize::try_from(piece.offset_bytes).unwrap_or(usize::MAX);
            let bytes = &memory.bytes(piece.mapping_index)[start..start + piece.length_bytes];
            return self.enter(piece, &self.plan().regions_of(piece), bytes, worker);
        }
        self.on_piece(piece, worker, |range, part| {
            copy_in_place(memory, piece.mapping_index, &[range], part);
            Ok(())
        })
    }

    /// Builds the regions of a piece and enters them. `read` is called for each wanted range, in
    /// order.
    fn on_piece(
        &self,
        piece: &Piece,
        worker: &mut Worker<'_>,
        mut read: impl FnMut(Range<u64>, &mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let plan = self.plan();
        let regions = plan.regions_of(piece);
        let dense = Dense { piece, regions: &regions, region_bytes: plan.region_size.bytes() };
        let mut buffer = std::mem::take(&mut worker.regions);
        buffer.clear();
        buffer.resize(dense.length_bytes(), 0);
        if let Some(changed) = plan.changed(piece.mapping_index) {
            self.complete(&dense, changed, &mut buffer, worker)?;
        }
        for range in plan.wanted_of(piece) {
            // A wanted range lies in regions that are processed, and these lie side by side in the
            // buffer too.
            read(range.clone(), &mut buffer[dense.place(&range)])?;
        }
        for range in plan.excluded_of(piece) {
            dense.parts(&range).for_each(|part| buffer[part].fill(0));
        }
        self.enter(piece, &regions, &buffer, worker)?;
        worker.regions = buffer;
        Ok(())
    }

    /// Fills in the unchanged bytes from the parent's regions. Changed bytes that were not read are
    /// zeros.
    fn complete(
        &self,
        dense: &Dense<'_>,
        changed: &Ranges,
        buffer: &mut [u8],
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let table = &self.plan().tables[dense.piece.table];
        let reference = self.tables.reference_hashes(dense.piece.table, worker)?;
        for (at, region) in dense.regions.iter().enumerate() {
            let here = dense.range_of(*region);
            let changed: Vec<_> = changed.within(here.clone()).collect();
            if changed == [here.clone()] {
                continue;
            }
            let place = at * dense.region_bytes..((at + 1) * dense.region_bytes).min(buffer.len());
            let reference_bytes =
                table.reference_bytes.saturating_sub(region * dense.region_bytes).min(place.len());
            let hash = reference.as_ref().and_then(|reference| reference.get(*region));
            if let Some(hash) = hash.filter(|hash| !hash.is_zero()) {
                let target = &mut buffer[place][..reference_bytes];
                if let Err(error) = worker.reader.region(hash, target) {
                    if error.is_damage() {
                        self.tables.shared.forget_culprit(&error);
                    }
                    return Err(error.into());
                }
            }
            for range in changed {
                dense.parts(&range).for_each(|part| buffer[part].fill(0));
            }
        }
        Ok(())
    }

    fn enter(
        &self,
        piece: &Piece,
        regions: &[usize],
        bytes: &[u8],
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        self.tables.enter(piece, regions, bytes, worker)?;
        Ok(self.meter.advance(self.plan().wanted_bytes_of(piece) as u64)?)
    }
}

/// Copies ranges of a mapping that is mapped in this process into `buffer`, side by side.
pub(super) fn copy_in_place(
    memory: &(dyn InPlace + Sync),
    mapping_index: usize,
    ranges: &[Range<u64>],
    mut buffer: &mut [u8],
) {
    let place = |offset_bytes: u64| usize::try_from(offset_bytes).unwrap_or(usize::MAX);
    for range in ranges {
        let bytes = &memory.bytes(mapping_index)[place(range.start)..place(range.end)];
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(bytes.len());
        part.copy_from_slice(bytes);
        buffer = rest;
    }
}
