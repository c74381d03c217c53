//! The directory of a store. It is opened before anything in it is read.
//!
//! Another user may have made the directory. So each file in it is opened by its plain name, and a
//! symbolic link there is not followed. Root refuses a directory that belongs to another user: that
//! user could change it at any moment, and thereby what root does.

use std::io;
use std::path::Path;

use super::error::StoreError;
use crate::sys::dir::Dir;

/// Opens the directory of the store at `path`. With `trust_owner`, root accepts a directory of
/// another user.
pub(crate) fn open(path: &Path, trust_owner: bool) -> Result<Dir, StoreError> {
    let not_a_store = |why: &str| StoreError::NotAStore { path: path.to_owned(), why: why.to_owned() };
    let dir = Dir::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            not_a_store("nothing is there; `stillframe init` or the first capture creates one")
        }
        io::ErrorKind::NotADirectory if path.exists() => not_a_store("it is a file; a store is a directory"),
        _ => StoreError::io("open", path)(error),
    })?;
    if trust_owner { Ok(dir) } else { check_owner(&dir).map(|()| dir) }
}

fn check_owner(dir: &Dir) -> Result<(), StoreError> {
    let owner_uid = dir.owner_uid().map_err(StoreError::io("open", dir))?;
    if rustix::process::geteuid().is_root() && owner_uid != 0 {
        Err(StoreError::OwnedByOther { path: dir.into(), owner_uid })
    } else {
        Ok(())
    }
}
