//! The filler: one thread that serves every block that no thread has accessed yet.
//!
//! A block of zeros is not filled, only served when it is accessed. When all other blocks are
//! filled, the memory is unregistered, and the kernel provides zeros for absent pages.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::serve::{Because, Worker};
use super::server::{BUSY, Held, MISSING, Phase, Server};
use super::{Fill, WorkingSet};
use crate::error::Error;

impl Server {
    /// Fills everything.
    pub(super) fn fill(&self, held: &Held, order: Fill) {
        let phase = match self.fill_in_order(held, order) {
            Ok(true) if self.finish() => Phase::Filled,
            Ok(_) => Phase::GivenUp,
            Err(error) => {
                self.keep_error(error);
                Phase::GivenUp
            }
        };
        self.set_phase(phase);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        *self.phase.lock() = phase;
        self.phase_changed.notify_all();
    }

    /// Whether it reached the end. An error means that the kernel refused the bytes, or that the
    /// restore was cancelled.
    fn fill_in_order(&self, held: &Held, order: Fill) -> Result<bool, Error> {
        let mut worker = Worker::new(held, self);
        let meter = self.progress.begin(self.blocks.image_bytes() as u64);
        let mut fill = |blocks: Range<usize>| -> Result<bool, Error> {
            for block in blocks {
                if self.stopping.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                // Waiting threads come first. This thread is running already; the handlers may not
                // be. (If reading the fault fails here, it fails for the handlers too, and they
                // report it.)
                while let Ok(Some(offset_bytes)) = self.missing.next_fault() {
                    self.answer_touch(&mut worker, offset_bytes);
                }
                // If a table cannot be read, serving the block finds the same error and handles it.
                if self.states[block].load(Ordering::Acquire) == MISSING
                    && !self.is_zero(&mut worker, block).unwrap_or(false)
                {
                    self.try_serve(&mut worker, block, Because::Filling)?;
                    meter.advance(self.blocks.bytes(block).len() as u64)?;
                    // A thread that was woken may be queued behind this thread on its core.
                    std::thread::yield_now();
                }
            }
            Ok(true)
        };
        if order == Fill::WorkingSetFirst {
            match WorkingSet::of(&held.shared, held.pinned.id(), held.pinned.held().process()) {
                Ok(Some(working_set)) => {
                    for range in working_set.ranges() {
                        for blocks in self.blocks.at_addresses(*range) {
                            if !fill(blocks)? {
                                return Ok(false);
                            }
                        }
                    }
                    self.touches.lock().before = working_set;
                }
                Ok(None) => {}
                // The order is then by address alone.
                Err(error) => tracing::warn!("the working set cannot be read: {}", error.whole_story()),
            }
        }
        for (at, _) in self.tables.iter().enumerate().filter(|(_, table)| !table.hash.is_zero()) {
            if !fill(self.blocks.of_table(at))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Every block that is not zeros is filled, or another thread is filling it. Waits for these,
    /// and returns whether all succeeded.
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
            // The handlers then continue and answer with zeros, as the kernel would.
            Err(error) => tracing::warn!("a lazy mapping that is filled cannot be unregistered: {error}"),
        }
        true
    }
}
