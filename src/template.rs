//! Templates: a snapshot restored once, and mapped copy-on-write as often as wanted.
//!
//! ```text
//! snapshot ──once──> sealed memfd ──mmap, private──> instance   its own pages: what it has written
//!                         │      └──mmap, private──> instance
//!                         └─ the pages that nobody has written, shared by all
//! ```

use std::fmt;
use std::fs::File;
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::record::{Origin, SnapshotId};
use crate::restore::Restore;
use crate::source::{Attachment, CopyOut, Frozen, Memory, Source, SourceError};
use crate::store::Store;
use crate::sys::pages::Pages;
use crate::sys::process_memory;
use crate::track::{CopyOnWrite, Tracker, Untracked};
use crate::units::{AddressRange, usize_of};

/// The image of a snapshot in memory, of which [instances](Template::instance) are made.
///
/// Made by [`Store::template`] or [`Restore::into_template`]. It needs neither the store nor the snapshot any
/// more: the store may be dropped, the snapshot forgotten. Copies of it are the same template.
#[derive(Clone)]
pub struct Template {
    content: Arc<Content>,
}

struct Content {
    id: SnapshotId,
    space: AddressSpace,
    /// Sealed.
    file: File,
    length: usize,
}

/// A writable instance of a [`Template`]: private memory that begins as the snapshot.
///
/// It is read and written like any memory (`&mut instance[..]`). It takes up what it has written, in pages;
/// everything else it shares. It outlives its template and the store. A child that is forked gets a copy of
/// its own, as of all private memory.
///
/// It is a [`Source`] that knows what it has written, at no cost to whoever writes: a capture of it with
/// the snapshot it began as for a [parent](Self::parent) reads those pages alone, whatever its size. It costs what has been
/// written since the template was mapped, not since the last capture. The mappings are those of the snapshot, and what was
/// excluded from that is excluded again.
///
/// While it is captured nobody should write to it, as with [`LiveMemory`](crate::LiveMemory): who holds it by
/// `&mut` cannot, who writes by a raw pointer (a hypervisor) stands still until
/// [`Process::start_capture`](crate::Process::start_capture) returns.
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// # let memory = vec![7u8; 1 << 20];
/// let booted = store.process("vm").capture(&memory, &CaptureOptions::default())?;
/// let template = store.template(booted.id)?;
///
/// let mut vm_1 = template.instance()?;
/// let vm_2 = template.instance()?;
/// vm_1[5000] = 8;
/// assert_eq!(vm_2[5000], 7);
///
/// let options = CaptureOptions { parent: Some(vm_1.parent()), ..CaptureOptions::default() };
/// let taken = store.process("vm-1").capture(&vm_1, &options)?;
/// assert_eq!(taken.parent, Some(booted.id));
/// assert_eq!(taken.changed_regions, 1);
/// println!("{}", taken.tracking);                 // copy-on-write
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Instance {
    memory: Pages,
    content: Arc<Content>,
    tracker: Arc<CopyOnWrite>,
}

impl Store {
    /// Restores a snapshot once, to be mapped copy-on-write as often as wanted. In parts of its own
    /// [`Restore`] does the same: how to check, progress.
    ///
    /// Cost: that of a full restore, and as much memory as the snapshot has that is not zeros; zeros
    /// that an instance reads take memory too, once.
    ///
    /// # Errors
    ///
    /// As [`Store::restore`] and [`Restore::into_template`].
    pub fn template(&self, id: SnapshotId) -> Result<Template, Error> {
        self.restore(id)?.into_template()
    }
}

impl Restore<'_> {
    /// Restores the image into sealed memory, of which instances are mapped. See [`Store::template`].
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] where there is not so much memory, or not so much may be had
    /// (`RLIMIT_FSIZE`); damage.
    pub fn into_template(self) -> Result<Template, Error> {
        let bytes = self.image_bytes();
        let failed = |source| MemoryError::Mapping { bytes, source };
        let length = usize_of(bytes);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("stillframe-template", flags);
        let file = File::from(file.map_err(|error| failed(error.into()))?);
        file.set_len(bytes).map_err(failed)?;
        // Written and not mapped: where memory runs out that is an error, and not a signal.
        self.write_to(|bytes, offset_bytes| Ok(file.write_all_at(bytes, offset_bytes).map_err(failed)?))?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(|error| failed(error.into()))?;
        let content = Content { id: self.pinned.id(), space: self.tables.layout.space, file, length };
        Ok(Template { content: Arc::new(content) })
    }
}

impl Template {
    /// The snapshot.
    pub fn snapshot(&self) -> SnapshotId {
        self.content.id
    }

    /// The mappings. [`AddressSpace::captured`] tells where in an instance each of them lies.
    pub fn address_space(&self) -> &AddressSpace {
        &self.content.space
    }

    /// How many bytes an instance has.
    pub fn image_bytes(&self) -> u64 {
        self.content.length as u64
    }

    /// The image: sealed, so that it can be mapped.
    pub(crate) fn sealed_file(&self) -> &File {
        &self.content.file
    }

    /// Maps the snapshot once more. Cost: some microseconds, whatever its size, and a page for each that is
    /// written.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] where there are no more addresses (`RLIMIT_AS`) or mappings
    /// (`vm.max_map_count`, 65530 unless set).
    pub fn instance(&self) -> Result<Instance, Error> {
        let content = self.content.clone();
        let failed = |source| MemoryError::Mapping { bytes: content.length as u64, source };
        let memory = Pages::copy_of(&content.file, content.length).map_err(failed)?;
        let start = memory.as_ptr().addr() as u64;
        let tracker = Arc::new(CopyOnWrite::new(content.id, start..start + content.length as u64));
        Ok(Instance { memory, content, tracker })
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template")
            .field("snapshot", &self.content.id)
            .field("image_bytes", &self.content.length)
            .finish_non_exhaustive()
    }
}

impl Instance {
    /// The snapshot with which a capture of it is to be compared, for
    /// [`CaptureOptions::parent`](crate::CaptureOptions::parent): the last one that was taken of it, or the
    /// template's. (If that was forgotten meanwhile, any other parent will do, or none, and all is read.)
    pub fn parent(&self) -> SnapshotId {
        self.tracker.newest()
    }

    /// The mappings. [`AddressSpace::captured`] tells where in the image each of them lies.
    pub fn address_space(&self) -> &AddressSpace {
        &self.content.space
    }
}

impl Deref for Instance {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for Instance {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance")
            .field("template", &self.content.id)
            .field("length_bytes", &self.memory.len())
            .finish_non_exhaustive()
    }
}

impl Source for Instance {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        let mut next_bytes = 0;
        let starts = self.content.space.mappings().iter().map(|mapping| {
            let start = next_bytes;
            if mapping.captured {
                next_bytes += mapping.range.length_bytes();
            }
            start
        });
        Ok(Box::new(FrozenInstance { instance: self, starts: starts.collect() }))
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, Untracked> {
        Ok(self.tracker.clone())
    }
}

/// An instance during one capture.
struct FrozenInstance<'a> {
    instance: &'a Instance,
    /// Where in the image each mapping lies.
    starts: Vec<u64>,
}

impl Frozen for FrozenInstance<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.instance.content.space
    }

    fn origin(&self) -> Origin {
        Origin::Bytes
    }

    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    fn populated(&self, mapping_index: usize) -> Result<Vec<Range<u64>>, SourceError> {
        let mapping = self.instance.content.space.mappings().get(mapping_index);
        Ok(mapping.map(|mapping| 0..mapping.range.length_bytes()).into_iter().collect())
    }

    fn memory(&self) -> Memory<'_> {
        Memory::SharedUntilRelease(self)
    }

    fn release(&self) -> Duration {
        Duration::ZERO
    }
}

impl CopyOut for FrozenInstance<'_> {
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let range = offset_bytes..offset_bytes.saturating_add(buffer.len() as u64);
        self.copy_ranges(mapping_index, &[range], buffer, unreadable)
    }

    fn copy_ranges(
        &self,
        mapping_index: usize,
        ranges: &[Range<u64>],
        buffer: &mut [u8],
        _unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        // By the kernel, as somebody may write after all by a raw pointer.
        let start = self.instance.memory.as_ptr().addr() as u64 + self.starts[mapping_index];
        let address = |offset_bytes: u64| start.saturating_add(offset_bytes);
        let addresses: Vec<_> = ranges.iter().map(|range| address(range.start)..address(range.end)).collect();
        process_memory::copy_own(&addresses, buffer)
            .map_err(|source| SourceError::Memory { address: start, source })
    }
}
