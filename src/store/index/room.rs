//! Disk space for the index, and whether the files that exist may be opened.

use crate::store::error::StoreError;
use crate::sys::dir::Name;
use crate::sys::file;

/// An upper estimate of an empty database's size on the disk.
pub(super) const MIN_BYTES: u64 = 1 << 20;

/// How much disk space the index of this name takes.
pub(super) fn disk_bytes(name: &Name) -> u64 {
    name.open_dir().and_then(|dir| file::disk_bytes(&dir)).unwrap_or(0)
}

/// Logs that the index of this name is held in memory.
pub(crate) fn warn_held(name: &Name) {
    tracing::warn!(
        "no space is left to write {}: the index is held in memory, and built anew with each opening until \
         some space is free",
        name.display()
    );
}

/// Returns an error if there is too little space to open the index of this name. This must be
/// checked before sled opens it: sled writes at opening, and a database in which that failed was
/// found damaged the next time.
pub(crate) fn check_room(name: &Name) -> Result<(), StoreError> {
    // If the file system does not report free space, there is enough.
    if file::room_bytes(name.dir()).unwrap_or(u64::MAX) < MIN_BYTES + disk_bytes(name) / 16 {
        Err(StoreError::io("write", name)(std::io::ErrorKind::StorageFull.into()))
    } else {
        Ok(())
    }
}

/// Returns an error if the directory of the index has something in it that stillframe did not put
/// there and that the database would follow or change: links, files with other names elsewhere,
/// pipes. To be called before the database is opened.
pub(crate) fn check_files(name: &Name) -> Result<(), StoreError> {
    let dir = file::open_dir(name).map_err(StoreError::io("open", name))?;
    match file::stranger(&dir).map_err(StoreError::io("read", &dir))? {
        Some((stranger, what)) => {
            Err(StoreError::Index { action: "be used", detail: format!("{} is {what}", stranger.display()) })
        }
        None => Ok(()),
    }
}
