//! Serving one block: it is claimed, read, checked, and given to the kernel.
//!
//! ```text
//! missing ──claimed──> busy ──> served       its pages are there, or were and have been thrown away since
//!                        └────> spoiled      it cannot be read: a thread that accesses it gets a signal
//! ```
//!
//! The thread that claims a block wakes those that wait for it when it is done; so a page fault in a busy one needs
//! no other answer.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::blocks::BlockPart;
use super::server::{BUSY, Held, MISSING, SERVED, SPOILED, Server, Table};
use crate::error::{Error, MemoryError};
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::store::read::Reader;

/// Why a block is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Because {
    Touched,
    /// It lies after one that was touched, or it is its turn.
    Filling,
}

/// What one thread reads with.
pub(super) struct Worker<'a> {
    reader: Reader<'a>,
    block: Vec<u8>,
    /// The last region of which only a part was wanted; mostly the next block wants the rest.
    region: Vec<u8>,
    region_hash: Hash,
}

impl<'a> Worker<'a> {
    pub(super) fn new(held: &'a Held, server: &Server) -> Worker<'a> {
        Worker {
            reader: Reader::new(&held.shared, server.check),
            block: vec![0; server.blocks.block_bytes()],
            region: Vec::new(),
            region_hash: Hash::ZERO,
        }
    }
}

impl Server {
    pub(super) fn serve(&self, worker: &mut Worker<'_>, block: usize, because: Because) {
        if let Err(error) = self.try_serve(worker, block, because) {
            self.keep_error(error);
        }
    }

    /// An error if the kernel does not take the bytes of a block that nobody touched: it is still missing then.
    pub(super) fn try_serve(
        &self,
        worker: &mut Worker<'_>,
        block: usize,
        because: Because,
    ) -> Result<(), Error> {
        let Some(state) = self.states.get(block) else { return Ok(()) };
        let pages = self.blocks.pages(block);
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
        let length = usize::try_from(pages.end - pages.start).unwrap_or(usize::MAX);
        let answered = match self.read(worker, block) {
            Ok(true) => self.missing.copy(pages.start, &worker.block[..length]),
            Ok(false) => self.missing.zero(pages.clone()).map(|()| 0),
            Err(error) => {
                self.keep_error(error.into());
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
                    "{there_bytes} bytes of it were there before they were filled: another thread or process \
                     has populated them"
                );
                self.keep_error(
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
            self.keep_error(MemoryError::Fill { offset_bytes: pages.start, source }.into());
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
    pub(super) fn spoil_all(&self) {
        for (block, state) in self.states.iter().enumerate() {
            if matches!(state.swap(SPOILED, Ordering::AcqRel), MISSING | BUSY) {
                let pages = self.blocks.pages(block);
                self.spoil(&pages);
                self.missing.wake(pages);
            }
        }
    }

    pub(super) fn keep_error(&self, error: Error) {
        let mut first = self.error.lock();
        match *first {
            None => tracing::error!("a part of a lazy mapping cannot be served: {}", story(&error)),
            Some(_) => tracing::debug!("a part of a lazy mapping cannot be served: {}", story(&error)),
        }
        first.get_or_insert(Arc::new(error));
    }

    fn hash(&self, worker: &mut Worker<'_>, part: &BlockPart) -> Result<Hash, StoreError> {
        let Table { hash, hashes } = &self.tables[part.table];
        if hash.is_zero() {
            return Ok(Hash::ZERO);
        }
        if let Some(hashes) = hashes.get() {
            return Ok(hashes[part.region]);
        }
        let read = worker.reader.hashes(ObjectKind::Table, hash, self.blocks.places()[part.table].regions)?;
        Ok(hashes.get_or_init(|| read.into_boxed_slice())[part.region])
    }

    pub(super) fn is_zero(&self, worker: &mut Worker<'_>, block: usize) -> Result<bool, StoreError> {
        for part in self.blocks.parts(block) {
            if !self.hash(worker, &part)?.is_zero() {
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
        for part in self.blocks.parts(block) {
            let hash = self.hash(worker, &part)?;
            let target = &mut worker.block[part.in_block.clone()];
            if hash.is_zero() {
                target.fill(0);
            } else if target.len() == part.region_bytes {
                worker.reader.region(&hash, target)?;
            } else {
                if worker.region_hash != hash || worker.region.len() != part.region_bytes {
                    worker.region_hash = Hash::ZERO;
                    worker.region.resize(part.region_bytes, 0);
                    worker.reader.region(&hash, &mut worker.region)?;
                    worker.region_hash = hash;
                }
                target.copy_from_slice(&worker.region[part.in_region]);
            }
        }
        // Behind the end of the image there are zeros.
        let length = self.blocks.bytes(block).len();
        worker.block[length..].fill(0);
        Ok(true)
    }
}

/// An error with its causes.
fn story(error: &Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |story, cause| format!("{story}: {cause}"))
}
