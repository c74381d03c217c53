//! Bytes of this process as a source: a buffer, an arena, a wasm linear memory.

use std::sync::Arc;

use super::{Access, Frozen, InPlace, Source, SourceError};
use crate::address_space::AddressSpace;
use crate::progress::Progress;
use crate::track::{RescanReason, Tracker};

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

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
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

    fn access(&self) -> Access<'_> {
        Access::InPlace(self)
    }
}

impl InPlace for FrozenBytes<'_> {
    fn bytes(&self, _mapping_index: usize) -> &[u8] {
        self.bytes
    }
}
