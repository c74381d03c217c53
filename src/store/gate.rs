//! The gate between captures and gc: gc never drops an object that a running capture refers to.
//!
//! A capture that finds a region in the store only records a reference to it. Until the capture's
//! record is durable, no snapshot shows that the region is needed. Therefore:
//!
//! - A capture *pins* a hash before it looks the hash up; it does both inside the gate. It pins its
//!   parent as a whole, because it does not look up regions that equal the parent's. A reader pins
//!   its snapshot too.
//! - Objects that are appended after gc began lie past its *horizon* and are kept.
//! - While gc marks, it takes over each pin that is released.
//! - At the end of marking, gc closes the gate for a moment. If there are pinned snapshots that it
//!   has not marked, it opens the gate, marks them and tries again. Otherwise it adds the pinned
//!   hashes and publishes what is *condemned*. From then on a look-up of a condemned hash finds
//!   nothing, and the capture stores the region again, past the horizon.
//!
//! docs/design.md shows why no needed object is lost. tests/store/gc_model.rs tries every order of
//! the steps, and must be changed together with this file.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, MutexGuard};

use super::held::Held;
use super::marks::Marks;
use super::packs::location::Position;
use super::tree::Tree;
use crate::hash::Hash;
use crate::record::SnapshotId;
use crate::sync::{Condvar, Mutex, RwLock};
use crate::sys::fork::ProcessId;

#[derive(Default)]
pub(crate) struct Gate {
    condemned: RwLock<Option<Arc<Condemned>>>,
    pins: Mutex<Pins>,
    /// The process that opened the store. In a process forked from it, a lock may be held by a
    /// thread that does not exist.
    process: ProcessId,
    /// Notified when a capture ends, and when captures may begin again.
    captures_changed: Condvar,
}

#[derive(Default)]
struct Pins {
    next_capture: u64,
    /// For each running capture, the first 64 bits of every hash that it has looked up.
    captures: HashMap<u64, Vec<u64>>,
    /// Whether new captures must wait.
    captures_held: bool,
    /// How often each snapshot is pinned, and its record, which gc may remove from the catalog.
    snapshots: HashMap<SnapshotId, (usize, Held)>,
    /// While gc marks: the pins that were released in the meantime.
    handed_over: Option<HandedOver>,
}

#[derive(Default)]
struct HandedOver {
    prefixes: Vec<u64>,
    snapshots: HashMap<SnapshotId, Held>,
}

/// What gc is about to drop: all unmarked objects before the horizon.
pub(crate) struct Condemned {
    pub(crate) horizon: Position,
    pub(crate) regions: Marks,
    pub(crate) objects: Marks,
}

impl Condemned {
    /// Whether nothing may refer to the object any more.
    pub(crate) fn contains(&self, tree: Tree, hash: &Hash, at: impl Into<Position>) -> bool {
        let marks = match tree {
            Tree::Regions => &self.regions,
            Tree::Objects => &self.objects,
        };
        at.into() < self.horizon && !marks.is_marked(hash)
    }
}

/// Pinned snapshots that are not marked yet, and what would have been condemned.
type Unmarked = Box<(Condemned, Vec<(SnapshotId, Held)>)>;

/// A running capture. Dropping this releases its pins.
pub(crate) struct CaptureGuard {
    gate: Arc<Gate>,
    number: u64,
}

/// A snapshot that is open for reading. gc keeps it until this is dropped.
pub(crate) struct SnapshotGuard {
    gate: Arc<Gate>,
    id: SnapshotId,
}

/// No capture runs while this exists.
pub(crate) struct HeldCaptures<'a> {
    gate: &'a Gate,
}

impl Gate {
    fn pins(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock()
    }

    /// Begins a capture.
    pub(crate) fn begin_capture(self: &Arc<Self>) -> CaptureGuard {
        let mut pins = self.pins();
        while pins.captures_held {
            pins = self.captures_changed.wait(pins);
        }
        let number = pins.next_capture;
        pins.next_capture += 1;
        pins.captures.insert(number, Vec::new());
        drop(pins);
        CaptureGuard { gate: self.clone(), number }
    }

    /// Waits for all captures to end. No capture begins until the returned value is dropped.
    pub(crate) fn hold_captures(&self) -> HeldCaptures<'_> {
        let mut pins = self.pins();
        pins.captures_held = true;
        while !pins.captures.is_empty() {
            pins = self.captures_changed.wait(pins);
        }
        HeldCaptures { gate: self }
    }

    /// The snapshots that are open for reading.
    pub(crate) fn pinned_snapshots(&self) -> Vec<SnapshotId> {
        self.pins().snapshots.keys().copied().collect()
    }

    /// Pins a snapshot, so that gc keeps it. It must be live, and must not be forgotten during the
    /// call.
    pub(crate) fn pin_snapshot(self: &Arc<Self>, id: SnapshotId, record: Held) -> SnapshotGuard {
        self.pins().snapshots.entry(id).or_insert((0, record)).0 += 1;
        SnapshotGuard { gate: self.clone(), id }
    }

    /// Called by gc: from here on, gc takes over pins that are released.
    pub(crate) fn begin_gc(&self) {
        self.pins().handed_over = Some(HandedOver::default());
    }

    /// Called by gc: adds all pins to the marks and publishes what is condemned. If there are
    /// pinned snapshots that are not in `marked`, it publishes nothing and returns them.
    pub(crate) fn condemn(
        &self,
        mut condemned: Condemned,
        marked: &HashSet<SnapshotId>,
    ) -> Result<Arc<Condemned>, Unmarked> {
        let mut published = self.condemned.write();
        let pins = &mut *self.pins();
        let gone = pins.handed_over.get_or_insert_default().snapshots.iter();
        let held = pins.snapshots.iter().map(|(id, (_, record))| (id, record));
        let unmarked: Vec<_> = gone
            .chain(held)
            .filter(|(id, _)| !marked.contains(id))
            .map(|(id, record)| (*id, record.clone()))
            .collect();
        if !unmarked.is_empty() {
            return Err(Box::new((condemned, unmarked)));
        }
        let handed_over = pins.handed_over.take().unwrap_or_default();
        let running = pins.captures.values().flatten();
        for prefix in running.chain(&handed_over.prefixes) {
            condemned.regions.mark_prefix(*prefix);
            condemned.objects.mark_prefix(*prefix);
        }
        let condemned = Arc::new(condemned);
        *published = Some(condemned.clone());
        Ok(condemned)
    }

    /// Called by gc when everything condemned is dropped, or when gc gave up.
    pub(crate) fn end_gc(&self) {
        *self.condemned.write() = None;
        self.pins().handed_over = None;
    }
}

impl CaptureGuard {
    /// Pins `hashes`, then looks them up with `look_up`, which receives what gc has condemned.
    pub(crate) fn pin_and<T>(&self, hashes: &[Hash], look_up: impl FnOnce(Option<&Condemned>) -> T) -> T {
        let condemned = self.gate.condemned.read();
        if let Some(prefixes) = self.gate.pins().captures.get_mut(&self.number) {
            prefixes.extend(hashes.iter().map(Hash::prefix));
        }
        look_up(condemned.as_deref())
    }
}

impl Drop for HeldCaptures<'_> {
    fn drop(&mut self) {
        self.gate.pins().captures_held = false;
        self.gate.captures_changed.notify_all();
    }
}

impl Drop for CaptureGuard {
    fn drop(&mut self) {
        if !self.gate.process.is_this() {
            return;
        }
        let mut pins = self.gate.pins();
        if let Some(prefixes) = pins.captures.remove(&self.number)
            && let Some(handed_over) = &mut pins.handed_over
        {
            handed_over.prefixes.extend(prefixes);
        }
        drop(pins);
        self.gate.captures_changed.notify_all();
    }
}

impl Drop for SnapshotGuard {
    fn drop(&mut self) {
        if !self.gate.process.is_this() {
            return;
        }
        let mut pins = self.gate.pins();
        let Some((count, record)) = pins.snapshots.get_mut(&self.id) else { return };
        *count -= 1;
        if *count == 0 {
            let record = record.clone();
            pins.snapshots.remove(&self.id);
            if let Some(handed_over) = &mut pins.handed_over {
                handed_over.snapshots.insert(self.id, record);
            }
        }
    }
}
