//! The server of a lazy mapping: threads that handle page faults (this file), and one that fills
//! the rest (`fill.rs`). Both serve block by block (`serve.rs`); `blocks.rs` defines blocks.

use std::io;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use super::blocks::Blocks;
use super::serve::{Because, Worker};
use super::{Fill, WorkingSet};
use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::hash::Hash;
use crate::progress::Progress;
use crate::restore::Restore;
use crate::store::OpenStore;
use crate::store::pinned::Pinned;
use crate::store::read::Check;
use crate::sync::{Condvar, Mutex};
use crate::sys::missing::{Missing, Woken};
use crate::workers;

pub(super) const MISSING: u8 = 0;
pub(super) const BUSY: u8 = 1;
pub(super) const SERVED: u8 = 2;
pub(super) const SPOILED: u8 = 3;

/// Two threads handle page faults if there are two cores. More threads were not faster.
const MAX_HANDLERS: usize = 2;
/// The greatest number of blocks that are served after an accessed one while accesses are
/// sequential.
const MAX_AHEAD: usize = 16;
/// A handler that is idle for this long closes its packs.
const IDLE_SECONDS: u32 = 2;

/// Serves one mapping.
pub(super) struct Server {
    pub(super) missing: Missing,
    pub(super) tables: Vec<Table>,
    pub(super) blocks: Blocks,
    pub(super) states: Vec<AtomicU8>,
    pub(super) check: Check,
    pub(super) progress: Progress,
    pub(super) touches: Mutex<Touches>,
    pub(super) error: Mutex<Option<Arc<Error>>>,
    /// Set when the mapping is dropped.
    pub(super) stopping: AtomicBool,
    /// The kernel refused the bytes of a block that no thread accessed. The block is still missing.
    pub(super) is_refused: AtomicBool,
    /// Everything is filled, and the memory is unregistered or about to be.
    pub(super) finished: AtomicBool,
    pub(super) phase: Mutex<Phase>,
    pub(super) phase_changed: Condvar,
    /// `None` after everything is filled.
    pub(super) held: Mutex<Option<Arc<Held>>>,
}

/// The parts of the store that the threads need.
pub(super) struct Held {
    pub(super) shared: Arc<OpenStore>,
    pub(super) pinned: Pinned,
}

/// One table of the snapshot.
pub(super) struct Table {
    pub(super) hash: Hash,
    /// Read when it is needed.
    pub(super) hashes: OnceLock<Box<[Hash]>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No thread fills it.
    Unfilled,
    Filling,
    Filled,
    /// The filler failed or was stopped.
    GivenUp,
}

/// The accessed blocks.
#[derive(Default)]
pub(super) struct Touches {
    /// The working set with which it was filled.
    pub(super) before: WorkingSet,
    blocks: Vec<usize>,
    /// The blocks that were served ahead after the last access, and are not known to be accessed
    /// yet.
    ahead: Range<usize>,
}

impl Server {
    /// For a prepared restore. Reads nothing.
    pub(super) fn new(restore: Restore<'_>, missing: Missing, space: Arc<AddressSpace>) -> Server {
        let region_size = restore.pinned.record().region_size;
        let blocks = Blocks::new(space, region_size, rustix::param::page_size());
        let root = &restore.tables.root;
        let tables = (0..blocks.places().len())
            .map(|at| Table { hash: root.get(at), hashes: OnceLock::new() })
            .collect();
        let held = Held { shared: restore.shared.clone(), pinned: restore.pinned };
        Server {
            missing,
            tables,
            states: std::iter::repeat_with(AtomicU8::default).take(blocks.count()).collect(),
            blocks,
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

    /// Waits until the mapping is filled, or cannot be. If no thread fills it, the calling thread
    /// does.
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

    pub(super) fn touched(&self) -> WorkingSet {
        let touches = self.touches.lock();
        let mut working_set = touches.before.clone();
        for block in &touches.blocks {
            self.blocks.addresses(*block).for_each(|range| working_set.push(range));
        }
        working_set
    }

    /// Makes all threads end soon.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.missing.end();
    }

    /// Starts the threads. If one cannot be started, `threads` has those that were started before.
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
        if fill != Fill::OnFault {
            *self.phase.lock() = Phase::Filling;
            threads.push(start("stillframe-fill", Server::fill)?);
        }
        Ok(())
    }

    /// Runs `work`. If it panics, no thread remains waiting for it.
    fn guarded(&self, work: impl FnOnce(&Held)) {
        let Some(held) = self.held.lock().clone() else { return };
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| work(&held))) {
            self.spoil_all();
            self.set_phase(Phase::GivenUp);
            std::panic::resume_unwind(panic);
        }
    }

    /// Handles page faults until the mapping is filled or dropped.
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
                // gc may have replaced packs that the open reader still occupies.
                Ok(Woken::Time) => worker = Worker::new(held, self),
                Ok(Woken::End) => return,
                Err(source) => {
                    self.keep_error(MemoryError::Fill { offset_bytes: 0, source }.into());
                    return self.spoil_all();
                }
            }
        }
    }

    pub(super) fn answer_touch(&self, worker: &mut Worker<'_>, offset_bytes: u64) {
        let block = usize::try_from(offset_bytes).unwrap_or(usize::MAX) / self.blocks.block_bytes();
        let Some(state) = self.states.get(block) else { return };
        if state.load(Ordering::Relaxed) != MISSING {
            return self.serve(worker, block, Because::Touched);
        }
        // Recorded before it is answered: the thread may ask for the working set as soon as it
        // continues.
        let ahead = {
            let mut touches = self.touches.lock();
            let last = std::mem::take(&mut touches.ahead);
            let mut length = 1;
            if last.end == block && !last.is_empty() {
                // All blocks that were served ahead have been read.
                length = (2 * last.len()).min(MAX_AHEAD);
                touches.blocks.extend(last);
            }
            touches.blocks.push(block);
            touches.ahead = block + 1..(block + 1 + length).min(self.states.len());
            touches.ahead.clone()
        };
        self.serve(worker, block, Because::Touched);
        for block in ahead {
            // Waiting threads come first.
            if self.stopping.load(Ordering::Relaxed) || self.missing.wait(0).is_ok_and(|it| it != Woken::Time)
            {
                return;
            }
            self.serve(worker, block, Because::Filling);
        }
    }
}
