//! Bytes of this process as a source: a buffer, an arena, a wasm linear memory.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::{Attachment, Frozen, InPlace, Memory, Source, SourceError};
use crate::address_space::AddressSpace;
use crate::progress::Progress;
use crate::record::Origin;
use crate::track::{Tracker, Untracked};

impl Source for [u8] {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(Box::new(FrozenBytes { bytes: self, space: AddressSpace::image("", self.len() as u64) }))
    }
}

impl<const N: usize> Source for [u8; N] {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        self[..].open()
    }
}

impl Source for Vec<u8> {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        self[..].open()
    }
}

impl<S: Source + ?Sized> Source for &S {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        (**self).open()
    }

    fn open_unless_cancelled(&self, progress: &Progress) -> Result<Box<dyn Frozen + '_>, SourceError> {
        (**self).open_unless_cancelled(progress)
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, Untracked> {
        (**self).tracker()
    }
}

/// Nobody can write to it: the slice is borrowed for as long.
struct FrozenBytes<'a> {
    bytes: &'a [u8],
    space: AddressSpace,
}

impl Frozen for FrozenBytes<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn origin(&self) -> Origin {
        Origin::Bytes
    }

    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    fn populated(&self, _mapping_index: usize) -> Result<Vec<Range<u64>>, SourceError> {
        Ok(std::iter::once(0..self.bytes.len() as u64).collect())
    }

    fn memory(&self) -> Memory<'_> {
        Memory::InPlace(self)
    }

    fn release(&self) -> Duration {
        Duration::ZERO
    }
}

impl InPlace for FrozenBytes<'_> {
    fn bytes(&self, _mapping_index: usize) -> &[u8] {
        self.bytes
    }
}
