//! Reservations: one memory at one fixed address, which grows and becomes snapshots in place.
//! Compiled code may keep the address: only the content is replaced.
//!
//! ```text
//! | guard | length ········ | up to the reserved size | guard |
//!         ^ the address, known to compiled code
//!           its content:  zeros, or an image decoded into them     tracked by:  write protection
//!                         a template, mapped copy-on-write                    copy-on-write
//!                         an image, filled at page faults                     once it is filled
//! ```

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::lazy::{self, Fill, Filled, Serving, WorkingSet};
use crate::record::SnapshotId;
use crate::restore::Restore;
use crate::rollback::{Rollback, RollbackStats};
use crate::source::{Frozen, LiveMemory, Source, SourceError};
use crate::sys::missing::Missing;
use crate::sys::reserve::Addresses;
use crate::template::Template;
use crate::track::{CopyOnWrite, RescanReason, Tracker};

/// Addresses of this process that are reserved for one memory whose address must not change: the
/// linear memory of a WebAssembly engine, a guest of a hypervisor, an arena.
///
/// It begins as zeros, grows and shrinks in place, and can become a snapshot in place: [decoded
/// into it](Self::restore), [filled at page faults](Self::restore_lazily), or a
/// [template](Self::instantiate) mapped copy-on-write. It is a [`Source`]. Its dirty memory is
/// tracked by the method that suits its content.
///
/// **Using the pointer** ([`as_ptr`](Self::as_ptr)) needs unsafe code. While a method with
/// `&mut self` runs, nobody may access the memory, and no reference to its bytes may live across
/// the call. During a capture nobody should write to it, as with [`LiveMemory`]. The addresses
/// behind its length and the guards are inaccessible: an access raises `SIGSEGV`.
///
/// ```
/// use stillframe::{CaptureOptions, Reservation, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// # let booted = vec![7u8; 1 << 20];
/// let booted = store.process("vm").capture(&booted, &CaptureOptions::default())?;
/// let template = store.template(booted.id)?;
///
/// let mut memory = Reservation::new(4 << 30, 32 << 20)?;      // only addresses, no memory
/// memory.instantiate(&template)?;                             // microseconds
/// memory.set_length_bytes(2 << 20)?;
/// memory.bytes_mut()[5000] = 8;
///
/// let options = CaptureOptions::new().parent(memory.basis());
/// let taken = store.process("vm-1").capture(&memory, &options)?;
/// assert_eq!((taken.parent, taken.changed_regions), (Some(booted.id), 1));
/// memory.rollback(store.rollback(booted.id)?)?;
/// assert_eq!((memory.length_bytes(), memory.bytes_mut()[5000]), (1 << 20, 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Reservation {
    /// This is dropped before the addresses.
    content: Content,
    /// The memory as a source. It has a tracker only if the content is `Own`.
    live: LiveMemory,
    addresses: Addresses,
}

enum Content {
    /// Private memory without a file.
    Own,
    /// The memory of a template, and the pages written since.
    Instance(Arc<CopyOnWrite>),
    /// Filled at page faults.
    Lazy(Serving),
}

impl Reservation {
    /// Reserves addresses for a memory of up to `reserved_bytes`, with `guard_bytes` more on both
    /// sides. Its length is 0.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] if the address space (`RLIMIT_AS`) or the number of mappings is
    /// exhausted.
    pub fn new(reserved_bytes: usize, guard_bytes: usize) -> Result<Reservation, Error> {
        let addresses = Addresses::new(reserved_bytes, guard_bytes)
            .map_err(|source| MemoryError::Mapping { bytes: reserved_bytes as u64, source })?;
        Ok(Reservation { content: Content::Own, live: LiveMemory::new(addresses.start(), 0), addresses })
    }

    /// Its address, which never changes.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addresses.start()
    }

    /// Its length.
    pub fn length_bytes(&self) -> usize {
        self.addresses.length_bytes()
    }

    /// The greatest possible length, in whole pages.
    pub fn reserved_bytes(&self) -> usize {
        self.addresses.capacity_bytes()
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.addresses.bytes_mut()
    }

    /// Extends the memory with zeros, or truncates it and discards the rest. New memory is tracked
    /// like the rest; if the kernel refuses that, tracking ends and the memory still grows.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Reserved`] if not enough is reserved; [`MemoryError::Mapping`]. The length is
    /// unchanged then. If the memory is still being filled and this shrinks it: the error that
    /// ended the filling.
    pub fn set_length_bytes(&mut self, length_bytes: usize) -> Result<(), Error> {
        if length_bytes == self.length_bytes() {
            return Ok(());
        }
        self.check_room(length_bytes as u64)?;
        if length_bytes < self.length_bytes() {
            self.settle()?;
        } else if let Content::Instance(_) = self.content {
            // A page that was discarded holds the template's bytes again, also behind the end.
            self.addresses.clear_behind();
        }
        self.addresses.set_length_bytes(length_bytes).map_err(mapping_failed(length_bytes))?;
        match &self.content {
            Content::Own => {
                if let Err(error) = self.live.set_length_bytes(length_bytes) {
                    tracing::warn!("a memory that grew cannot be tracked any more: {error}");
                    self.live = self.untracked();
                }
            }
            Content::Instance(tracker) => {
                tracker.set_length_bytes(length_bytes as u64);
                self.live = self.untracked();
            }
            Content::Lazy(_) => self.live = self.untracked(),
        }
        Ok(())
    }

    /// Tracks writes from now on, at the cost that [`LiveMemory::track_writes`] describes. An
    /// instance of a template does not need it, and memory that is tracked already stays tracked.
    /// If the memory is being filled at page faults, this waits until it is filled.
    ///
    /// # Errors
    ///
    /// As [`LiveMemory::track_writes`]; the first error in filling.
    pub fn track_writes(&mut self) -> Result<(), Error> {
        self.settle()?;
        if matches!(self.content, Content::Own) && self.live.tracker().is_err() {
            self.live = self.untracked().track_writes().map_err(SourceError::Track)?;
        }
        Ok(())
    }

    /// The same where it is possible. Where it is not, captures read the whole memory, and
    /// [`CaptureStats::tracking`](crate::CaptureStats::tracking) says why.
    ///
    /// # Errors
    ///
    /// The first error in filling.
    pub fn track_writes_if_possible(&mut self) -> Result<(), Error> {
        self.settle()?;
        if matches!(self.content, Content::Own) && self.live.tracker().err() == Some(RescanReason::NoTracker)
        {
            self.live = self.untracked().track_writes_if_possible();
        }
        Ok(())
    }

    /// Decodes the image into the memory; its length becomes that of the image. If the machine can,
    /// writes are tracked from then on, with this snapshot as the [basis](Self::basis).
    ///
    /// Cost: 2.8 GB/s a core for decoding (AMD EPYC, 2 cores), plus populating the pages; zeros
    /// cost nothing.
    ///
    /// # Errors
    ///
    /// As [`set_length_bytes`](Self::set_length_bytes); damage, after which the memory is all
    /// zeros.
    pub fn restore(&mut self, restore: Restore<'_>) -> Result<(), Error> {
        restore.shared.check_process()?;
        let id = restore.pinned.id();
        self.empty(restore.image_bytes())?;
        self.addresses.prefer_huge_pages();
        if let Err(error) = restore.fill(self.addresses.bytes_mut(), false) {
            self.addresses.clear().map_err(mapping_failed(self.length_bytes()))?;
            return Err(error);
        }
        self.track_since(id);
        Ok(())
    }

    /// Turns the memory into the image, which is filled at page faults and as `fill` says; its
    /// length becomes that of the image. Returns at once. [`LazyMapping`](crate::lazy::LazyMapping)
    /// documents such memory. Captures, rollbacks, and [tracking](Self::track_writes) wait until
    /// all is filled.
    ///
    /// If the machine has no `userfaultfd`, or if the kernel populates the memory before it can be
    /// filled, this restores everything at once, and the returned value says why.
    ///
    /// # Errors
    ///
    /// As [`set_length_bytes`](Self::set_length_bytes); if everything is restored at once, as
    /// [`restore`](Self::restore).
    pub fn restore_lazily(&mut self, restore: Restore<'_>, fill: Fill) -> Result<Filled, Error> {
        restore.shared.check_process()?;
        let bytes = restore.image_bytes();
        let length = self.check_room(bytes)?;
        self.forget_content();
        let missing = Missing::open().and_then(|missing| self.addresses.map_missing(missing, length));
        let missing = match missing {
            Ok(missing) => missing,
            Err(error) => {
                let why = lazy::why_at_once(bytes, &error);
                self.restore(restore)?;
                return Ok(Filled::AtOnce(why));
            }
        };
        self.live = self.untracked();
        let space = Arc::new(restore.address_space().clone());
        let serving = Serving::start(restore, missing, space, fill)
            .map_err(|source| MemoryError::Mapping { bytes, source })?;
        self.content = Content::Lazy(serving);
        Ok(Filled::Lazily)
    }

    /// Turns the memory into one more instance of a template; its length becomes that of the image.
    /// See [`Template::instance`] for what an instance is and costs: some microseconds (AMD EPYC, 2
    /// cores). If it was an instance of the same template already, this discards what was written
    /// to it.
    ///
    /// # Errors
    ///
    /// As [`set_length_bytes`](Self::set_length_bytes).
    pub fn instantiate(&mut self, template: &Template) -> Result<(), Error> {
        let length = self.check_room(template.image_bytes())?;
        self.forget_content();
        // The old length is not changed first: that would cost one more mapping.
        self.addresses.map_copy(template.sealed_file(), length).map_err(mapping_failed(length))?;
        self.live = self.untracked();
        let start = self.as_ptr().addr() as u64;
        let tracker = Arc::new(CopyOnWrite::new(template.snapshot(), start..start + length as u64));
        self.content = Content::Instance(tracker);
        Ok(())
    }

    /// Rolls the memory back to a snapshot by writing the bytes that differ; its length becomes
    /// that of the image. Beforehand only its [tracker](Self::track_writes) knows what is dirty;
    /// afterwards this snapshot is its [basis](Self::basis).
    ///
    /// # Errors
    ///
    /// As [`Rollback::slice`], and [`set_length_bytes`](Self::set_length_bytes). If nothing was
    /// written, the memory and its length are unchanged.
    pub fn rollback(&mut self, rollback: Rollback<'_>) -> Result<RollbackStats, Error> {
        self.settle()?;
        let length = self.check_room(rollback.address_space().image_bytes())?;
        let before = self.length_bytes();
        if length > before {
            self.set_length_bytes(length)?;
        } else {
            // The rest is kept until the rollback has succeeded.
            self.set_tracked_bytes(length);
        }
        let rolled_back = self.roll_back_bytes(rollback, length);
        match &rolled_back {
            Ok(_) => self.set_length_bytes(length)?,
            Err(_) if length > before => self.set_length_bytes(before)?,
            Err(_) => self.set_tracked_bytes(before),
        }
        rolled_back
    }

    fn roll_back_bytes(&mut self, rollback: Rollback<'_>, length: usize) -> Result<RollbackStats, Error> {
        let bytes = self.addresses.bytes_mut().get_mut(..length).unwrap_or_default();
        match &self.content {
            Content::Instance(tracker) => rollback.tracked_by(&**tracker).slice(bytes),
            Content::Own | Content::Lazy(_) => rollback.live(&self.live, bytes),
        }
    }

    /// Restricts the tracker to this many bytes from the start, or extends it to all bytes again.
    fn set_tracked_bytes(&mut self, length: usize) {
        if let Content::Instance(tracker) = &self.content {
            tracker.set_length_bytes(length as u64);
        }
        if self.live.set_length_bytes(length).is_err() {
            self.live = LiveMemory::new(self.as_ptr(), length);
        }
    }

    /// The snapshot that the memory equals, except for writes that are tracked since. Use it as the
    /// parent of the next capture ([`CaptureOptions::parent`](crate::CaptureOptions::parent)),
    /// which then costs only what changed.
    pub fn basis(&self) -> Option<SnapshotId> {
        self.tracker().ok().and_then(|tracker| tracker.basis())
    }

    /// Whether all of it is filled. Only memory that was restored lazily may be incomplete.
    pub fn is_filled(&self) -> bool {
        match &self.content {
            Content::Lazy(serving) => serving.is_filled(),
            _ => true,
        }
    }

    /// The working set: the memory that was accessed before it was filled. See
    /// [`LazyMapping::touched`](crate::lazy::LazyMapping::touched).
    pub fn touched(&self) -> WorkingSet {
        match &self.content {
            Content::Lazy(serving) => serving.touched(),
            _ => WorkingSet::default(),
        }
    }

    /// The first error in filling, if there was one.
    pub fn error(&self) -> Option<Arc<Error>> {
        match &self.content {
            Content::Lazy(serving) => serving.error(),
            _ => None,
        }
    }

    // ---- The content ----------------------------------------------------------------------------

    /// The wanted length, if it fits.
    fn check_room(&self, wanted_bytes: u64) -> Result<usize, MemoryError> {
        let reserved_bytes = self.reserved_bytes() as u64;
        match usize::try_from(wanted_bytes) {
            Ok(wanted) if wanted_bytes <= reserved_bytes => Ok(wanted),
            _ => Err(MemoryError::Reserved { wanted_bytes, reserved_bytes }),
        }
    }

    fn untracked(&self) -> LiveMemory {
        LiveMemory::new(self.as_ptr(), self.length_bytes())
    }

    /// Drops everything that fills and tracks the memory.
    fn forget_content(&mut self) {
        self.content = Content::Own;
        self.live = self.untracked();
    }

    /// Turns the memory into zeros of the image's length, without a tracker.
    fn empty(&mut self, image_bytes: u64) -> Result<(), Error> {
        let length = self.check_room(image_bytes)?;
        self.forget_content();
        let emptied = self.addresses.set_length_bytes(length).and_then(|()| self.addresses.clear());
        emptied.map_err(mapping_failed(length))?;
        self.live = self.untracked();
        Ok(())
    }

    /// Waits until it is filled; from then on its content is `Own`.
    fn settle(&mut self) -> Result<(), Error> {
        if let Content::Lazy(serving) = &self.content {
            serving.wait_until_filled().map_err(|error| MemoryError::NotFilled(error))?;
            self.forget_content();
        }
        Ok(())
    }

    /// Tracks writes from now on, with snapshot `id` as the basis.
    fn track_since(&mut self, id: SnapshotId) {
        self.live = self.untracked().track_writes_if_possible();
        let space = AddressSpace::image("", self.length_bytes() as u64);
        if let Ok(tracker) = self.live.tracker()
            && let Ok(taken) = tracker.take(&space, None)
        {
            tracker.committed(taken.number, id);
        }
    }
}

fn mapping_failed(length: usize) -> impl FnOnce(io::Error) -> MemoryError {
    move |source| MemoryError::Mapping { bytes: length as u64, source }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("address", &self.as_ptr())
            .field("length_bytes", &self.length_bytes())
            .field("reserved_bytes", &self.reserved_bytes())
            .finish_non_exhaustive()
    }
}

impl Source for Reservation {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        if let Content::Lazy(serving) = &self.content {
            // A system call reads it and must not wait for missing pages.
            let address = self.as_ptr().addr() as u64;
            let unreadable =
                |error: Arc<Error>| SourceError::Memory { address, source: io::Error::other(error) };
            serving.wait_until_filled().map_err(unreadable)?;
        }
        self.live.open()
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        match &self.content {
            Content::Own => self.live.tracker(),
            Content::Instance(tracker) => Ok(tracker.clone()),
            Content::Lazy(_) => Err(RescanReason::JustBegun),
        }
    }
}
