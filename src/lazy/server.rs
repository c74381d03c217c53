//! What serves a lazy mapping: threads that answer touches, and one that fills the rest.
//!
//! The image is cut into *blocks*, each as long as a region but at least a page. Mappings may begin and end
//! anywhere in the image, so a block has the bytes of one region, or of several, or parts of two.
//!
//! ```text
//! image    | mapping 0                            | mapping 1          |
//! regions  |--------|--------|--------|--------|--|--------|--------|--|
//! blocks   |--------|--------|--------|--------|--------|--------|--------|   the last one padded with zeros
//!
//! missing ──claimed──> busy ──> served       its pages are there, or were and have been thrown away since
//!                        └────> spoiled      it cannot be read: whoever touches it gets a signal
//! ```
//!
//! Whoever claims a block wakes those who wait for it when it is done; so a touch of a busy one needs
//! no other answer. A block of zeros is answered when it is touched, and not filled: when all
//! others are there the memory is unregistered, and what is not there then is zeros by itself.

use std::io;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Fill, HotSet};
use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::hash::Hash;
use crate::progress::Progress;
use crate::restore::Restore;
use crate::store::Shared;
use crate::store::error::StoreError;
use crate::store::packs::object::Kind;
use crate::store::pinned::Pinned;
use crate::store::read::{Check, Reader};
use crate::sync::{Condvar, Mutex};
use crate::sys::missing::{Missing, Woken};
use crate::table::Place;
use crate::units::{AddressRange, usize_of};
use crate::workers;

const MISSING: u8 = 0;
const BUSY: u8 = 1;
const SERVED: u8 = 2;
const SPOILED: u8 = 3;

/// More than one core serves touches at once, as far as there are cores; more were no faster.
const MAX_HANDLERS: usize = 2;
/// How many blocks are served after one that was touched, if touches came one after the other so far.
const MAX_AHEAD: usize = 16;
/// A handler that had nothing to do for so long lets go of the packs that it has open.
const IDLE_SECONDS: u32 = 2;

/// Serves one mapping.
pub(super) struct Server {
    pub(super) missing: Missing,
    pub(super) space: Arc<AddressSpace>,
    tables: Vec<Table>,
    region_bytes: usize,
    block_bytes: usize,
    image_bytes: usize,
    states: Vec<AtomicU8>,
    check: Check,
    progress: Progress,
    touches: Mutex<Touches>,
    error: Mutex<Option<Arc<Error>>>,
    /// Nobody wants it any more.
    stopping: AtomicBool,
    /// A block that nobody touched is missing still, as the kernel did not take it.
    is_refused: AtomicBool,
    /// Everything is there, and the memory unregistered or about to be.
    finished: AtomicBool,
    phase: Mutex<Phase>,
    phase_changed: Condvar,
    /// Until all is filled.
    held: Mutex<Option<Arc<Held>>>,
}

/// What the threads need of the store.
pub(super) struct Held {
    shared: Arc<Shared>,
    pinned: Pinned,
}

struct Table {
    hash: Hash,
    place: Place,
    /// Read when it is needed.
    hashes: OnceLock<Box<[Hash]>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody fills it.
    Unfilled,
    Filling,
    Filled,
    /// The filler could not go on, or was told to stop.
    GivenUp,
}

/// What was touched, by blocks.
#[derive(Default)]
struct Touches {
    /// The hot set with which it was filled.
    before: HotSet,
    blocks: Vec<usize>,
    /// What was served ahead of the last touch, and not touched yet as far as we know.
    ahead: Range<usize>,
}

/// Why a block is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Because {
    Touched,
    /// It lies after one that was touched, or it is its turn.
    Filling,
}

/// A part of one region in a block.
struct Piece {
    table: usize,
    region: usize,
    region_bytes: usize,
    in_region: Range<usize>,
    in_block: Range<usize>,
}

/// What one thread reads with.
struct Worker<'a> {
    reader: Reader<'a>,
    block: Vec<u8>,
    /// The last region of which only a part was wanted; mostly the next block wants the rest.
    region: Vec<u8>,
    region_hash: Hash,
}

impl<'a> Worker<'a> {
    fn new(held: &'a Held, server: &Server) -> Worker<'a> {
        Worker {
            reader: Reader::new(&held.shared, server.check),
            block: vec![0; server.block_bytes],
            region: Vec::new(),
            region_hash: Hash::ZERO,
        }
    }
}

impl Server {
    /// For what a restore has prepared. Reads nothing.
    pub(super) fn new(restore: Restore<'_>, missing: Missing, space: Arc<AddressSpace>) -> Server {
        let region_bytes = restore.pinned.record().region_size.bytes();
        let block_bytes = region_bytes.max(rustix::param::page_size());
        let image_bytes = usize_of(space.image_bytes());
        let places = restore.tables.layout.places.iter().enumerate();
        let root = &restore.tables.root;
        let tables =
            places.map(|(at, place)| Table { hash: root.get(at), place, hashes: OnceLock::new() }).collect();
        let blocks = image_bytes.div_ceil(block_bytes);
        let held = Held { shared: restore.shared.clone(), pinned: restore.pinned };
        Server {
            missing,
            space,
            tables,
            region_bytes,
            block_bytes,
            image_bytes,
            states: std::iter::repeat_with(AtomicU8::default).take(blocks).collect(),
            check: restore.check,
            progress: restore.progress,
            touches: Mutex::default(),
            error: Mutex::default(),
            stopping: AtomicBool::new(false),
            is_refused: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            phase: Mutex::new(Phase::Unfilled),
            phase_changed: Condvar::default(),
            held: Mutex::new(Some(Arc::new(held))),
        }
    }

    pub(super) fn is_filled(&self) -> bool {
        *self.phase.lock() == Phase::Filled
    }

    pub(super) fn error(&self) -> Option<Arc<Error>> {
        self.error.lock().clone()
    }

    /// Waits until it is filled, or cannot be. If nobody fills it, this thread does.
    pub(super) fn wait_until_filled(self: &Arc<Server>) {
        let mut phase = self.phase.lock();
        loop {
            match *phase {
                Phase::Filled | Phase::GivenUp => return,
                Phase::Filling => {
                    phase = self.phase_changed.wait(phase);
                }
                Phase::Unfilled => {
                    *phase = Phase::Filling;
                    drop(phase);
                    self.guarded(|held| self.fill(held, Fill::ByAddress));
                    phase = self.phase.lock();
                }
            }
        }
    }

    pub(super) fn touched(&self) -> HotSet {
        let touches = self.touches.lock();
        let mut hot_set = touches.before.clone();
        for block in &touches.blocks {
            let block = self.bytes(*block);
            for (image_bytes, mapping) in self.space.captured() {
                let in_image = image_bytes..image_bytes + mapping.range.length_bytes();
                let start = in_image.start.max(block.start as u64);
                let end = in_image.end.min(block.end as u64);
                let address = |at: u64| mapping.range.start() + (at - image_bytes);
                if start < end
                    && let Ok(range) = AddressRange::new(address(start), address(end))
                {
                    hot_set.push(range);
                }
            }
        }
        hot_set
    }

    /// Has all threads end soon.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.missing.end();
    }

    // ---- Threads --------------------------------------------------------------------------------

    /// Starts the threads. Those that were started before one could not be are in `threads` as well.
    pub(super) fn start(self: &Arc<Server>, fill: Fill, threads: &mut Vec<JoinHandle<()>>) -> io::Result<()> {
        let start = |name: &str, work: fn(&Server, &Held, Fill)| {
            let server = self.clone();
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || server.guarded(|held| work(&server, held, fill)))
        };
        for _ in 0..workers::cores().min(MAX_HANDLERS) {
            threads.push(start("stillframe-lazy", |server, held, _| server.handle(held))?);
        }
        if fill != Fill::OnTouch {
            *self.phase.lock() = Phase::Filling;
            threads.push(start("stillframe-fill", Server::fill)?);
        }
        Ok(())
    }

    /// Does `work`. Should it panic, who waits for it is not left waiting.
    fn guarded(&self, work: impl FnOnce(&Held)) {
        let Some(held) = self.held.lock().clone() else { return };
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| work(&held))) {
            self.spoil_all();
            self.set_phase(Phase::GivenUp);
            std::panic::resume_unwind(panic);
        }
    }

    /// Answers touches until there is nothing to answer any more.
    fn handle(&self, held: &Held) {
        let mut worker = Worker::new(held, self);
        loop {
            let answered = self.missing.next_fault().and_then(|fault| match fault {
                Some(offset_bytes) => {
                    self.answer_touch(&mut worker, offset_bytes);
                    Ok(Woken::Fault)
                }
                None => self.missing.wait(IDLE_SECONDS),
            });
            match answered {
                Ok(Woken::Fault) => {}
                // gc may have replaced the packs that the reader keeps from going away.
                Ok(Woken::Time) => worker = Worker::new(held, self),
                Ok(Woken::End) => return,
                Err(source) => {
                    self.note(MemoryError::Fill { offset_bytes: 0, source }.into());
                    return self.spoil_all();
                }
            }
        }
    }

    fn answer_touch(&self, worker: &mut Worker<'_>, offset_bytes: u64) {
        let block = usize_of(offset_bytes) / self.block_bytes;
        let Some(state) = self.states.get(block) else { return };
        if state.load(Ordering::Relaxed) != MISSING {
            return self.serve(worker, block, Because::Touched);
        }
        // Noted before it is answered: who touched it may ask for what was touched.
        let ahead = {
            let mut touches = self.touches.lock();
            let last = std::mem::take(&mut touches.ahead);
            let mut length = 1;
            if last.end == block && !last.is_empty() {
                // What was served ahead was read through.
                length = (2 * last.len()).min(MAX_AHEAD);
                touches.blocks.extend(last);
            }
            touches.blocks.push(block);
            touches.ahead = block + 1..(block + 1 + length).min(self.states.len());
            touches.ahead.clone()
        };
        self.serve(worker, block, Because::Touched);
        for block in ahead {
            // Who waits comes first.
            if self.stopping.load(Ordering::Relaxed) || self.missing.wait(0).is_ok_and(|it| it != Woken::Time)
            {
                return;
            }
            self.serve(worker, block, Because::Filling);
        }
    }

    // ---- Filling --------------------------------------------------------------------------------

    /// Fills everything.
    fn fill(&self, held: &Held, order: Fill) {
        let phase = match self.fill_in_order(held, order) {
            Ok(true) if self.finish() => Phase::Filled,
            Ok(_) => Phase::GivenUp,
            Err(error) => {
                self.note(error);
                Phase::GivenUp
            }
        };
        self.set_phase(phase);
    }

    fn set_phase(&self, phase: Phase) {
        *self.phase.lock() = phase;
        self.phase_changed.notify_all();
    }

    /// Whether it came to the end. An error means that the kernel does not take the bytes, or that it was
    /// cancelled.
    fn fill_in_order(&self, held: &Held, order: Fill) -> Result<bool, Error> {
        let mut worker = Worker::new(held, self);
        let meter = self.progress.begin(self.image_bytes as u64);
        let mut fill = |blocks: Range<usize>| -> Result<bool, Error> {
            for block in blocks {
                if self.stopping.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                // Who waits comes first, and this thread runs already, which the handlers may not. (Reading fails
                // for them as well, and they deal with that.)
                while let Ok(Some(offset_bytes)) = self.missing.next_fault() {
                    self.answer_touch(&mut worker, offset_bytes);
                }
                // A table that cannot be read is met again when the block is served.
                if self.states[block].load(Ordering::Acquire) == MISSING
                    && !self.is_zero(&mut worker, block).unwrap_or(false)
                {
                    self.try_serve(&mut worker, block, Because::Filling)?;
                    meter.advance(self.bytes(block).len() as u64)?;
                    // Who was woken may have been put behind this thread, on its core.
                    std::thread::yield_now();
                }
            }
            Ok(true)
        };
        if order == Fill::HotFirst {
            match HotSet::of(&held.shared, held.pinned.id(), held.pinned.held().process()) {
                Ok(Some(hot_set)) => {
                    for range in hot_set.ranges() {
                        for blocks in self.blocks_at(*range) {
                            if !fill(blocks)? {
                                return Ok(false);
                            }
                        }
                    }
                    self.touches.lock().before = hot_set;
                }
                Ok(None) => {}
                // Then by address alone.
                Err(error) => tracing::warn!("the hot set cannot be read: {}", error.whole_story()),
            }
        }
        for table in self.tables.iter().filter(|table| !table.hash.is_zero()) {
            let start = usize_of(table.place.image_bytes);
            if !fill(self.blocks(start..start + table.place.length_bytes))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// All that is not zeros is there, or somebody is just about it. Whether all came to a good end.
    fn finish(&self) -> bool {
        for state in &self.states {
            while state.load(Ordering::Acquire) == BUSY {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        if self.is_refused.load(Ordering::SeqCst) {
            return false;
        }
        self.finished.store(true, Ordering::SeqCst);
        match self.missing.unregister() {
            Ok(()) => {
                self.missing.end();
                *self.held.lock() = None;
            }
            // The handlers go on then, and answer with zeros as they would be.
            Err(error) => tracing::warn!("a lazy mapping that is filled cannot be unregistered: {error}"),
        }
        true
    }

    // ---- Blocks ---------------------------------------------------------------------------------

    /// The bytes of the image in a block.
    fn bytes(&self, block: usize) -> Range<usize> {
        let start = block * self.block_bytes;
        start..(start + self.block_bytes).min(self.image_bytes)
    }

    /// The pages of a block.
    fn pages(&self, block: usize) -> Range<u64> {
        let bytes = self.bytes(block);
        bytes.start as u64..(bytes.end as u64).next_multiple_of(rustix::param::page_size() as u64)
    }

    /// The blocks in which these bytes of the image lie.
    fn blocks(&self, image: Range<usize>) -> Range<usize> {
        image.start / self.block_bytes..image.end.min(self.image_bytes).div_ceil(self.block_bytes)
    }

    /// The blocks in which the bytes at these addresses lie, for each mapping.
    fn blocks_at(&self, range: AddressRange) -> impl Iterator<Item = Range<usize>> {
        self.space.captured().filter_map(move |(image_bytes, mapping)| {
            let part = mapping.range.intersection(range)?;
            let offset = |address: u64| usize::try_from(image_bytes + (address - mapping.range.start())).ok();
            Some(self.blocks(offset(part.start())?..offset(part.end())?))
        })
    }

    /// The regions of a block, or parts of them, in order.
    fn pieces(&self, block: usize) -> impl Iterator<Item = Piece> {
        let bytes = self.bytes(block);
        let mut at = bytes.start;
        let mut table =
            self.tables.partition_point(|table| table.place.image_bytes <= at as u64).wrapping_sub(1);
        std::iter::from_fn(move || {
            let Table { place, .. } = self.tables.get(table).filter(|_| at < bytes.end)?;
            let in_table = at - usize::try_from(place.image_bytes).ok()?;
            let region = in_table / self.region_bytes;
            let region_start = region * self.region_bytes;
            let region_bytes = self.region_bytes.min(place.length_bytes - region_start);
            let start = in_table - region_start;
            let length = (region_bytes - start).min(bytes.end - at);
            let in_block = at - bytes.start;
            let piece = Piece {
                table,
                region,
                region_bytes,
                in_region: start..start + length,
                in_block: in_block..in_block + length,
            };
            at += length;
            if in_table + length == place.length_bytes {
                table += 1;
            }
            Some(piece)
        })
    }

    fn hash(&self, worker: &mut Worker<'_>, piece: &Piece) -> Result<Hash, StoreError> {
        let Table { hash, place, hashes } = &self.tables[piece.table];
        if hash.is_zero() {
            return Ok(Hash::ZERO);
        }
        if let Some(hashes) = hashes.get() {
            return Ok(hashes[piece.region]);
        }
        let read = worker.reader.hashes(Kind::Table, hash, place.regions)?;
        Ok(hashes.get_or_init(|| read.into_boxed_slice())[piece.region])
    }

    fn is_zero(&self, worker: &mut Worker<'_>, block: usize) -> Result<bool, StoreError> {
        for piece in self.pieces(block) {
            if !self.hash(worker, &piece)?.is_zero() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a block into the worker's buffer. Says whether it is anything but zeros; else the buffer is not
    /// written.
    fn read(&self, worker: &mut Worker<'_>, block: usize) -> Result<bool, StoreError> {
        if self.is_zero(worker, block)? {
            return Ok(false);
        }
        for piece in self.pieces(block) {
            let hash = self.hash(worker, &piece)?;
            let target = &mut worker.block[piece.in_block.clone()];
            if hash.is_zero() {
                target.fill(0);
            } else if target.len() == piece.region_bytes {
                worker.reader.region(&hash, target)?;
            } else {
                if worker.region_hash != hash || worker.region.len() != piece.region_bytes {
                    worker.region_hash = Hash::ZERO;
                    worker.region.resize(piece.region_bytes, 0);
                    worker.reader.region(&hash, &mut worker.region)?;
                    worker.region_hash = hash;
                }
                target.copy_from_slice(&worker.region[piece.in_region]);
            }
        }
        // Behind the end of the image there are zeros.
        let length = self.bytes(block).len();
        worker.block[length..].fill(0);
        Ok(true)
    }

    // ---- Serving --------------------------------------------------------------------------------

    fn serve(&self, worker: &mut Worker<'_>, block: usize, because: Because) {
        if let Err(error) = self.try_serve(worker, block, because) {
            self.note(error);
        }
    }

    /// An error if the kernel does not take the bytes of a block that nobody touched: it is still missing then.
    fn try_serve(&self, worker: &mut Worker<'_>, block: usize, because: Because) -> Result<(), Error> {
        let Some(state) = self.states.get(block) else { return Ok(()) };
        let pages = self.pages(block);
        let claim = state.compare_exchange(MISSING, BUSY, Ordering::AcqRel, Ordering::Acquire);
        let result = match claim {
            Ok(_) => {
                let (now, result) = self.fill_block(worker, block, &pages, because);
                state.store(now, Ordering::Release);
                result
            }
            // Who has claimed it will wake all that wait.
            Err(BUSY) => return Ok(()),
            Err(found) => {
                if because == Because::Filling {
                    return Ok(());
                }
                if found == SERVED {
                    // Thrown away since, else it were there.
                    self.missing.zero(pages.clone()).unwrap_or_else(|error| self.refused(&pages, error));
                }
                Ok(())
            }
        };
        self.missing.wake(pages);
        result
    }

    fn fill_block(
        &self,
        worker: &mut Worker<'_>,
        block: usize,
        pages: &Range<u64>,
        because: Because,
    ) -> (u8, Result<(), Error>) {
        let length = usize_of(pages.end - pages.start);
        let answered = match self.read(worker, block) {
            Ok(true) => self.missing.copy(pages.start, &worker.block[..length]),
            Ok(false) => self.missing.zero(pages.clone()).map(|()| 0),
            Err(error) => {
                self.note(error.into());
                self.spoil(pages);
                return (SPOILED, Ok(()));
            }
        };
        match answered {
            // A part of it may have been filled before the kernel refused the rest.
            Ok(0) => (SERVED, Ok(())),
            Ok(_) if self.is_refused.load(Ordering::SeqCst) => (SERVED, Ok(())),
            Ok(there_bytes) => {
                let why = format!(
                    "{there_bytes} bytes of it were there before they were filled: somebody else has populated them"
                );
                self.note(
                    MemoryError::Fill { offset_bytes: pages.start, source: io::Error::other(why) }.into(),
                );
                self.close(self.missing.close_off(pages.clone()));
                (SPOILED, Ok(()))
            }
            // It is zeros then, as all else was there: of memory that is not registered any more the kernel takes
            // no answer, and needs none.
            Err(_) if self.finished.load(Ordering::SeqCst) => (SERVED, Ok(())),
            Err(source) if because == Because::Filling => {
                self.is_refused.store(true, Ordering::SeqCst);
                (MISSING, Err(MemoryError::Fill { offset_bytes: pages.start, source }.into()))
            }
            Err(error) => {
                self.refused(pages, error);
                (SPOILED, Ok(()))
            }
        }
    }

    /// The kernel does not take the answer to a touch.
    fn refused(&self, pages: &Range<u64>, source: io::Error) {
        if !self.finished.load(Ordering::SeqCst) {
            self.note(MemoryError::Fill { offset_bytes: pages.start, source }.into());
            self.spoil(pages);
        }
    }

    /// Nobody shall see these pages.
    fn spoil(&self, pages: &Range<u64>) {
        self.close(self.missing.spoil(pages.clone()));
    }

    fn close(&self, closed: io::Result<()>) {
        if let Err(error) = closed
            && !self.finished.load(Ordering::SeqCst)
        {
            // What is left would be to let somebody wait for ever, or see zeros.
            tracing::error!("memory that cannot be restored cannot be closed off either, aborting: {error}");
            std::process::abort();
        }
    }

    /// There will be no answers any more: nobody shall wait for one.
    fn spoil_all(&self) {
        for (block, state) in self.states.iter().enumerate() {
            if matches!(state.swap(SPOILED, Ordering::AcqRel), MISSING | BUSY) {
                let pages = self.pages(block);
                self.spoil(&pages);
                self.missing.wake(pages);
            }
        }
    }

    fn note(&self, error: Error) {
        let mut first = self.error.lock();
        match *first {
            None => tracing::error!("a part of a lazy mapping cannot be served: {}", story(&error)),
            Some(_) => tracing::debug!("a part of a lazy mapping cannot be served: {}", story(&error)),
        }
        first.get_or_insert(Arc::new(error));
    }
}

/// An error with its causes.
fn story(error: &Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |story, cause| format!("{story}: {cause}"))
}
