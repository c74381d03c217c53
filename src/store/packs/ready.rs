//! Makes mapped bytes of a pack ready: it reads them from the disk before they are accessed, so
//! that a disk error is an `Err` here and not a signal.

use std::ops::Range;

use crate::store::error::StoreError;
use crate::sys::map::{PackMap, Since};

/// Makes bytes of a pack ready for access.
pub(crate) fn ready(map: &PackMap, bytes: Range<usize>) -> Result<(), StoreError> {
    map.ready(bytes).map_err(StoreError::io("read", map.path()))
}

/// As [`ready`], for sequential readers: [`PackMap::ready_since`].
pub(crate) fn ready_since(map: &PackMap, bytes: Range<usize>, since: Since) -> Result<(), StoreError> {
    map.ready_since(bytes, since).map_err(StoreError::io("read", map.path()))
}
