//! Ingest: the memory of an open source becomes tables in the store.
//!
//! The work of a capture between opening the source and writing the record, done by one worker a
//! core. A worker takes a piece, hashes its regions, leaves those alone that equal the parent's,
//! looks the others up and appends what the store lacks. Whoever finishes the last piece of a table
//! stores the table.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{SendTimeoutError, Sender};
use memmap2::MmapMut;

use crate::address_space::AddressSpace;
use crate::error::Error;
use crate::hash::Hash;
use crate::piece::{Piece, overlapping, pieces_of};
use crate::progress::{Meter, Progress};
use crate::put::{Put, base, known};
use crate::region::is_zero;
use crate::sink::SinkError;
use crate::source::{CopyOut, Frozen, Memory};
use crate::store::Shared;
use crate::store::index::Tree;
use crate::store::log::Batch;
use crate::store::object::Kind;
use crate::store::read::{Check, Reader};
use crate::sys::map;
use crate::table::{self, Place};
use crate::units::{AddressRange, RegionSize};
use crate::workers::cores;

/// The work of one capture.
pub(crate) struct Ingest<'a> {
    shared: &'a Shared,
    put: Put<'a>,
    region_size: RegionSize,
    /// Whether what memory is compared with is the parent, and not only a snapshot like it.
    has_parent: bool,
    tables: Vec<TableJob>,
    /// For each mapping what may be something else than zeros.
    populated: Vec<Vec<Range<u64>>>,
    /// For each mapping what is left out.
    excluded: Vec<Vec<Range<u64>>>,
    meter: Meter<'a>,
    failure: Mutex<Option<Error>>,
    unreadable: Mutex<Vec<AddressRange>>,
    zero_bytes: AtomicU64,
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

/// One table being filled.
struct TableJob {
    place: Place,
    /// The table in its place in the reference.
    reference: Hash,
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
    pub(crate) zero_bytes: u64,
    pub(crate) changed_regions: u64,
    pub(crate) new_regions: u64,
    pub(crate) delta_regions: u64,
    pub(crate) shared_regions: u64,
    pub(crate) added_bytes: u64,
}

impl<'a> Ingest<'a> {
    /// Plans the work. `reference_tables` are those of the reference, for each mapping.
    pub(crate) fn new(
        put: Put<'a>,
        space: &AddressSpace,
        frozen: &dyn Frozen,
        reference_tables: &[&[Hash]],
        has_parent: bool,
        progress: &'a Progress,
    ) -> Result<Ingest<'a>, Error> {
        let region_size = put.shared.format.region_size;
        let (mut populated, mut excluded) = (Vec::new(), Vec::new());
        for (at, mapping) in space.mappings().iter().enumerate() {
            let within = |range: AddressRange| {
                let range = range.intersection(mapping.range)?;
                Some(range.start() - mapping.range.start()..range.end() - mapping.range.start())
            };
            populated.push(if mapping.captured { frozen.populated(at)? } else { Vec::new() });
            excluded.push(space.excluded().iter().copied().filter_map(within).collect());
        }
        let tables: Vec<TableJob> = table::places(space, region_size)
            .enumerate()
            .map(|(at, place)| {
                let in_mapping = place.offset_bytes / table::covered_bytes(region_size);
                let theirs = reference_tables.get(place.mapping_index).copied().unwrap_or_default();
                let reference = usize::try_from(in_mapping).ok().and_then(|at| theirs.get(at).copied());
                let pieces = pieces_of(at, place, &populated[place.mapping_index], region_size);
                let state = TableState { pieces_left: pieces.count(), ..TableState::default() };
                TableJob { place, reference: reference.unwrap_or(Hash::ZERO), state: Mutex::new(state) }
            })
            .collect();
        let total_bytes = populated.iter().flatten().map(|range| range.end - range.start).sum();
        Ok(Ingest {
            shared: put.shared,
            put,
            region_size,
            has_parent,
            tables,
            populated,
            excluded,
            meter: progress.begin(total_bytes),
            failure: Mutex::default(),
            unreadable: Mutex::default(),
            zero_bytes: AtomicU64::new(0),
            changed_regions: AtomicU64::new(0),
            new_regions: AtomicU64::new(0),
            delta_regions: AtomicU64::new(0),
            shared_regions: AtomicU64::new(0),
            added_bytes: AtomicU64::new(0),
        })
    }

    fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.tables.iter().enumerate().flat_map(|(at, table)| {
            pieces_of(at, table.place, &self.populated[table.place.mapping_index], self.region_size)
        })
    }

    /// Does the work. A source that stands still is released as soon as its memory is copied.
    pub(crate) fn run(self, frozen: &dyn Frozen, staging: &mut Staging) -> Result<Ingested, Error> {
        // Tables of nothing but zeros have no piece that would finish them.
        let mut worker = Worker::new(self.shared);
        for at in 0..self.tables.len() {
            let mut state = lock(&self.tables[at].state);
            if state.pieces_left == 0 {
                state.hashes = vec![Hash::ZERO; self.tables[at].place.regions];
                self.finish_table(at, &mut state, &mut worker)?;
            }
        }
        match frozen.memory() {
            Memory::InPlace(memory) => self.run_anytime(&|piece, worker| {
                let start = usize::try_from(piece.offset_bytes).unwrap_or(usize::MAX);
                let bytes = &memory.bytes(piece.mapping_index)[start..start + piece.length_bytes];
                if self.excluded_in(piece).next().is_none() {
                    return self.take(piece, bytes, worker);
                }
                let mut copy = bytes.to_vec();
                self.blank_excluded(piece, &mut copy);
                self.take(piece, &copy, worker)
            }),
            Memory::Shared(memory) => self.run_anytime(&|piece, worker| {
                let mut buffer = std::mem::take(&mut worker.buffer);
                buffer.clear();
                buffer.resize(piece.length_bytes, 0);
                self.copy_out(memory, piece, &mut buffer)?;
                self.take(piece, &buffer, worker)?;
                worker.buffer = buffer;
                Ok(())
            }),
            Memory::UntilRelease(memory) => self.run_until_release(frozen, memory, staging),
        }
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(Ingested {
            zero_bytes: get(&self.zero_bytes),
            changed_regions: get(&self.changed_regions),
            new_regions: get(&self.new_regions),
            delta_regions: get(&self.delta_regions),
            shared_regions: get(&self.shared_regions),
            added_bytes: get(&self.added_bytes),
            unreadable: std::mem::take(&mut lock(&self.unreadable)),
            tables: self.tables.iter().map(|table| lock(&table.state).done.unwrap_or(Hash::ZERO)).collect(),
        })
    }

    /// Works on memory that can be read at any time: each worker fetches its next piece itself.
    fn run_anytime(&self, take: &(dyn Fn(&Piece, &mut Worker<'_>) -> Result<(), Error> + Sync)) {
        let pieces = Mutex::new(self.pieces());
        self.on_all_cores(self.piece_count(), || {
            let mut worker = Worker::new(self.shared);
            while !self.failed() {
                let Some(piece) = lock(&pieces).next() else { break };
                self.note(take(&piece, &mut worker));
            }
        });
    }

    /// Works on memory that can be copied only while its source stands still. The copying has the
    /// machine to itself, unless the staging buffer is too small for everything.
    fn run_until_release(&self, frozen: &dyn Frozen, memory: &dyn CopyOut, staging: &mut Staging) {
        let mut free = &mut staging.buffer[..];
        let (stage, staged) = crossbeam_channel::unbounded::<(Piece, &mut [u8])>();
        // What does not fit any more: a few pieces at a time.
        let (stage_more, staged_more) = crossbeam_channel::bounded::<(Piece, Vec<u8>)>(cores());
        let work = || {
            let _whatever_happens = FailOnPanic(self);
            let mut worker = Worker::new(self.shared);
            let mut take = |piece: Piece, bytes: &[u8]| {
                if !self.failed() {
                    self.note(self.take(&piece, bytes, &mut worker));
                }
            };
            staged.iter().for_each(|(piece, bytes)| take(piece, bytes));
            staged_more.iter().for_each(|(piece, bytes)| take(piece, &bytes));
        };
        let mut stage = Some(stage);
        std::thread::scope(|scope| {
            for piece in self.pieces() {
                // Lines of cache are not shared between pieces.
                let room_bytes = piece.length_bytes.next_multiple_of(64);
                let copied = match (&stage, free.split_at_mut_checked(room_bytes)) {
                    (Some(stage), Some(_)) => {
                        let (buffer, rest) = std::mem::take(&mut free).split_at_mut(room_bytes);
                        free = rest;
                        let buffer = &mut buffer[..piece.length_bytes];
                        let copied = self.copy_out(memory, &piece, buffer);
                        // The receivers are there until the end.
                        copied.map(|()| drop(stage.send((piece, buffer))))
                    }
                    _ => {
                        if stage.take().is_some() {
                            (0..cores()).for_each(|_| drop(scope.spawn(work)));
                        }
                        let mut buffer = vec![0; piece.length_bytes];
                        let copied = self.copy_out(memory, &piece, &mut buffer);
                        copied.map(|()| self.send(&stage_more, (piece, buffer)))
                    }
                };
                if self.note(copied).is_none() || self.failed() {
                    break;
                }
            }
            frozen.release();
            drop(stage_more);
            if stage.take().is_some() {
                (0..cores()).for_each(|_| drop(scope.spawn(work)));
            }
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

    /// Runs `work` on every core, or right here if there is little to do.
    fn on_all_cores(&self, pieces: usize, work: impl Fn() + Sync) {
        match pieces.min(cores()) {
            0 | 1 => work(),
            workers => std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(&work)))),
        }
    }

    fn piece_count(&self) -> usize {
        self.tables.iter().map(|table| lock(&table.state).pieces_left).sum()
    }

    fn failed(&self) -> bool {
        lock(&self.failure).is_some()
    }

    /// Keeps the first error there is.
    fn note(&self, result: Result<(), Error>) -> Option<()> {
        result
            .map_err(|error| {
                lock(&self.failure).get_or_insert(error);
            })
            .ok()
    }

    fn excluded_in(&self, piece: &Piece) -> impl Iterator<Item = Range<u64>> + '_ {
        overlapping(&self.excluded[piece.mapping_index], piece.offset_bytes..piece.end_bytes())
    }

    fn blank_excluded(&self, piece: &Piece, bytes: &mut [u8]) {
        for range in self.excluded_in(piece) {
            bytes[within(piece, &range)].fill(0);
        }
    }

    /// Copies a piece into `buffer`, which is as long and all zeros.
    fn copy_out<M: CopyOut + ?Sized>(
        &self,
        memory: &M,
        piece: &Piece,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        let populated = &self.populated[piece.mapping_index];
        let mut unreadable = Vec::new();
        for range in overlapping(populated, piece.offset_bytes..piece.end_bytes()) {
            let target = &mut buffer[within(piece, &range)];
            memory.copy_out(piece.mapping_index, range.start, target, &mut unreadable)?;
        }
        self.blank_excluded(piece, buffer);
        if !unreadable.is_empty() {
            lock(&self.unreadable).append(&mut unreadable);
        }
        Ok(())
    }

    /// Hashes a piece, stores what the store lacks of it, and enters it into its table.
    fn take(&self, piece: &Piece, bytes: &[u8], worker: &mut Worker<'_>) -> Result<(), Error> {
        let table = &self.tables[piece.table];
        let hash = |region: &[u8]| if is_zero(region) { Hash::ZERO } else { Hash::of(region) };
        let hashes: Vec<Hash> = bytes.chunks(self.region_size.bytes()).map(hash).collect();
        let reference = self.reference_hashes(table, worker)?;
        let in_its_place = |at: usize| {
            let reference = reference.as_ref().and_then(|reference| reference.get(piece.first_region + at));
            reference.copied().unwrap_or(Hash::ZERO)
        };
        let changed: Vec<Changed> = (0..hashes.len())
            .map(|at| Changed { at, hash: hashes[at], in_its_place: in_its_place(at) })
            .filter(|it| !it.hash.is_zero() && it.hash != it.in_its_place)
            .collect();
        if !changed.is_empty() {
            self.store_regions(bytes, &changed, worker)?;
        }
        let mut state = lock(&table.state);
        if state.hashes.is_empty() {
            state.hashes = vec![Hash::ZERO; table.place.regions];
        }
        state.hashes[piece.first_region..][..hashes.len()].copy_from_slice(&hashes);
        state.pieces_left -= 1;
        if state.pieces_left == 0 {
            self.finish_table(piece.table, &mut state, worker)?;
        }
        drop(state);
        self.meter.advance(piece.length_bytes as u64)
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
            state.reference_hashes = Some(Arc::new(self.read_reference(table, worker)?));
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

    /// Appends those of the changed regions that the store lacks.
    fn store_regions(&self, bytes: &[u8], changed: &[Changed], worker: &mut Worker<'_>) -> Result<(), Error> {
        let wanted: Vec<Hash> = changed.iter().map(|it| it.hash).collect();
        let known = known(self.shared, self.put.guard, &mut worker.reader, Tree::Regions, &wanted)?;
        let codec = self.put.store_as.codec;
        // Asked after the look-up: what is damaged is made known before it is found no more.
        let deltas = self.put.store_as.deltas && !self.shared.damage_known();
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
            worker.batch.push(Kind::Region, codec, it.hash, plain, base);
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
                let added_bytes = self.put.object(&mut worker.reader, Kind::Table, hash, &bytes, like)?;
                self.added_bytes.fetch_add(added_bytes, Ordering::Relaxed);
            }
            hash
        };
        state.done = Some(done);
        Ok(())
    }
}

/// Tells the others when a worker panics; the scope it runs in panics after that.
struct FailOnPanic<'a, 'b>(&'a Ingest<'b>);

impl Drop for FailOnPanic<'_, '_> {
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
    /// Which of the piece.
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

/// Where a range of the mapping lies in a piece of it.
fn within(piece: &Piece, range: &Range<u64>) -> Range<usize> {
    let place = |offset_bytes: u64| usize::try_from(offset_bytes - piece.offset_bytes).unwrap_or(usize::MAX);
    place(range.start)..place(range.end)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
