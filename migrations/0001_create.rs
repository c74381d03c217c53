//! Format 1: the first.
//!
//! No format comes before it, so no step leads to it: `StoreOptions::create` creates stores of the
//! newest format. This file keeps the code that creates a store of format 1, for the tests of the
//! steps that lead from it.

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
