//! The memories that the engine requests: each is a [`Reservation`], which this crate finds again
//! by its address.
//!
//! ```text
//! engine ── owns ──> Linear ──┐
//!                             ├──> Reservation: addresses, content, tracking
//! Guest ── shares ────────────┘    unmapped when both are dropped
//! ```
//!
//! The engine creates memories as zeros, writes active data segments into them, and runs the start
//! function. Only then does a snapshot replace their content. So the writes of the instantiation do
//! not matter.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use stillframe::Reservation;
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

/// A reservation, used by the engine and by a guest in turns. A guest accesses it only while it has
/// the store by `&mut`, so that no WebAssembly runs and no reference to the bytes is alive.
pub(crate) type Shared = Arc<Mutex<Ours>>;

/// A memory that the engine and a guest share.
#[derive(Debug)]
pub(crate) struct Ours {
    pub(crate) memory: Reservation,
    /// A restore into it failed halfway.
    pub(crate) is_broken: bool,
}

/// The least number of bytes to reserve for a memory, so that it can grow in place: the whole range
/// of a 32-bit memory.
const LEAST_RESERVED_BYTES: usize = if cfg!(target_pointer_width = "64") { 1 << 32 } else { 0 };

/// All current memories of engines, by their address.
static MEMORIES: Mutex<BTreeMap<usize, Weak<Mutex<Ours>>>> = Mutex::new(BTreeMap::new());

/// The memory that begins at this address, if it is one of ours.
pub(crate) fn find(start: *const u8) -> Option<Shared> {
    lock(&MEMORIES).get(&start.addr()).and_then(Weak::upgrade)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the memories of an engine.
pub(crate) struct Memories;

// SAFETY: the memories keep the engine's requirements: `Reservation::new` reserves the requested
// size and the guards, all inaccessible and page-aligned; the memory is zeros; and its address
// never changes.
unsafe impl MemoryCreator for Memories {
    fn new_memory(
        &self,
        _ty: MemoryType,
        minimum: usize,
        maximum: Option<usize>,
        reserved_size_in_bytes: Option<usize>,
        guard_size_in_bytes: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        let wanted_bytes = maximum.unwrap_or(LEAST_RESERVED_BYTES).min(LEAST_RESERVED_BYTES);
        let reserved_bytes = minimum.max(wanted_bytes).max(reserved_size_in_bytes.unwrap_or(0));
        let made = Reservation::new(reserved_bytes, guard_size_in_bytes).and_then(|mut reservation| {
            reservation.set_length_bytes(minimum)?;
            Ok(reservation)
        });
        let reservation = made.map_err(|error| whole_story(&error))?;
        let start = reservation.as_ptr();
        let shared = Arc::new(Mutex::new(Ours { memory: reservation, is_broken: false }));
        lock(&MEMORIES).insert(start.addr(), Arc::downgrade(&shared));
        Ok(Box::new(Linear { shared }))
    }
}

/// One memory, as the engine has it.
struct Linear {
    shared: Shared,
}

// SAFETY: the pointer is that of a reservation, which neither moves nor is unmapped as long as this
// lives. `byte_size` bytes are accessible, and the addresses behind them, up to the reserved size
// and the guard, are not. A guest changes length and content only while it has the store by `&mut`,
// and makes the engine ask for the length again before it releases the store.
unsafe impl LinearMemory for Linear {
    fn byte_size(&self) -> usize {
        lock(&self.shared).memory.length_bytes()
    }

    fn byte_capacity(&self) -> usize {
        lock(&self.shared).memory.reserved_bytes()
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        lock(&self.shared).memory.set_length_bytes(new_size)?;
        Ok(())
    }

    fn as_ptr(&self) -> *mut u8 {
        lock(&self.shared).memory.as_ptr()
    }
}

impl Drop for Linear {
    fn drop(&mut self) {
        let start = lock(&self.shared).memory.as_ptr();
        lock(&MEMORIES).remove(&start.addr());
    }
}

/// An error and its sources, in one line.
pub(crate) fn whole_story(error: &dyn std::error::Error) -> String {
    let mut story = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        story = format!("{story}: {error}");
        source = error.source();
    }
    story
}
