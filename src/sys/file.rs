//! Files that nobody else may read: created with mode 0600 (directories 0700) whatever the umask,
//! never through a symbolic link, and made durable together with their directory. Every call passes
//! through call.rs, where tests may stand in the way.

use std::fs::{DirBuilder, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, RenameFlags};

use super::call::{Call, perform, tell};

/// `O_NOFOLLOW` is the same small number on every Linux machine this runs on.
#[allow(clippy::cast_possible_wrap)]
const NO_FOLLOW: i32 = OFlags::NOFOLLOW.bits() as i32;

#[allow(clippy::cast_possible_wrap)]
const NO_WAIT: i32 = OFlags::NONBLOCK.bits() as i32;

/// An open file.
#[derive(Debug)]
pub(crate) struct File {
    file: std::fs::File,
    /// As what it was opened; it may have another name by now.
    path: PathBuf,
}

impl File {
    /// As what it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// How long it is.
    pub(crate) fn length_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Fills `bytes` with what is there from a byte on.
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], at_bytes: u64) -> io::Result<()> {
        perform(Call::Read(&self.path), || self.file.read_exact_at(bytes, at_bytes))
    }

    /// Writes `bytes` from a byte on.
    pub(crate) fn write_all_at(&self, bytes: &[u8], at_bytes: u64) -> io::Result<()> {
        let call = Call::Write { path: &self.path, file: &self.file, at_bytes, bytes };
        tell(call, || self.file.write_all_at(bytes, at_bytes))
    }

    /// Cuts it, or lengthens it by zeros.
    pub(crate) fn set_length(&self, length_bytes: u64) -> io::Result<()> {
        let call = Call::SetLength { path: &self.path, file: &self.file, length_bytes };
        tell(call, || self.file.set_len(length_bytes))
    }

    /// Makes durable what is written, and how long it is.
    pub(crate) fn sync(&self) -> io::Result<()> {
        tell(Call::Sync(&self.path, &self.file), || self.file.sync_data())
    }

    /// Locks it, unless another process has it locked.
    pub(crate) fn try_lock(&self) -> Result<(), TryLockError> {
        self.file.try_lock()
    }

    /// Locks it together with others who do the same, unless another process has it locked for itself.
    pub(crate) fn try_lock_shared(&self) -> Result<(), TryLockError> {
        self.file.try_lock_shared()
    }

    /// Hands it to `map`, which maps it.
    pub(crate) fn map<T>(&self, map: impl FnOnce(&std::fs::File) -> io::Result<T>) -> io::Result<T> {
        perform(Call::Map(&self.path, &self.file), || map(&self.file))
    }
}

fn private(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    // The umask can only take bits away from 0600, which `set_permissions` gives back.
    let file = options.read(true).write(true).mode(0o600).custom_flags(NO_FOLLOW).open(path)?;
    if file.metadata()?.permissions().mode() & 0o777 != 0o600 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(File { file, path: path.to_owned() })
}

/// Creates a file that must not exist.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    perform(Call::Create(path), || private(OpenOptions::new().create_new(true), path))
}

/// Opens a file for reading and writing, creating it if it is not there.
pub(crate) fn open_or_create(path: &Path) -> io::Result<File> {
    let call = if path.exists() { Call::Open(path) } else { Call::Create(path) };
    perform(call, || private(OpenOptions::new().create(true).truncate(false), path))
}

/// Opens an existing file for reading and writing.
pub(crate) fn open_existing(path: &Path) -> io::Result<File> {
    perform(Call::Open(path), || {
        let file = OpenOptions::new().read(true).write(true).custom_flags(NO_FOLLOW).open(path)?;
        Ok(File { file, path: path.to_owned() })
    })
}

/// Opens an existing file for reading.
pub(crate) fn open_to_read(path: &Path) -> io::Result<File> {
    perform(Call::Open(path), || {
        let file = OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(path)?;
        Ok(File { file, path: path.to_owned() })
    })
}

/// How much may still be written to the file system of what is at `path`.
pub(crate) fn room_bytes(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether what is at `path` is on a file system, or in a mount of one, that cannot be written.
pub(crate) fn is_read_only(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statvfs(path)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Creates a directory with mode 0700, and those above it, each durable in the one above; does nothing where
/// there is one. A symbolic link to one is an error: nobody knows who else may read what is there.
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(found) if found.is_symlink() => {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is a symbolic link"));
        }
        _ => {}
    }
    create_above(path)?;
    tell(Call::CreateDir(path), || {
        DirBuilder::new().mode(0o700).create(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o700))
    })?;
    sync_parent(path)
}

/// Creates the directories above a path, as far as there are none: for others to read as the umask has it.
fn create_above(path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir())
    else {
        return Ok(());
    };
    create_above(parent)?;
    match tell(Call::CreateDir(parent), || std::fs::create_dir(parent)) {
        Err(_) if parent.is_dir() => {}
        other => other?,
    }
    sync_parent(parent)
}

/// Removes a directory and all that is in it; does nothing where there is none.
pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    if path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    tell(Call::RemoveDir(path), || std::fs::remove_dir_all(path))
}

/// Takes a name from a file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    tell(Call::Remove(path), || std::fs::remove_file(path))
}

/// The same; does nothing where there is none.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match remove(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// What is in a directory.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    perform(Call::List(dir), || {
        std::fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path())).collect()
    })
}

/// Gives every file below `dir` mode 0600 and every directory 0700: for what a library created.
pub(crate) fn make_private(dir: &Path) -> io::Result<()> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            make_private(&entry.path())?;
        } else if kind.is_file() {
            std::fs::set_permissions(entry.path(), Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

/// The first of a directory and all that is in it that others than its owner may read or change.
pub(crate) fn exposed(path: &Path) -> Option<PathBuf> {
    let found = path.symlink_metadata().ok()?;
    if !found.is_symlink() && found.permissions().mode() & 0o077 != 0 {
        return Some(path.to_owned());
    }
    let inside = std::fs::read_dir(path).ok().filter(|_| found.is_dir())?;
    inside.flatten().find_map(|entry| exposed(&entry.path()))
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    tell(Call::SyncDir(dir), || std::fs::File::open(dir)?.sync_all())
}

/// Makes durable that there is something of this name. Where we may create things and not look, we cannot.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().map(|parent| match parent.as_os_str().is_empty() {
        true => Path::new("."),
        false => parent,
    });
    match parent.map_or(Ok(()), sync_dir) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

/// Replaces `path` by a file with these bytes: durable and whole when this returns, and after a
/// crash either as before or so.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    remove_if_there(&temporary)?;
    let file = create_new(&temporary)?;
    file.write_all_at(bytes, 0)?;
    file.sync()?;
    rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Gives a file or directory another name; what has that name goes.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    tell(Call::Rename(from, to), || std::fs::rename(from, to))
}

/// Gives a file another name, which no other file may have.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    tell(Call::Rename(from, to), || {
        Ok(rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE)?)
    })
}

/// Lets two directories change their names. Should the file system have no such operation, there is a
/// moment when there is no directory `to`.
pub(crate) fn exchange_dirs(from: &Path, to: &Path) -> io::Result<()> {
    tell(Call::Exchange(from, to), || {
        match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::EXCHANGE) {
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                std::fs::remove_dir_all(to)?;
                std::fs::rename(from, to)
            }
            other => Ok(other?),
        }
    })
}

/// Gives a file a second name, which no other file may have.
pub(crate) fn link(path: &Path, second: &Path) -> io::Result<()> {
    tell(Call::Link(path, second), || std::fs::hard_link(path, second))
}

/// Gives a file another name in `dir`: its own, with a number behind it if that is taken. Returns the name;
/// that which it has there already, if it has one.
pub(crate) fn link_into(path: &Path, dir: &Path) -> io::Result<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let file = |path: &Path| path.symlink_metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
    let name = path.file_name().unwrap_or_default();
    for number in 0u32.. {
        let mut name = name.to_owned();
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let second = dir.join(name);
        match link(path, &second) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if file(path) == file(&second) {
                    return Ok(second);
                }
            }
            other => return other.map(|()| second),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// The whole of a small file; an error if it has more than `max_bytes`.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    perform(Call::Read(path), || {
        // What is no file, but a pipe, must not keep us waiting.
        let file = OpenOptions::new().read(true).custom_flags(NO_WAIT).open(path)?;
        file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)
    })?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// How many bytes the files below `dir` take on the disk.
pub(crate) fn disk_bytes(dir: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total_bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        // A file may go away while we look: a pack that gc removes.
        let Ok(metadata) = entry.metadata() else { continue };
        total_bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            total_bytes += disk_bytes(&entry.path())?;
        }
    }
    Ok(total_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        std::fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(open_or_create(&link).is_err());
        assert!(open_existing(&link).is_err());
        write_whole(&link, b"new").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    }
}
