//! Making mapped bytes of a pack ready: they are read from the disk before they are used, so that an error of the disk
//! is an error here and not a signal.

use std::ops::Range;

use crate::store::error::StoreError;
use crate::sys::map::{PackMap, Since};

/// Makes bytes of a pack ready to be used.
pub(crate) fn ready(map: &PackMap, bytes: Range<usize>) -> Result<(), StoreError> {
    map.ready(bytes).map_err(StoreError::io("read", map.path()))
}

/// The same for sequential readers: [`PackMap::ready_since`].
pub(crate) fn ready_since(map: &PackMap, bytes: Range<usize>, since: Since) -> Result<(), StoreError> {
    map.ready_since(bytes, since).map_err(StoreError::io("read", map.path()))
}
