//! File systems that can do less: what they answer to calls that they do not know, and what is done instead.
//!
//! ```text
//! no RENAME_NOREPLACE       NFS, 9p, FUSE: EINVAL      look, then rename: right under the store's lock
//! no hard links             exFAT, shares: EPERM …     a copy, or a renaming over an empty file of one's own
//! no fsync of a directory   EINVAL, ENOTSUP            all of the file system is made durable, if it can be
//! no modes                  EPERM, ENOTSUP             whoever mounted it has said who may read it
//! no shared mappings        ENODEV, EINVAL             private ones, which are never written (pages.rs)
//! no flock                  ENOTSUP, ENOSYS            refused when a store is created or opened (lock.rs)
//! ```

use std::io;

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::dir::Name;

/// Whether a call says that there is no such call, or none with these flags.
pub(crate) fn is_missing_ability(error: Errno) -> bool {
    matches!(error, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOTTY)
}

fn says(error: &io::Error, is_so: impl FnOnce(Errno) -> bool) -> bool {
    Errno::from_io_error(error).is_some_and(is_so)
}

/// Whether a file cannot have a second name: as its file system knows none, or as it has as many as it may have.
pub(crate) fn has_no_links(error: &io::Error) -> bool {
    says(error, |error| {
        is_missing_ability(error) || matches!(error, Errno::PERM | Errno::MLINK | Errno::XDEV)
    })
}

/// Lets pass that a file system does not know modes.
pub(crate) fn if_there_is(changed: io::Result<()>) -> io::Result<()> {
    match changed {
        Err(error) if says(&error, |error| is_missing_ability(error) || error == Errno::PERM) => Ok(()),
        other => other,
    }
}

/// Makes the entries of a directory durable.
///
/// Where directories cannot be made durable by themselves, all of the file system is; and where it knows nothing of
/// that either, nothing can be done.
pub(crate) fn sync_dir(dir: &std::fs::File) -> io::Result<()> {
    match dir.sync_all() {
        Err(error) if says(&error, |error| is_missing_ability(error) || error == Errno::BADF) => {
            match rustix::fs::syncfs(dir) {
                Err(error) if is_missing_ability(error) => Ok(()),
                other => Ok(other?),
            }
        }
        other => other,
    }
}

/// Renames a file unless there is one of its new name. Where the file system cannot do both in one step, nobody else
/// may give that name to a file meanwhile.
pub(crate) fn rename_new(from: &Name, to: &Name) -> io::Result<()> {
    match rustix::fs::renameat_with(from.dir(), from.name(), to.dir(), to.name(), RenameFlags::NOREPLACE) {
        Err(error) if is_missing_ability(error) => match to.look()? {
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => Ok(rustix::fs::renameat(from.dir(), from.name(), to.dir(), to.name())?),
        },
        other => Ok(other?),
    }
}
