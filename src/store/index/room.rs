//! Room on the disk for the index, and whether what is there may be opened.

use crate::store::error::StoreError;
use crate::sys::dir::Name;
use crate::sys::file;

/// What an empty database takes on the disk, generously.
pub(super) const MIN_BYTES: u64 = 1 << 20;

/// How much disk the index of this name takes.
pub(super) fn disk_bytes(name: &Name) -> u64 {
    name.open_dir().and_then(|dir| file::disk_bytes(&dir)).unwrap_or(0)
}

/// Says that the index of this name is held in memory.
pub(crate) fn warn_held(name: &Name) {
    tracing::warn!(
        "no space is left to write {}: the index is held in memory, and built anew with each opening until \
         some space is free",
        name.display()
    );
}

/// An error where there is too little room to open the index of this name. To be asked before sled finds out: it
/// writes when it opens, and a database in which that failed was found damaged the next time.
pub(crate) fn check_room(name: &Name) -> Result<(), StoreError> {
    // Where the file system cannot tell, there is room.
    if file::room_bytes(name.dir()).unwrap_or(u64::MAX) < MIN_BYTES + disk_bytes(name) / 16 {
        Err(StoreError::io("write", name)(std::io::ErrorKind::StorageFull.into()))
    } else {
        Ok(())
    }
}

/// An error if there is anything in the index of this name that no stillframe has put there and the database would
/// follow or change: links, files that have names elsewhere, pipes. To be asked before it is opened.
pub(crate) fn check_files(name: &Name) -> Result<(), StoreError> {
    let dir = file::open_dir(name).map_err(StoreError::io("open", name))?;
    match file::stranger(&dir).map_err(StoreError::io("read", &dir))? {
        Some((stranger, what)) => {
            Err(StoreError::Index { action: "be used", detail: format!("{} is {what}", stranger.display()) })
        }
        None => Ok(()),
    }
}
