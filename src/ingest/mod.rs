//! Ingest: the memory of an open source becomes tables in the store.
//!
//! The work of a capture between opening the source and writing the record, in two steps. While the
//! source stands still what is wanted of it is copied into a staging buffer ([`Ingest::stage`]);
//! afterwards one worker a core takes pieces, hashes their regions, leaves those alone that equal the
//! parent's, looks the others up and appends what the store lacks ([`Ingest::finish`]). Whoever finishes
//! the last piece of a table stores the table. Memory that nobody writes is worked on where it is.
//!
//! Where it is known what changed since the parent, only that is wanted. Tables without a change are
//! the parent's, unread. Of the regions that changed the rest is completed from the parent's, out of the
//! store, and not from memory, which may be written again by then.

mod dense;
mod staging;
mod tables;

pub(crate) use staging::{Staged, Staging};

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dense::{Dense, within};
use tables::{TableJob, TableState};

use crate::address_space::AddressSpace;
use crate::error::Error;
use crate::hash::Hash;
use crate::piece::{CHANGED_PIECE_BYTES, PIECE_BYTES, Piece, intersection, overlapping, pieces_of};
use crate::progress::{Meter, Progress};
use crate::put::StoreAs;
use crate::reference::ReferenceMapping;
use crate::root::Root;
use crate::source::{CopyOut, Frozen, InPlace, Memory};
use crate::store::Shared;
use crate::store::gate::CaptureGuard;
use crate::store::packs::batch::Batch;
use crate::store::read::{Check, Reader};
use crate::table::{self, MappingTables, Place, Places};
use crate::units::{AddressRange, RegionSize};
use crate::workers::cores;

/// The work of one capture.
pub(crate) struct Ingest {
    shared: Arc<Shared>,
    guard: CaptureGuard,
    store_as: StoreAs,
    region_size: RegionSize,
    /// Whether what memory is compared with is the parent, and not only a snapshot like it.
    has_parent: bool,
    /// How many tables the root has.
    root_tables: usize,
    /// Those in which there is something to do, in the order of the root.
    tables: Vec<TableJob>,
    /// Those that are the parent's, and which.
    taken_over: Vec<(usize, Hash)>,
    /// For each mapping what is to be read: what may be something else than zeros, and of that what
    /// changed, if that is known.
    wanted: Vec<Vec<Range<u64>>>,
    /// For each mapping what changed, if that is known.
    changed: Option<Vec<Vec<Range<u64>>>>,
    /// For each mapping what is left out.
    excluded: Vec<Vec<Range<u64>>>,
    meter: Meter,
    failure: Mutex<Option<Error>>,
    unreadable: Mutex<Vec<AddressRange>>,
    zero_bytes: AtomicU64,
    /// The zeros that the parent had where tables were worked on.
    parent_zero_bytes: AtomicU64,
    changed_regions: AtomicU64,
    new_regions: AtomicU64,
    delta_regions: AtomicU64,
    shared_regions: AtomicU64,
    added_bytes: AtomicU64,
}

/// What was ingested.
pub(crate) struct Ingested {
    pub(crate) root: Root,
    pub(crate) unreadable: Vec<AddressRange>,
    /// Without those of tables that were taken over from the parent …
    pub(crate) zero_bytes: u64,
    /// … which had so many where the others are.
    pub(crate) parent_zero_bytes: u64,
    pub(crate) changed_regions: u64,
    pub(crate) new_regions: u64,
    pub(crate) delta_regions: u64,
    pub(crate) shared_regions: u64,
    pub(crate) added_bytes: u64,
}

impl Ingest {
    /// Plans the work. `reference` has for each mapping the one it is compared with, of the parent if
    /// `has_parent`; `changes` is what may differ from that, if it is known.
    pub(crate) fn new(
        (shared, guard, store_as): (Arc<Shared>, CaptureGuard, StoreAs),
        space: &AddressSpace,
        frozen: &dyn Frozen,
        reference: &[ReferenceMapping<'_>],
        has_parent: bool,
        changes: Option<Vec<Vec<Range<u64>>>>,
        progress: &Progress,
    ) -> Result<Ingest, Error> {
        let region_size = shared.format.region_size;
        let (mut wanted, mut excluded) = (Vec::new(), Vec::new());
        for (at, mapping) in space.mappings().iter().enumerate() {
            let within = |range: AddressRange| {
                let range = range.intersection(mapping.range)?;
                Some(range.start() - mapping.range.start()..range.end() - mapping.range.start())
            };
            wanted.push(if mapping.captured { frozen.populated(at)? } else { Vec::new() });
            excluded.push(space.excluded().iter().copied().filter_map(within).collect());
        }
        let changed = changes.map(|mut changed| {
            changed.resize(space.mappings().len(), Vec::new());
            let reference_bytes = reference.iter().map(|mapping| mapping.length_bytes);
            let mappings = space.mappings().iter().zip(reference_bytes.chain(std::iter::repeat(0)));
            for ((ranges, wanted), (mapping, reference_bytes)) in
                changed.iter_mut().zip(&mut wanted).zip(mappings)
            {
                add_growth(ranges, reference_bytes, mapping.range.length_bytes(), region_size);
                *wanted = intersection(ranges, wanted);
            }
            changed
        });
        let mut ingest = Ingest {
            shared,
            guard,
            store_as,
            region_size,
            has_parent,
            root_tables: 0,
            tables: Vec::new(),
            taken_over: Vec::new(),
            meter: progress.begin(wanted.iter().flatten().map(|range| range.end - range.start).sum()),
            wanted,
            changed,
            excluded,
            failure: Mutex::default(),
            unreadable: Mutex::default(),
            zero_bytes: AtomicU64::new(0),
            parent_zero_bytes: AtomicU64::new(0),
            changed_regions: AtomicU64::new(0),
            new_regions: AtomicU64::new(0),
            delta_regions: AtomicU64::new(0),
            shared_regions: AtomicU64::new(0),
            added_bytes: AtomicU64::new(0),
        };
        let places = Places::new(space, region_size);
        ingest.root_tables = places.count();
        for mapping in places.mappings() {
            let reference = reference.get(mapping.mapping_index).copied().unwrap_or_default();
            ingest.plan_mapping(&places, mapping, reference);
        }
        Ok(ingest)
    }

    /// Plans the tables of a mapping in which there is anything to do. All others are as in the reference, if it is
    /// known what changed, else of nothing but zeros: these are not looked at one by one.
    fn plan_mapping(&mut self, places: &Places, mapping: &MappingTables, reference: ReferenceMapping<'_>) {
        let covered_bytes = table::covered_bytes(self.region_size);
        let in_mapping = mapping.tables();
        let mut wanted = tables_in(&self.wanted[mapping.mapping_index], covered_bytes);
        for (at, hash) in reference.tables.stored().take_while(|(at, _)| *at < in_mapping.len()) {
            let table = at as u64 * covered_bytes..(at as u64 + 1) * covered_bytes;
            match &self.changed {
                Some(changed) if overlapping(&changed[mapping.mapping_index], table).next().is_none() => {
                    self.taken_over.push((in_mapping.start + at, hash));
                }
                _ => wanted.push(at as u64),
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        // How many bytes are zeros that the reference does not have: all of it, or what it grew by.
        let whole_bytes = mapping.range.length_bytes();
        let mut zero_bytes = match self.changed {
            Some(_) => whole_bytes.saturating_sub(reference.length_bytes),
            None => whole_bytes,
        };
        for at in wanted {
            let place = places.place(mapping, at);
            let mut table = TableJob {
                at: in_mapping.start + usize::try_from(at).unwrap_or(usize::MAX),
                place,
                reference: usize::try_from(at).map_or(Hash::ZERO, |at| reference.tables.get(at)),
                reference_bytes: covered_of(reference, &place),
                state: Mutex::default(),
            };
            zero_bytes -= match self.changed {
                Some(_) => table.place.length_bytes - table.reference_bytes,
                None => table.place.length_bytes,
            } as u64;
            let pieces_left = self.pieces_of(self.tables.len(), &table).count();
            table.state = Mutex::new(TableState { pieces_left, ..TableState::default() });
            self.tables.push(table);
        }
        self.zero_bytes.fetch_add(zero_bytes, Ordering::Relaxed);
    }

    /// Has what is not worked on yet compared with a snapshot like it, which is not the parent.
    pub(crate) fn compare_with(&mut self, reference: &[ReferenceMapping<'_>]) {
        let covered_bytes = table::covered_bytes(self.region_size);
        for table in &mut self.tables {
            let reference = reference.get(table.place.mapping_index).copied().unwrap_or_default();
            let at = usize::try_from(table.place.offset_bytes / covered_bytes);
            table.reference = at.map_or(Hash::ZERO, |at| reference.tables.get(at));
            table.reference_bytes = covered_of(reference, &table.place);
        }
    }

    /// How much is to be read.
    pub(crate) fn wanted_bytes(&self) -> u64 {
        self.wanted.iter().flatten().map(|range| range.end - range.start).sum()
    }

    /// What decides which regions of a table are worked on.
    fn ranges_of(&self, table: &TableJob) -> &[Range<u64>] {
        let mapping_index = table.place.mapping_index;
        match &self.changed {
            // Where the parent has nothing but zeros, what is not populated did not change.
            Some(changed) if !table.reference.is_zero() => &changed[mapping_index],
            _ => &self.wanted[mapping_index],
        }
    }

    fn pieces_of(&self, at: usize, table: &TableJob) -> impl Iterator<Item = Piece> {
        let max_bytes = if self.changed.is_some() { CHANGED_PIECE_BYTES } else { PIECE_BYTES };
        pieces_of(at, table.place, self.ranges_of(table), self.region_size, max_bytes)
    }

    fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.tables.iter().enumerate().flat_map(|(at, table)| self.pieces_of(at, table))
    }

    /// The regions of a piece that are worked on, from the beginning of their table.
    fn regions_of(&self, piece: &Piece) -> Vec<usize> {
        let region_bytes = self.region_size.bytes();
        let last = piece.first_region + piece.length_bytes.div_ceil(region_bytes);
        if self.changed.is_none() {
            return (piece.first_region..last).collect();
        }
        let mut regions: Vec<usize> = Vec::new();
        for range in
            overlapping(self.ranges_of(&self.tables[piece.table]), piece.offset_bytes..piece.end_bytes())
        {
            let range = within(piece, &range);
            let first = piece.first_region + range.start / region_bytes;
            let first = regions.last().map_or(first, |last| first.max(last + 1));
            regions.extend(first..piece.first_region + range.end.div_ceil(region_bytes));
        }
        regions
    }

    /// What is to be read of a piece, from the mapping's start.
    fn wanted_of(&self, piece: &Piece) -> impl Iterator<Item = Range<u64>> {
        overlapping(&self.wanted[piece.mapping_index], piece.offset_bytes..piece.end_bytes())
    }

    /// Works on memory that nobody writes where it is: there is nothing to copy first.
    pub(crate) fn work_directly(&self, frozen: &dyn Frozen) -> Result<(), Error> {
        match frozen.memory() {
            Memory::InPlace(memory) => {
                self.work_on_all(self.pieces(), &|piece, worker| self.work_in_place(memory, piece, worker));
            }
            Memory::Shared(memory) | Memory::SharedUntilRelease(memory) => {
                self.work_on_all(self.pieces(), &|piece, worker| self.work_copied(memory, piece, worker));
            }
            Memory::UntilRelease(memory) => self.work_while_copying(memory, self.pieces()),
        }
        self.take_failure()
    }

    /// The second step: works on what was copied. The source is not needed any more. What was found or
    /// stored is pinned as long as the guard is there.
    pub(crate) fn finish(self, staged: Option<Staged>) -> Result<(Ingested, CaptureGuard), Error> {
        if let Some(Staged { buffer, pieces, .. }) = staged {
            self.work_on_all(pieces.into_iter(), &|(piece, place), worker| {
                self.work_gathered(piece, &buffer[place.clone()], worker)
            });
            self.take_failure()?;
        }
        // What became zeros has no piece that would finish it.
        let mut worker = Worker::new(&self.shared);
        for at in 0..self.tables.len() {
            let mut state = lock(&self.tables[at].state);
            if state.done.is_none() {
                state.hashes = vec![Hash::ZERO; self.tables[at].place.regions];
                self.finish_table(at, &mut state, &mut worker)?;
            }
        }
        drop(worker);
        let done = self.tables.iter().map(|table| (table.at, lock(&table.state).done.unwrap_or(Hash::ZERO)));
        let root = Root::new(self.root_tables, done.chain(self.taken_over.iter().copied()).collect());
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let ingested = Ingested {
            zero_bytes: get(&self.zero_bytes),
            parent_zero_bytes: get(&self.parent_zero_bytes),
            changed_regions: get(&self.changed_regions),
            new_regions: get(&self.new_regions),
            delta_regions: get(&self.delta_regions),
            shared_regions: get(&self.shared_regions),
            added_bytes: get(&self.added_bytes),
            unreadable: std::mem::take(&mut lock(&self.unreadable)),
            root,
        };
        Ok((ingested, self.guard))
    }

    /// Works on a piece whose wanted ranges stand one after the other in `bytes`.
    fn work_gathered(&self, piece: &Piece, bytes: &[u8], worker: &mut Worker<'_>) -> Result<(), Error> {
        if self.is_whole(piece) {
            return self.take(piece, &self.regions_of(piece), bytes, worker);
        }
        let mut left = bytes;
        self.work(piece, worker, |_, part| {
            let (bytes, rest) = left.split_at(part.len());
            part.copy_from_slice(bytes);
            left = rest;
            Ok(())
        })
    }

    fn work_in_place(
        &self,
        memory: &(dyn InPlace + Sync),
        piece: &Piece,
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        if self.is_whole(piece) {
            let start = usize::try_from(piece.offset_bytes).unwrap_or(usize::MAX);
            let bytes = &memory.bytes(piece.mapping_index)[start..start + piece.length_bytes];
            return self.take(piece, &self.regions_of(piece), bytes, worker);
        }
        self.work(piece, worker, |range, part| copy_in_place(memory, piece.mapping_index, &[range], part))
    }

    fn work_copied(
        &self,
        memory: &(dyn CopyOut + Sync),
        piece: &Piece,
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        self.work(piece, worker, |range, part| self.copy_out(memory, piece.mapping_index, &[range], part))
    }

    /// Whether all bytes of a piece are wanted, so that they need not be put together.
    fn is_whole(&self, piece: &Piece) -> bool {
        self.changed.is_none()
            && self.excluded_in(piece).next().is_none()
            && self.wanted_of(piece).next() == Some(piece.offset_bytes..piece.end_bytes())
    }

    /// Puts the regions of a piece together, with `read` for what is wanted of them, in order, and
    /// works on them.
    fn work(
        &self,
        piece: &Piece,
        worker: &mut Worker<'_>,
        mut read: impl FnMut(Range<u64>, &mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let regions = self.regions_of(piece);
        let dense = Dense { piece, regions: &regions, region_bytes: self.region_size.bytes() };
        let mut buffer = std::mem::take(&mut worker.buffer);
        buffer.clear();
        buffer.resize(dense.length_bytes(), 0);
        if let Some(changed) = &self.changed {
            let changed = &changed[piece.mapping_index];
            self.complete(&dense, changed, &mut buffer, worker)?;
        }
        for range in self.wanted_of(piece) {
            // Wanted ranges lie in regions that are worked on, and those side by side here too.
            read(range.clone(), &mut buffer[dense.place(&range)])?;
        }
        for range in self.excluded_in(piece) {
            dense.parts(&range).for_each(|part| buffer[part].fill(0));
        }
        self.take(piece, &regions, &buffer, worker)?;
        worker.buffer = buffer;
        Ok(())
    }

    /// Fills in what did not change from the parent's regions, and zeros where it did.
    fn complete(
        &self,
        dense: &Dense<'_>,
        changed: &[Range<u64>],
        buffer: &mut [u8],
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let table = &self.tables[dense.piece.table];
        let reference = self.reference_hashes(table, worker)?;
        for (at, region) in dense.regions.iter().enumerate() {
            let here = dense.range_of(*region);
            let changed: Vec<_> = overlapping(changed, here.clone()).collect();
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
                        self.shared.forget_culprit(&error);
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

    /// Does `work` on pieces on every core, until one fails.
    fn work_on_all<T: Send>(
        &self,
        mut pieces: impl Iterator<Item = T> + Send,
        work: &(dyn Fn(&T, &mut Worker<'_>) -> Result<(), Error> + Sync),
    ) {
        let first: Vec<T> = pieces.by_ref().take(2).collect();
        let count = first.len();
        let pieces = Mutex::new(first.into_iter().chain(pieces));
        let run = || {
            let _whatever_happens = FailOnPanic(self);
            let mut worker = Worker::new(&self.shared);
            while !self.failed() {
                let Some(piece) = lock(&pieces).next() else { break };
                self.note(work(&piece, &mut worker));
            }
        };
        match count {
            0 => {}
            1 => run(),
            _ => on_all_cores(run),
        }
    }

    fn failed(&self) -> bool {
        lock(&self.failure).is_some()
    }

    fn take_failure(&self) -> Result<(), Error> {
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    /// Keeps the first error there is.
    fn note(&self, result: Result<(), Error>) {
        if let Err(error) = result {
            lock(&self.failure).get_or_insert(error);
        }
    }

    fn excluded_in(&self, piece: &Piece) -> impl Iterator<Item = Range<u64>> + '_ {
        overlapping(&self.excluded[piece.mapping_index], piece.offset_bytes..piece.end_bytes())
    }

    /// Copies ranges of a mapping into `buffer`, one after the other.
    fn copy_out<M: CopyOut + ?Sized>(
        &self,
        memory: &M,
        mapping_index: usize,
        ranges: &[Range<u64>],
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        let mut unreadable = Vec::new();
        memory.copy_ranges(mapping_index, ranges, buffer, &mut unreadable)?;
        if !unreadable.is_empty() {
            lock(&self.unreadable).append(&mut unreadable);
        }
        Ok(())
    }
}

/// Tells the others when a worker panics; the scope it runs in panics after that.
struct FailOnPanic<'a>(&'a Ingest);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.note(Err(Error::Interrupted));
        }
    }
}

/// What one worker keeps to itself.
struct Worker<'a> {
    reader: Reader<'a>,
    batch: Batch,
    buffer: Vec<u8>,
    /// The plain bytes of a base.
    base: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared) -> Worker<'a> {
        let (batch, buffer, base) = Default::default();
        Worker { reader: Reader::new(shared, Check::Full), batch, buffer, base }
    }
}

/// Runs `work` on every core.
fn on_all_cores(work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        (1..cores()).for_each(|_| drop(scope.spawn(&work)));
        work();
    });
}

/// How many bytes the reference's table in a place covers.
fn covered_of(reference: ReferenceMapping<'_>, place: &Place) -> usize {
    let bytes = reference.length_bytes.saturating_sub(place.offset_bytes);
    usize::try_from(bytes).map_or(place.length_bytes, |bytes| bytes.min(place.length_bytes))
}

/// The tables of a mapping in which anything of `ranges` (sorted and apart) lies: in order, perhaps twice.
fn tables_in(ranges: &[Range<u64>], covered_bytes: u64) -> Vec<u64> {
    let tables = |range: &Range<u64>| range.start / covered_bytes..range.end.div_ceil(covered_bytes);
    let mut found: Vec<u64> = Vec::new();
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let tables = tables(range);
        found.extend(tables.start.max(found.last().map_or(0, |last| last + 1))..tables.end);
    }
    found
}

/// Adds to what changed what a mapping grew by, and the region that was its last.
fn add_growth(changed: &mut Vec<Range<u64>>, parent_bytes: u64, length_bytes: u64, region_size: RegionSize) {
    if parent_bytes < length_bytes {
        let region_bytes = region_size.bytes() as u64;
        let start = parent_bytes / region_bytes * region_bytes;
        changed.retain(|range| range.start < start);
        if let Some(last) = changed.last_mut() {
            last.end = last.end.min(start);
        }
        changed.push(start..length_bytes);
    }
}

fn copy_in_place(
    memory: &(dyn InPlace + Sync),
    mapping_index: usize,
    ranges: &[Range<u64>],
    mut buffer: &mut [u8],
) -> Result<(), Error> {
    let place = |offset_bytes: u64| usize::try_from(offset_bytes).unwrap_or(usize::MAX);
    for range in ranges {
        let bytes = &memory.bytes(mapping_index)[place(range.start)..place(range.end)];
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(bytes.len());
        part.copy_from_slice(bytes);
        buffer = rest;
    }
    Ok(())
}

/// How long ranges are together.
fn total_bytes(ranges: &[Range<u64>]) -> usize {
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    usize::try_from(total).unwrap_or(usize::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
