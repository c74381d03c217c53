//! File systems that support fewer operations: how they answer calls that they do not support, and
//! what is done instead.
//!
//! ```text
//! no RENAME_NOREPLACE     NFS, 9p, FUSE: EINVAL    look, then rename: safe under the store's lock
//! no hard links           exFAT, shares: EPERM …   a copy, or a rename over our own empty file
//! no fsync of a directory EINVAL, ENOTSUP          syncfs of the whole file system, if it can
//! no modes                EPERM, ENOTSUP           ignored: the mount options decide who reads
//! no shared mappings      ENODEV, EINVAL           private ones, which are never written (pages.rs)
//! no flock                ENOTSUP, ENOSYS          creating or opening a store fails (lock.rs)
//! ```

use std::io;

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::dir::Name;

/// Whether an error says that the call, or the call with these flags, is not supported.
pub(crate) fn is_missing_ability(error: Errno) -> bool {
    matches!(error, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOTTY)
}

fn says(error: &io::Error, is_so: impl FnOnce(Errno) -> bool) -> bool {
    Errno::from_io_error(error).is_some_and(is_so)
}

/// Whether a file cannot have a second name: its file system has no hard links, or the file has as
/// many as it may have.
pub(crate) fn has_no_links(error: &io::Error) -> bool {
    says(error, |error| {
        is_missing_ability(error) || matches!(error, Errno::PERM | Errno::MLINK | Errno::XDEV)
    })
}

/// Ignores the error of a file system that has no modes.
pub(crate) fn if_there_is(changed: io::Result<()>) -> io::Result<()> {
    match changed {
        Err(error) if says(&error, |error| is_missing_ability(error) || error == Errno::PERM) => Ok(()),
        other => other,
    }
}

/// Makes the entries of a directory durable.
///
/// Where a directory cannot be synced, the whole file system is. Where that is unsupported too,
/// nothing can be done and this succeeds.
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

/// Renames a file unless a file with the new name exists. Where the file system cannot do both in
/// one step, the caller must make sure that nobody else creates a file of that name meanwhile.
pub(crate) fn rename_new(from: &Name, to: &Name) -> io::Result<()> {
    match rustix::fs::renameat_with(from.dir(), from.name(), to.dir(), to.name(), RenameFlags::NOREPLACE) {
        Err(error) if is_missing_ability(error) => match to.look()? {
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => Ok(rustix::fs::renameat(from.dir(), from.name(), to.dir(), to.name())?),
        },
        other => Ok(other?),
    }
}
