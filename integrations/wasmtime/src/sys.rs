//! The memories that the engine asks for: each is a [`Reservation`], which this crate finds again by its address.
//!
//! ```text
//! engine ── owns ──> Linear ──┐
//!                             ├──> Reservation: addresses, content, tracking
//! Guest ── shares ────────────┘    unmapped when both are gone
//! ```
//!
//! The engine creates memories as zeros and writes active data segments into them, runs the start function, and
//! only then is a snapshot put in their place. So whatever instantiation has written does not matter.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use stillframe::Reservation;
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

/// A reservation, used by the engine and by a guest in turns: a guest touches it only while it has the store by
/// `&mut`, so that no WebAssembly runs and no reference to the bytes is alive.
pub(crate) type Shared = Arc<Mutex<Ours>>;

/// A memory, whoever uses it.
#[derive(Debug)]
pub(crate) struct Ours {
    pub(crate) memory: Reservation,
    /// A restore into it has failed half-way.
    pub(crate) is_broken: bool,
}

/// What is set aside for a memory at least, so that it can grow in place: all that a 32-bit memory can have.
const LEAST_RESERVED_BYTES: usize = if cfg!(target_pointer_width = "64") { 1 << 32 } else { 0 };

/// All memories that engines have now, by their address.
static MEMORIES: Mutex<BTreeMap<usize, Weak<Mutex<Ours>>>> = Mutex::new(BTreeMap::new());

/// The memory that begins there, if it is one of ours.
pub(crate) fn find(start: *const u8) -> Option<Shared> {
    lock(&MEMORIES).get(&start.addr()).and_then(Weak::upgrade)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the memories of an engine.
pub(crate) struct Memories;

// SAFETY: what it makes keeps what is asked of a memory: `Reservation::new` sets aside what is reserved and the guards,
// all inaccessible, at a page; the memory is zeros; and it is at one address for life.
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

// SAFETY: the pointer is that of a reservation, which stays where it is and mapped as long as this lives, with so many
// bytes accessible as `byte_size` says, and behind them nothing up to what was reserved and the guard. A guest changes
// length and content only while it has the store by `&mut`, and has the engine ask for the length again before it
// lets go of it.
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

/// An error and what is behind it, in one line.
pub(crate) fn whole_story(error: &dyn std::error::Error) -> String {
    let mut story = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        story = format!("{story}: {error}");
        source = error.source();
    }
    story
}
