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

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{SendTimeoutError, Sender};
use memmap2::MmapMut;

use crate::address_space::AddressSpace;
use crate::error::Error;
use crate::hash::{self, Hash};
use crate::piece::{CHANGED_PIECE_BYTES, PIECE_BYTES, Piece, intersection, overlapping, pieces_of};
use crate::progress::{Meter, Progress};
use crate::put::{Put, StoreAs, base};
use crate::reference::ReferenceMapping;
use crate::region::is_zero;
use crate::sink::SinkError;
use crate::source::{CopyOut, Frozen, InPlace, Memory};
use crate::store::Shared;
use crate::store::error::StoreError;
use crate::store::gate::CaptureGuard;
use crate::store::index::Tree;
use crate::store::log::Batch;
use crate::store::object::Kind;
use crate::store::read::{Check, Reader};
use crate::sys::map;
use crate::table::{self, Place};
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
    tables: Vec<TableJob>,
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

/// Memory for what is copied while a source stands still.
pub(crate) struct Staging {
    buffer: MmapMut,
}

impl Staging {
    /// A buffer of `length_bytes`, of which the first `ready_bytes` are touched now, so that nobody
    /// has to wait for the kernel to clear them later.
    pub(crate) fn new(length_bytes: usize, ready_bytes: usize) -> Result<Staging, Error> {
        let bytes = length_bytes as u64;
        let mut buffer =
            map::map_zeros(length_bytes.max(1)).map_err(|source| SinkError::Mapping { bytes, source })?;
        for byte in buffer[..ready_bytes.min(length_bytes)].iter_mut().step_by(4096) {
            *byte = 0;
        }
        Ok(Staging { buffer })
    }
}

/// What was copied and waits to be worked on: the wanted ranges of each piece, one after the other.
pub(crate) struct Staged {
    buffer: MmapMut,
    pieces: Vec<(Piece, Range<usize>)>,
    /// Whether the buffer was too small, so that the rest was worked on while the source stood still.
    pub(crate) was_full: bool,
}

/// Ranges of a mapping that are to be copied into their place, one after the other.
struct Copying<'a> {
    mapping_index: usize,
    ranges: Vec<Range<u64>>,
    buffer: &'a mut [u8],
}

/// One table being filled.
struct TableJob {
    place: Place,
    /// The reference's table in the same place.
    reference: Hash,
    /// How much memory the reference's table covers.
    reference_bytes: usize,
    state: Mutex<TableState>,
}

#[derive(Default)]
struct TableState {
    pieces_left: usize,
    hashes: Vec<Hash>,
    reference_hashes: Option<Arc<Vec<Hash>>>,
    done: Option<Hash>,
}

/// What was ingested.
pub(crate) struct Ingested {
    pub(crate) tables: Vec<Hash>,
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
            tables: Vec::new(),
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
        let tables = table::places(space, region_size).enumerate().map(|(at, place)| {
            let reference = reference.get(place.mapping_index).copied().unwrap_or_default();
            let in_mapping = place.offset_bytes / table::covered_bytes(region_size);
            let hash = usize::try_from(in_mapping).ok().and_then(|at| reference.tables.get(at).copied());
            let reference_bytes = reference.length_bytes.saturating_sub(place.offset_bytes);
            let mut table = TableJob {
                place,
                reference: hash.unwrap_or(Hash::ZERO),
                reference_bytes: usize::try_from(reference_bytes)
                    .map_or(place.length_bytes, |bytes| bytes.min(place.length_bytes)),
                state: Mutex::default(),
            };
            let pieces_left = ingest.pieces_of(at, &table).count();
            // Without a change it is the parent's; what it grew by is zeros.
            let done = (ingest.changed.is_some() && pieces_left == 0).then_some(table.reference);
            if done.is_some() {
                let grown_bytes = (table.place.length_bytes - table.reference_bytes) as u64;
                ingest.zero_bytes.fetch_add(grown_bytes, Ordering::Relaxed);
            }
            table.state = Mutex::new(TableState { pieces_left, done, ..TableState::default() });
            table
        });
        let tables = tables.collect();
        ingest.tables = tables;
        Ok(ingest)
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

    /// The first step, while the source stands still: copies what is wanted, on all cores where the
    /// source allows it. What the buffer has no room for is worked on at once.
    pub(crate) fn stage(&self, frozen: &dyn Frozen, staging: Staging) -> Result<Staged, Error> {
        let mut buffer = staging.buffer;
        let mut placed: Vec<(Piece, Range<usize>)> = Vec::new();
        // The ranges of pieces that stand side by side in the buffer are copied together, up to a length.
        let mut groups: Vec<(usize, Vec<Range<u64>>, Range<usize>)> = Vec::new();
        let mut at = 0;
        let mut pieces = self.pieces().peekable();
        while let Some(piece) = pieces.peek().copied() {
            let ranges: Vec<_> = self.wanted_of(&piece).collect();
            let place = at..at + total_bytes(&ranges);
            // Lines of cache are not shared between pieces.
            at = place.end.next_multiple_of(64);
            if at > buffer.len() {
                break;
            }
            match groups.last_mut() {
                Some((mapping_index, others, whole))
                    if *mapping_index == piece.mapping_index
                        && whole.end == place.start
                        && whole.len() < COPY_BYTES =>
                {
                    others.extend(ranges);
                    whole.end = place.end;
                }
                _ => groups.push((piece.mapping_index, ranges, place.clone())),
            }
            placed.push((piece, place));
            pieces.next();
        }
        let (mut free, mut free_at) = (&mut buffer[..], 0);
        let copies = groups.into_iter().map(|(mapping_index, ranges, place)| {
            let (_, rest) = std::mem::take(&mut free).split_at_mut(place.start - free_at);
            let (buffer, rest) = rest.split_at_mut(place.len());
            (free, free_at) = (rest, place.end);
            Copying { mapping_index, ranges, buffer }
        });
        let copies: Vec<Copying<'_>> = copies.collect();
        let was_full = pieces.peek().is_some();
        match frozen.memory() {
            Memory::InPlace(memory) => {
                self.copy_all(copies, |mapping, ranges, buffer| {
                    copy_in_place(memory, mapping, ranges, buffer)
                });
                self.work_on_all(pieces, &|piece, worker| self.work_in_place(memory, piece, worker));
            }
            Memory::Shared(memory) | Memory::SharedUntilRelease(memory) => {
                self.copy_all(copies, |mapping, ranges, buffer| {
                    self.copy_out(memory, mapping, ranges, buffer)
                });
                self.work_on_all(pieces, &|piece, worker| self.work_copied(memory, piece, worker));
            }
            Memory::UntilRelease(memory) => {
                for Copying { mapping_index, ranges, buffer } in copies {
                    self.note(self.copy_out(memory, mapping_index, &ranges, buffer));
                    if self.failed() {
                        break;
                    }
                }
                if was_full {
                    self.work_while_copying(memory, pieces);
                }
            }
        }
        self.take_failure()?;
        Ok(Staged { buffer, pieces: placed, was_full })
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
                let bytes = &buffer[place.clone()];
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
            });
            self.take_failure()?;
        }
        // Tables of nothing but zeros have no piece that would finish them.
        let mut worker = Worker::new(&self.shared);
        for at in 0..self.tables.len() {
            let mut state = lock(&self.tables[at].state);
            if state.done.is_none() {
                state.hashes = vec![Hash::ZERO; self.tables[at].place.regions];
                self.finish_table(at, &mut state, &mut worker)?;
            }
        }
        drop(worker);
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
            tables: self.tables.iter().map(|table| lock(&table.state).done.unwrap_or(Hash::ZERO)).collect(),
        };
        Ok((ingested, self.guard))
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
            dense.parts(&range).for_each(|(_, part)| buffer[part].fill(0));
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
                dense.parts(&range).for_each(|(_, part)| buffer[part].fill(0));
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

    /// Copies ranges into their places on every core.
    fn copy_all(
        &self,
        copies: Vec<Copying<'_>>,
        copy: impl Fn(usize, &[Range<u64>], &mut [u8]) -> Result<(), Error> + Sync,
    ) {
        let total_bytes: usize = copies.iter().map(|copying| copying.buffer.len()).sum();
        let copies = Mutex::new(copies.into_iter());
        let run = || {
            while !self.failed() {
                let Some(Copying { mapping_index, ranges, buffer }) = lock(&copies).next() else { break };
                self.note(copy(mapping_index, &ranges, buffer));
            }
        };
        if total_bytes < PARALLEL_COPY_BYTES { run() } else { on_all_cores(run) }
    }

    /// Works on memory that one thread can copy, and only now.
    fn work_while_copying(&self, memory: &dyn CopyOut, pieces: impl Iterator<Item = Piece>) {
        // A few pieces at a time.
        let (copied_to, copied) = crossbeam_channel::bounded::<(Piece, Vec<u8>)>(cores());
        std::thread::scope(|scope| {
            for _ in 0..cores() {
                let copied = copied.clone();
                scope.spawn(move || {
                    let _whatever_happens = FailOnPanic(self);
                    let mut worker = Worker::new(&self.shared);
                    for (piece, bytes) in copied {
                        if self.failed() {
                            continue;
                        }
                        let mut left = &bytes[..];
                        self.note(self.work(&piece, &mut worker, |_, part| {
                            let (bytes, rest) = left.split_at(part.len());
                            part.copy_from_slice(bytes);
                            left = rest;
                            Ok(())
                        }));
                    }
                });
            }
            for piece in pieces {
                let ranges: Vec<_> = self.wanted_of(&piece).collect();
                let mut buffer = vec![0; total_bytes(&ranges)];
                let result = self.copy_out(memory, piece.mapping_index, &ranges, &mut buffer);
                self.note(result.map(|()| self.send(&copied_to, (piece, buffer))));
                if self.failed() {
                    break;
                }
            }
            drop(copied_to);
        });
    }

    /// Sends to the workers; gives up when they have failed, so that the source does not stand still
    /// for ever.
    fn send<T>(&self, to: &Sender<T>, mut task: T) {
        while let Err(SendTimeoutError::Timeout(again)) = to.send_timeout(task, Duration::from_millis(50)) {
            if self.failed() {
                return;
            }
            task = again;
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

    /// Hashes regions of a piece, whose bytes stand side by side, stores what the store lacks of them,
    /// and enters them into their table.
    fn take(
        &self,
        piece: &Piece,
        regions: &[usize],
        bytes: &[u8],
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let table = &self.tables[piece.table];
        let hashes = hashes_of(bytes, self.region_size);
        let reference = self.reference_hashes(table, worker)?;
        let in_its_place =
            |region: usize| reference.as_ref().and_then(|reference| reference.get(region)).copied();
        let changed: Vec<Changed> = hashes
            .iter()
            .zip(regions)
            .enumerate()
            .map(|(at, (hash, region))| Changed {
                at,
                hash: *hash,
                in_its_place: in_its_place(*region).unwrap_or(Hash::ZERO),
            })
            .filter(|it| !it.hash.is_zero() && it.hash != it.in_its_place)
            .collect();
        if !changed.is_empty() {
            self.store_regions(bytes, &changed, worker)?;
        }
        let mut state = lock(&table.state);
        if state.hashes.is_empty() {
            state.hashes = self.begin_table(table, reference.as_deref());
        }
        for (region, hash) in regions.iter().zip(&hashes) {
            state.hashes[*region] = *hash;
        }
        state.pieces_left -= 1;
        if state.pieces_left == 0 {
            self.finish_table(piece.table, &mut state, worker)?;
        }
        drop(state);
        self.meter.advance(total_bytes(&self.wanted_of(piece).collect::<Vec<_>>()) as u64)
    }

    /// The hashes of a table before the first of its pieces: zeros, or the parent's where only what
    /// changed is entered.
    fn begin_table(&self, table: &TableJob, reference: Option<&Vec<Hash>>) -> Vec<Hash> {
        let mut hashes = vec![Hash::ZERO; table.place.regions];
        if self.changed.is_none() {
            return hashes;
        }
        for (hash, reference) in hashes.iter_mut().zip(reference.into_iter().flatten()) {
            *hash = *reference;
        }
        let region_bytes = self.region_size.bytes();
        let zero_bytes: usize = (0..table.reference_bytes.div_ceil(region_bytes))
            .filter(|at| hashes[*at].is_zero())
            .map(|at| region_bytes.min(table.reference_bytes - at * region_bytes))
            .sum();
        self.parent_zero_bytes.fetch_add(zero_bytes as u64, Ordering::Relaxed);
        hashes
    }

    /// The hashes of the reference's table in the same place. Read once a table.
    fn reference_hashes(
        &self,
        table: &TableJob,
        worker: &mut Worker<'_>,
    ) -> Result<Option<Arc<Vec<Hash>>>, Error> {
        if table.reference.is_zero() {
            return Ok(None);
        }
        let mut state = lock(&table.state);
        if state.reference_hashes.is_none() {
            let hashes = self.read_reference(table, worker)?;
            let expected = table.reference_bytes.div_ceil(self.region_size.bytes());
            if self.changed.is_some() && hashes.len() != expected {
                // What did not change cannot be taken over from what cannot be read.
                return Err(StoreError::Missing { kind: Kind::Table, hash: table.reference }.into());
            }
            state.reference_hashes = Some(Arc::new(hashes));
        }
        Ok(state.reference_hashes.clone())
    }

    /// Reads the reference's table in the same place. It has another length if its mapping had, and
    /// none if it is damaged: then everything is looked up, and found or stored anew.
    fn read_reference(&self, table: &TableJob, worker: &mut Worker<'_>) -> Result<Vec<Hash>, Error> {
        let bytes = match worker.reader.object(Kind::Table, &table.reference) {
            Ok(bytes) => bytes,
            Err(error) if error.is_damage() => {
                tracing::warn!("{}", error.whole_story());
                // Its own bytes are wanted again too, should this table be the same.
                self.shared.forget_culprit(&error);
                Vec::new()
            }
            Err(error) => return Err(error.into()),
        };
        let regions = bytes.len() / Hash::BYTES;
        Ok(table::decode(&bytes, regions).unwrap_or_default())
    }

    fn put(&self) -> Put<'_> {
        Put { shared: &self.shared, guard: &self.guard, store_as: self.store_as }
    }

    /// Appends those of the changed regions that the store lacks.
    fn store_regions(&self, bytes: &[u8], changed: &[Changed], worker: &mut Worker<'_>) -> Result<(), Error> {
        let wanted: Vec<Hash> = changed.iter().map(|it| it.hash).collect();
        let known = self.put().known(&mut worker.reader, Tree::Regions, &wanted)?;
        // Asked after the look-up: what is damaged is made known before it is found no more.
        let deltas = self.store_as.deltas && !self.shared.damage_known();
        worker.batch.clear();
        let mut seen = HashSet::new();
        for (it, known) in changed.iter().zip(known) {
            if known || !seen.insert(it.hash) {
                continue;
            }
            let start = it.at * self.region_size.bytes();
            let plain = &bytes[start..bytes.len().min(start + self.region_size.bytes())];
            let base = match deltas {
                true => base(&mut worker.reader, Kind::Region, &it.in_its_place, &mut worker.base)?,
                false => None,
            };
            worker.batch.push(Kind::Region, self.store_as.codec, it.hash, plain, base);
        }
        let appended = self.shared.append(&mut worker.batch)?;
        self.new_regions.fetch_add(appended.objects - appended.deltas, Ordering::Relaxed);
        self.delta_regions.fetch_add(appended.deltas, Ordering::Relaxed);
        self.shared_regions.fetch_add(changed.len() as u64 - appended.objects, Ordering::Relaxed);
        self.added_bytes.fetch_add(appended.bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Counts and stores a table all of whose regions are entered.
    fn finish_table(&self, at: usize, state: &mut TableState, worker: &mut Worker<'_>) -> Result<(), Error> {
        let table = &self.tables[at];
        let reference = match state.reference_hashes.take() {
            Some(reference) => reference,
            None => Arc::new(self.read_reference(table, worker)?),
        };
        let hashes = std::mem::take(&mut state.hashes);
        let (mut zero_bytes, mut changed_regions, mut shared_regions) = (0, 0, 0);
        for (region, hash) in hashes.iter().enumerate() {
            let start = region * self.region_size.bytes();
            if hash.is_zero() {
                zero_bytes += self.region_size.bytes().min(table.place.length_bytes - start) as u64;
            }
            let same = *hash == reference.get(region).copied().unwrap_or(Hash::ZERO);
            if self.has_parent {
                changed_regions += u64::from(!same);
            } else if !hash.is_zero() {
                changed_regions += 1;
                shared_regions += u64::from(same);
            }
        }
        self.zero_bytes.fetch_add(zero_bytes, Ordering::Relaxed);
        self.changed_regions.fetch_add(changed_regions, Ordering::Relaxed);
        self.shared_regions.fetch_add(shared_regions, Ordering::Relaxed);
        let done = if hashes.iter().all(Hash::is_zero) {
            Hash::ZERO
        } else {
            let bytes = table::encode(&hashes);
            let hash = Hash::of(&bytes);
            // A reference without hashes could not be read.
            if hash != table.reference || reference.is_empty() {
                let like = Some(table.reference).filter(|_| !reference.is_empty());
                let added_bytes = self.put().object(&mut worker.reader, Kind::Table, hash, &bytes, like)?;
                self.added_bytes.fetch_add(added_bytes, Ordering::Relaxed);
            }
            hash
        };
        state.done = Some(done);
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

/// A region that is not what the reference has in its place.
struct Changed {
    /// Which of those that stand side by side.
    at: usize,
    hash: Hash,
    /// The all-zero hash where the reference has nothing.
    in_its_place: Hash,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared) -> Worker<'a> {
        let (batch, buffer, base) = Default::default();
        Worker { reader: Reader::new(shared, Check::Full), batch, buffer, base }
    }
}

/// Scattered ranges are copied by so much at a time: each call into the kernel costs a microsecond or two.
const COPY_BYTES: usize = 1 << 20;

/// Below this two threads copy no faster than one.
const PARALLEL_COPY_BYTES: usize = 1 << 20;

/// Runs `work` on every core.
fn on_all_cores(work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        (1..cores()).for_each(|_| drop(scope.spawn(&work)));
        work();
    });
}

/// Some regions of a piece side by side, without those between them.
struct Dense<'a> {
    piece: &'a Piece,
    /// From the beginning of the table, ascending.
    regions: &'a [usize],
    region_bytes: usize,
}

impl Dense<'_> {
    /// What a region covers of the mapping.
    fn range_of(&self, region: usize) -> Range<u64> {
        let start = self.piece.offset_bytes + ((region - self.piece.first_region) * self.region_bytes) as u64;
        start..self.piece.end_bytes().min(start + self.region_bytes as u64)
    }

    fn length_bytes(&self) -> usize {
        let last = self.regions.last().map_or(0..0, |region| self.range_of(*region));
        let last_bytes = usize::try_from(last.end - last.start).unwrap_or(usize::MAX);
        self.regions.len().saturating_sub(1) * self.region_bytes + last_bytes
    }

    /// Where a range is that lies in these regions alone.
    fn place(&self, range: &Range<u64>) -> Range<usize> {
        let range = within(self.piece, range);
        let first = self.piece.first_region + range.start / self.region_bytes;
        let at = self.regions.partition_point(|region| *region < first);
        let start = at * self.region_bytes + range.start % self.region_bytes;
        start..start + range.len()
    }

    /// What a range of the piece shares with each of these regions: which region, and where.
    fn parts(&self, range: &Range<u64>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let first = self.regions.partition_point(|region| self.range_of(*region).end <= range.start);
        self.regions[first..].iter().map_while(move |region| {
            let here = self.range_of(*region);
            let shared = here.start.max(range.start)..here.end.min(range.end);
            (shared.start < shared.end).then(|| (*region, self.place(&shared)))
        })
    }
}

/// The hashes of regions side by side.
fn hashes_of(bytes: &[u8], region_size: RegionSize) -> Vec<Hash> {
    let regions: Vec<&[u8]> = bytes.chunks(region_size.bytes()).collect();
    let occupied: Vec<usize> = (0..regions.len()).filter(|at| !is_zero(regions[*at])).collect();
    let found = hash::many(&occupied.iter().map(|at| regions[*at]).collect::<Vec<_>>());
    let mut hashes = vec![Hash::ZERO; regions.len()];
    for (at, hash) in occupied.into_iter().zip(found) {
        hashes[at] = hash;
    }
    hashes
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

/// Where a range of the mapping lies in a piece of it.
fn within(piece: &Piece, range: &Range<u64>) -> Range<usize> {
    let place = |offset_bytes: u64| usize::try_from(offset_bytes - piece.offset_bytes).unwrap_or(usize::MAX);
    place(range.start)..place(range.end)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
