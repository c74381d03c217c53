//! Templates: a snapshot that is restored once and mapped copy-on-write any number of times. The
//! restored image is sealed (`F_SEAL_WRITE`), so nothing can change the pages that the instances
//! share.
//!
//! ```text
//! snapshot ──once──> sealed memfd ──mmap, private──> instance   its own pages: those it wrote
//!                         │      └──mmap, private──> instance
//!                         └─ the pages that no instance has written, shared by all
//! ```

use std::fmt;
use std::fs::File;
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::record::SnapshotId;
use crate::restore::Restore;
use crate::source::{Access, CopyOut, Frozen, Source, SourceError};
use crate::store::Store;
use crate::sys::pages::Pages;
use crate::sys::process_memory;
use crate::track::{CopyOnWrite, RescanReason, Tracker};
use crate::units::{AddressRange, usize_of};

/// The image of a snapshot in memory, from which [instances](Template::instance) are made.
///
/// [`Store::template`] or [`Restore::into_template`] makes it. From then on it needs neither the
/// store nor the snapshot: the store may be dropped and the snapshot forgotten. Clones are the same
/// template.
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

/// A writable instance of a [`Template`]: private memory whose initial content is the snapshot.
///
/// It is read and written like any memory (`&mut instance[..]`). It uses memory only for the pages
/// that it has written; it shares all others. It outlives its template and the store. A forked
/// child gets its own copy, as of all private memory.
///
/// It is a [`Source`] that tracks its writes through copy-on-write, at no cost to the writer. A
/// capture with its initial snapshot as the [parent](Self::parent) reads only the written pages,
/// whatever the size of the memory. The cost depends on what was written since the template was
/// mapped, not since the last capture. The mappings are those of the snapshot, and memory that the
/// snapshot excluded is excluded again.
///
/// During a capture nobody should write to it, as with [`LiveMemory`](crate::LiveMemory). The
/// borrow checker makes sure of that for access by `&mut`. Code that writes through a raw pointer
/// (a hypervisor) must be paused until [`Process::start_capture`](crate::Process::start_capture)
/// returns.
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
/// let options = CaptureOptions::new().parent(vm_1.parent());
/// let taken = store.process("vm-1").capture(&vm_1, &options)?;
/// assert_eq!(taken.parent, Some(booted.id));
/// assert_eq!(taken.changed_regions, 1);
/// println!("{}", taken.tracking); // copy-on-write
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Instance {
    memory: Pages,
    content: Arc<Content>,
    tracker: Arc<CopyOnWrite>,
}

impl Store {
    /// Restores a snapshot once, so that it can be mapped copy-on-write any number of times.
    /// [`Restore::into_template`] does the same with options: how to check, progress.
    ///
    /// Cost: that of a full restore, and as much memory as the snapshot's non-zero content. Zeros
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
    /// Restores the image into sealed memory, from which instances are mapped. See
    /// [`Store::template`].
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] if memory is short or limited (`RLIMIT_FSIZE`); damage.
    pub fn into_template(self) -> Result<Template, Error> {
        let bytes = self.image_bytes();
        let failed = |source| MemoryError::Mapping { bytes, source };
        let length = usize_of(bytes);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("stillframe-template", flags);
        let file = File::from(file.map_err(|error| failed(error.into()))?);
        file.set_len(bytes).map_err(failed)?;
        // Written and not mapped: if memory runs out, a write returns an error, but a mapping
        // raises a signal.
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

    /// The mappings. [`AddressSpace::captured`] gives the position of each of them in an instance.
    pub fn address_space(&self) -> &AddressSpace {
        &self.content.space
    }

    /// The size of an instance.
    pub fn image_bytes(&self) -> u64 {
        self.content.length as u64
    }

    /// The image: sealed, so that it can be mapped.
    pub(crate) fn sealed_file(&self) -> &File {
        &self.content.file
    }

    /// Maps the snapshot once more. Cost: some microseconds for any size (AMD EPYC, 2 cores), and
    /// one page for each page that is written.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] if the address space (`RLIMIT_AS`) or the number of mappings
    /// (`vm.max_map_count`, 65,530 by default) is exhausted.
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
    /// The snapshot to compare the next capture with, for
    /// [`CaptureOptions::parent`](crate::CaptureOptions::parent): the last capture of this
    /// instance, or the template's snapshot. (If that was forgotten meanwhile, use any other parent
    /// or none; then everything is read.)
    pub fn parent(&self) -> SnapshotId {
        self.tracker.newest()
    }

    /// The mappings. [`AddressSpace::captured`] gives the position of each of them in the image.
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

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        Ok(self.tracker.clone())
    }
}

/// An instance during one capture.
struct FrozenInstance<'a> {
    instance: &'a Instance,
    /// The position of each mapping in the image.
    starts: Vec<u64>,
}

impl Frozen for FrozenInstance<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.instance.content.space
    }

    fn access(&self) -> Access<'_> {
        Access::SharedUntilRelease(self)
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
        // The kernel reads the bytes, because other code may still write through a raw pointer.
        let start = self.instance.memory.as_ptr().addr() as u64 + self.starts[mapping_index];
        let address = |offset_bytes: u64| start.saturating_add(offset_bytes);
        let addresses: Vec<_> = ranges.iter().map(|range| address(range.start)..address(range.end)).collect();
        process_memory::copy_own(&addresses, buffer)
            .map_err(|source| SourceError::Memory { address: start, source })
    }
}
