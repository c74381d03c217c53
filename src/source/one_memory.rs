//! A source of one memory, which has no mappings: a file, a guest's memory, what a runtime keeps itself.

use super::{Access, Attachment, CopyOut, Frozen, SourceError};
use crate::address_space::AddressSpace;
use crate::ranges::Ranges;
use crate::record::Origin;
use crate::units::AddressRange;

/// One memory, from byte 0 to its end, whose bytes can be copied out by many threads while it is open.
///
/// This is the short way to write a [`Source`](crate::source::Source): [`frozen`](Self::frozen) makes the
/// [`Frozen`] with one mapping out of it.
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// use stillframe::source::{Frozen, OneMemory, Source, SourceError};
///
/// /// Memory that a runtime keeps page by page; a page that it never wrote is zeros.
/// struct Paged(Vec<Option<Box<[u8; 4096]>>>);
///
/// impl OneMemory for Paged {
///     fn length_bytes(&self) -> u64 {
///         4096 * self.0.len() as u64
///     }
///
///     fn copy_out(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
///         for (at, byte) in (offset_bytes as usize..).zip(buffer) {
///             *byte = self.0[at / 4096].as_ref().map_or(0, |page| page[at % 4096]);
///         }
///         Ok(())
///     }
/// }
///
/// impl Source for Paged {
///     fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
///         Ok(self.frozen())
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let memory = Paged(vec![None, Some(Box::new([7; 4096])), None]);
/// let taken = store.process("paged").capture(&memory, &CaptureOptions::default())?;
/// let map = store.restore(taken.id)?.into_mapping()?;
/// assert_eq!((map.len(), map[4095], map[4096], map[8192]), (3 * 4096, 0, 7, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait OneMemory: Sync {
    /// Its length. It stays the same while it is open.
    fn length_bytes(&self) -> u64;

    /// Fills `buffer` with the bytes from `offset_bytes` on, which are inside the memory.
    ///
    /// # Errors
    ///
    /// When the source went away or was cut short meanwhile.
    fn copy_out(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError>;

    /// The name of its mapping; empty by default.
    fn name(&self) -> String {
        String::new()
    }

    /// What the record says about where the memory came from.
    fn origin(&self) -> Origin {
        Origin::Bytes
    }

    /// What is kept beside the memory, by name.
    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    /// The byte ranges that may hold anything but zeros; all of it by default.
    ///
    /// # Errors
    ///
    /// When the source went away.
    fn populated(&self) -> Result<Ranges, SourceError> {
        Ok(Ranges::from(0..self.length_bytes()))
    }

    /// It as an open source, with one mapping from address 0.
    fn frozen<'a>(self) -> Box<dyn Frozen + 'a>
    where
        Self: Sized + 'a,
    {
        let space = AddressSpace::image(self.name(), self.length_bytes());
        Box::new(FrozenOne { memory: self, space })
    }
}

impl<M: OneMemory + ?Sized> OneMemory for &M {
    fn length_bytes(&self) -> u64 {
        (**self).length_bytes()
    }

    fn copy_out(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        (**self).copy_out(offset_bytes, buffer)
    }

    fn name(&self) -> String {
        (**self).name()
    }

    fn origin(&self) -> Origin {
        (**self).origin()
    }

    fn attachments(&self) -> Vec<Attachment> {
        (**self).attachments()
    }

    fn populated(&self) -> Result<Ranges, SourceError> {
        (**self).populated()
    }
}

/// One memory during one capture.
struct FrozenOne<M> {
    memory: M,
    space: AddressSpace,
}

impl<M: OneMemory> Frozen for FrozenOne<M> {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn access(&self) -> Access<'_> {
        Access::Shared(self)
    }

    fn origin(&self) -> Origin {
        self.memory.origin()
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.memory.attachments()
    }

    fn populated(&self, _mapping_index: usize) -> Result<Ranges, SourceError> {
        self.memory.populated()
    }
}

impl<M: OneMemory> CopyOut for FrozenOne<M> {
    fn copy_out(
        &self,
        _mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        _unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        self.memory.copy_out(offset_bytes, buffer)
    }
}
