//! Format 1: the first.
//!
//! Nothing comes before it, so this step creates a store instead of changing one: it writes the
//! FORMAT file, and with that a directory is a store.

use crate::codec::Codec;
use crate::store::error::StoreError;
use crate::store::format::Format;
use crate::store::id::StoreId;
use crate::sys::dir::Dir;
use crate::units::RegionSize;

/// Makes the directory `store` a store of format 1.
pub(crate) fn write(store: &Dir, region_size: RegionSize, codec: Codec) -> Result<(), StoreError> {
    Format { version: 1, region_size, codec, id: StoreId::new() }.write(store)
}
