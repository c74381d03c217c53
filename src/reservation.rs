//! Reservations: one memory at one address for life, which grows and becomes snapshots where it is.
//!
//! ```text
//! | guard | length ········ | up to what is set aside | guard |
//!         ^ the address, known to compiled code
//!           its content:  zeros, or an image decoded into them     what is written: write protection
//!                         a template, mapped copy-on-write                          copy-on-write
//!                         an image, filled on first touch                           once it is filled
//! ```

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::lazy::{self, Fill, Filled, HotSet, Serving};
use crate::record::SnapshotId;
use crate::restore::Restore;
use crate::rollback::{RollBack, RollBackStats};
use crate::source::{Frozen, LiveMemory, Source, SourceError};
use crate::sys::missing::Missing;
use crate::sys::reserve::Addresses;
use crate::template::Template;
use crate::track::{CopyOnWrite, Tracker, Untracked};

/// Addresses of this process set aside for one memory that is used by its address: the linear memory of a
/// WebAssembly engine, a guest of a hypervisor, an arena.
///
/// It begins as zeros, grows and becomes shorter in place, and can become a snapshot in place: [decoded into
/// it](Self::restore), [filled on first touch](Self::restore_lazily), or a [template](Self::instantiate) mapped
/// copy-on-write. It is a [`Source`], and what is written to it is tracked by whatever means its content allows.
///
/// **Who uses the pointer** ([`as_ptr`](Self::as_ptr)) does so by unsafe code. While a method with `&mut self`
/// runs nobody may access the memory, and no reference to its bytes may live across one. While it is captured
/// nobody should write to it, as with [`LiveMemory`]. What lies behind its length, and the guards, is not
/// accessible: a touch is `SIGSEGV`.
///
/// ```
/// use stillframe::{CaptureOptions, Reservation, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// # let booted = vec![7u8; 1 << 20];
/// let booted = store.process("vm").capture(&booted, &CaptureOptions::default())?;
/// let template = store.template(booted.id)?;
///
/// let mut memory = Reservation::new(4 << 30, 32 << 20)?;      // addresses, which take up no memory
/// memory.instantiate(&template)?;                             // microseconds
/// memory.set_length_bytes(2 << 20)?;
/// memory.bytes_mut()[5000] = 8;
///
/// let options = CaptureOptions { parent: memory.basis(), ..CaptureOptions::default() };
/// let taken = store.process("vm-1").capture(&memory, &options)?;
/// assert_eq!((taken.parent, taken.changed_regions), (Some(booted.id), 1));
/// memory.roll_back(store.roll_back(booted.id)?)?;
/// assert_eq!((memory.length_bytes(), memory.bytes_mut()[5000]), (1 << 20, 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Reservation {
    /// What it holds besides bytes goes before the addresses do.
    content: Content,
    /// The memory as a source, without a tracker unless the content is its own.
    live: LiveMemory,
    addresses: Addresses,
}

enum Content {
    /// Private memory without a file.
    Own,
    /// A template's, and what was written.
    Instance(Arc<CopyOnWrite>),
    /// Filled on first touch.
    Lazy(Serving),
}

impl Reservation {
    /// Sets aside addresses for a memory of up to `reserved_bytes`, and `guard_bytes` more on both sides of
    /// it. Its length is 0.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] where there are no more addresses (`RLIMIT_AS`) or mappings.
    pub fn new(reserved_bytes: usize, guard_bytes: usize) -> Result<Reservation, Error> {
        let addresses = Addresses::new(reserved_bytes, guard_bytes)
            .map_err(|source| MemoryError::Mapping { bytes: reserved_bytes as u64, source })?;
        Ok(Reservation { content: Content::Own, live: LiveMemory::new(addresses.start(), 0), addresses })
    }

    /// Where it begins, for life.
    pub fn as_ptr(&self) -> *mut u8 {
        self.addresses.start()
    }

    /// How many bytes it has.
    pub fn length_bytes(&self) -> usize {
        self.addresses.length_bytes()
    }

    /// How many it can have, in whole pages.
    pub fn reserved_bytes(&self) -> usize {
        self.addresses.capacity_bytes()
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.addresses.bytes_mut()
    }

    /// Grows by zeros, or becomes shorter, and what it is shorter by is lost. What it grows by is tracked as
    /// the rest is; should the kernel refuse that, tracking ends and the growth stands.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Reserved`] if not so much is set aside; [`MemoryError::Mapping`]. Its length is as before
    /// then. For one that is being filled, and is to be shorter, the error that ends the filling.
    pub fn set_length_bytes(&mut self, length_bytes: usize) -> Result<(), Error> {
        if length_bytes == self.length_bytes() {
            return Ok(());
        }
        self.check_room(length_bytes as u64)?;
        if length_bytes < self.length_bytes() {
            self.settle()?;
        } else if let Content::Instance(_) = self.content {
            // A page that was thrown away is the template's again, also behind the end.
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

    /// From here on what is written is known, at the cost that [`LiveMemory::track_writes`] tells. An instance
    /// of a template needs no such thing, and one that is tracked already goes on as it is. If it is being filled
    /// on first touch this waits until that is done.
    ///
    /// # Errors
    ///
    /// As [`LiveMemory::track_writes`]; what could not be filled.
    pub fn track_writes(&mut self) -> Result<(), Error> {
        self.settle()?;
        if matches!(self.content, Content::Own) && self.live.tracker().is_err() {
            self.live = self.untracked().track_writes().map_err(SourceError::Track)?;
        }
        Ok(())
    }

    /// The same where it is possible. Where it is not, everything is read, and
    /// [`Capture::tracking`](crate::Capture::tracking) says why.
    ///
    /// # Errors
    ///
    /// What could not be filled.
    pub fn track_writes_if_possible(&mut self) -> Result<(), Error> {
        self.settle()?;
        if matches!(self.content, Content::Own) && self.live.tracker().err() == Some(Untracked::NoTracker) {
            self.live = self.untracked().track_writes_if_possible();
        }
        Ok(())
    }

    /// It becomes the image, decoded into it, and its length that of the image. Where the machine can, it is tracked
    /// from here on, and it is known that it is as in this snapshot.
    ///
    /// Cost: 2.8 GB/s a core for decoding, and the population of the pages; zeros cost nothing.
    ///
    /// # Errors
    ///
    /// As [`set_length_bytes`](Self::set_length_bytes); damage: then it is all zeros.
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

    /// It becomes the image, which is filled when it is touched and as `fill` says; and its length that of the
    /// image. Returns at once. [`LazyMapping`](crate::LazyMapping) tells what is to be known about such memory.
    /// Captures, rollbacks, and [tracking](Self::track_writes) wait until all is filled.
    ///
    /// Where the machine has no `userfaultfd`, or the memory is populated by the kernel before it could be filled, it is
    /// restored at once, and the answer says why.
    ///
    /// # Errors
    ///
    /// As [`set_length_bytes`](Self::set_length_bytes); where it is restored at once, as
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

    /// It becomes one more instance of a template, and its length that of the image. See
    /// [`Template::instance`] for what that is and costs: some microseconds. If it was one of the same template
    /// this throws away what was written to it.
    ///
    /// # Errors
    ///
    /// As [`set_length_bytes`](Self::set_length_bytes).
    pub fn instantiate(&mut self, template: &Template) -> Result<(), Error> {
        let length = self.check_room(template.image_bytes())?;
        self.forget_content();
        // Its own length is not touched before: that would be one more mapping.
        self.addresses.map_copy(template.sealed_file(), length).map_err(mapping_failed(length))?;
        self.live = self.untracked();
        let start = self.as_ptr().addr() as u64;
        let tracker = Arc::new(CopyOnWrite::new(template.snapshot(), start..start + length as u64));
        self.content = Content::Instance(tracker);
        Ok(())
    }

    /// It becomes what it was in a snapshot, by writing what differs, and its length that of the image. Nothing
    /// is known of it beforehand that its [tracker](Self::track_writes) does not know; afterwards it is known that
    /// it is as in this snapshot.
    ///
    /// # Errors
    ///
    /// As [`RollBack::slice`], and [`set_length_bytes`](Self::set_length_bytes). Where nothing is written it
    /// is as it was, also in its length.
    pub fn roll_back(&mut self, roll_back: RollBack<'_>) -> Result<RollBackStats, Error> {
        self.settle()?;
        let length = self.check_room(roll_back.address_space().image_bytes())?;
        let before = self.length_bytes();
        if length > before {
            self.set_length_bytes(length)?;
        } else {
            // The rest is kept until all is well.
            self.set_tracked_bytes(length);
        }
        let rolled_back = self.roll_back_bytes(roll_back, length);
        match &rolled_back {
            Ok(_) => self.set_length_bytes(length)?,
            Err(_) if length > before => self.set_length_bytes(before)?,
            Err(_) => self.set_tracked_bytes(before),
        }
        rolled_back
    }

    fn roll_back_bytes(&mut self, roll_back: RollBack<'_>, length: usize) -> Result<RollBackStats, Error> {
        let bytes = self.addresses.bytes_mut().get_mut(..length).unwrap_or_default();
        match &self.content {
            Content::Instance(tracker) => roll_back.tracked_by(&**tracker).slice(bytes),
            Content::Own | Content::Lazy(_) => roll_back.live(&self.live, bytes),
        }
    }

    /// Lets the tracker know only the first so many bytes, or all again.
    fn set_tracked_bytes(&mut self, length: usize) {
        if let Content::Instance(tracker) = &self.content {
            tracker.set_length_bytes(length as u64);
        }
        if self.live.set_length_bytes(length).is_err() {
            self.live = LiveMemory::new(self.as_ptr(), length);
        }
    }

    /// The snapshot that it is known to be like but for what was written since: the parent for the next
    /// capture ([`CaptureOptions::parent`](crate::CaptureOptions::parent)), which then costs what changed.
    pub fn basis(&self) -> Option<SnapshotId> {
        self.tracker().ok().and_then(|tracker| tracker.basis())
    }

    /// Whether all of it is there. Only one that was restored lazily may not be.
    pub fn is_filled(&self) -> bool {
        match &self.content {
            Content::Lazy(serving) => serving.is_filled(),
            _ => true,
        }
    }

    /// What was touched before it was filled: see [`LazyMapping::touched`](crate::LazyMapping::touched).
    pub fn touched(&self) -> HotSet {
        match &self.content {
            Content::Lazy(serving) => serving.touched(),
            _ => HotSet::default(),
        }
    }

    /// The first thing that could not be filled, if there was one.
    pub fn error(&self) -> Option<Arc<Error>> {
        match &self.content {
            Content::Lazy(serving) => serving.error(),
            _ => None,
        }
    }

    // ---- The content ----------------------------------------------------------------------------

    /// The length as one that fits.
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

    /// Lets go of what fills and tracks it.
    fn forget_content(&mut self) {
        self.content = Content::Own;
        self.live = self.untracked();
    }

    /// It becomes so many zeros, of which nobody knows what is written.
    fn empty(&mut self, image_bytes: u64) -> Result<(), Error> {
        let length = self.check_room(image_bytes)?;
        self.forget_content();
        let emptied = self.addresses.set_length_bytes(length).and_then(|()| self.addresses.clear());
        emptied.map_err(mapping_failed(length))?;
        self.live = self.untracked();
        Ok(())
    }

    /// Waits until it is filled; from then on it is memory of its own.
    fn settle(&mut self) -> Result<(), Error> {
        if let Content::Lazy(serving) = &self.content {
            serving.wait_until_filled().map_err(|error| MemoryError::NotFilled(error))?;
            self.forget_content();
        }
        Ok(())
    }

    /// Tracks it, and knows that it is as in snapshot `id` now.
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
            // It is read by a system call, which may not wait for what is missing.
            let address = self.as_ptr().addr() as u64;
            let unreadable =
                |error: Arc<Error>| SourceError::Memory { address, source: io::Error::other(error) };
            serving.wait_until_filled().map_err(unreadable)?;
        }
        self.live.open()
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, Untracked> {
        match &self.content {
            Content::Own => self.live.tracker(),
            Content::Instance(tracker) => Ok(tracker.clone()),
            Content::Lazy(_) => Err(Untracked::JustBegun),
        }
    }
}
