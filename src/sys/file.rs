//! Files that only their owner may read. They are created with mode 0600 (directories: 0700)
//! whatever the umask is, never through a symbolic link, and are made durable together with their
//! directory. Every call passes through call.rs, where tests can intervene.
//!
//! Anything other than a plain file, such as a pipe or a device, is not opened at all: opening it
//! may block or have an effect. A caller that must not change a file that others see under another
//! name checks [`File::has_other_names`].
//!
//! Some file systems support fewer operations. For each call that they refuse, this file has a
//! fallback that is equally safe while the caller holds the store's lock. lesser.rs has the
//! helpers.

use std::fs::{DirBuilder, Permissions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};

use super::call::{Call, perform, tell};
use super::dir::{Dir, Found, Identity, Name};
use super::lesser;

/// An open file.
#[derive(Debug)]
pub(crate) struct File {
    file: std::fs::File,
    /// The path under which it was opened; it may have another name by now.
    path: PathBuf,
}

impl File {
    /// The path under which it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it has other names, by which somebody may keep it: a backup made of hard links, for
    /// example.
    pub(crate) fn has_other_names(&self) -> io::Result<bool> {
        Ok(Found::of(&self.file)?.has_other_names())
    }

    /// The identity of the file.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        Ok(Found::of(&self.file)?.identity())
    }

    /// Its length.
    pub(crate) fn length_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Fills `bytes` from the file, starting at an offset.
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], at_bytes: u64) -> io::Result<()> {
        perform(Call::Read(&self.path), || self.file.read_exact_at(bytes, at_bytes))
    }

    /// Writes `bytes` at an offset.
    pub(crate) fn write_all_at(&self, bytes: &[u8], at_bytes: u64) -> io::Result<()> {
        let call = Call::Write { path: &self.path, file: &self.file, at_bytes, bytes };
        tell(call, || self.file.write_all_at(bytes, at_bytes))
    }

    /// Truncates it, or extends it with zeros.
    pub(crate) fn set_length(&self, length_bytes: u64) -> io::Result<()> {
        let call = Call::SetLength { path: &self.path, file: &self.file, length_bytes };
        tell(call, || self.file.set_len(length_bytes))
    }

    /// Makes its written bytes and its length durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        tell(Call::Sync(&self.path, &self.file), || self.file.sync_data())
    }

    /// Takes an exclusive lock, unless another process holds a lock.
    pub(crate) fn try_lock(&self) -> Result<(), TryLockError> {
        self.file.try_lock()
    }

    /// Takes a shared lock, unless another process holds an exclusive one.
    pub(crate) fn try_lock_shared(&self) -> Result<(), TryLockError> {
        self.file.try_lock_shared()
    }

    /// Releases the lock, even if a process that was forked meanwhile still has the file open.
    pub(crate) fn unlock(&self) -> io::Result<()> {
        self.file.unlock()
    }

    /// Passes the open file to `map`, which maps it.
    pub(crate) fn map<T>(&self, map: impl FnOnce(&std::fs::File) -> io::Result<T>) -> io::Result<T> {
        perform(Call::Map(&self.path, &self.file), || map(&self.file))
    }
}

impl std::os::fd::AsFd for File {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens a plain file. A pipe in its place must not block us, and a device must not be opened.
fn open_plain(name: &Name, flags: OFlags) -> io::Result<File> {
    if let Some(found) = name.look()?
        && !found.is_plain_file()
    {
        return Err(found.is_no("plain file"));
    }
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file =
        std::fs::File::from(rustix::fs::openat(name.dir(), name.name(), flags, Mode::RUSR | Mode::WUSR)?);
    let found = Found::of(&file)?;
    if !found.is_plain_file() {
        return Err(found.is_no("plain file"));
    }
    Ok(File { file, path: name.path().to_owned() })
}

fn private(name: &Name, flags: OFlags) -> io::Result<File> {
    let file = open_plain(name, flags | OFlags::RDWR)?;
    let found = Found::of(&file)?;
    // The umask can only remove bits from 0600; this restores them. A file with several names is
    // not ours alone.
    if found.mode() & 0o777 != 0o600 && !found.has_other_names() {
        lesser::if_there_is(file.file.set_permissions(Permissions::from_mode(0o600)))?;
    }
    Ok(file)
}

/// Creates a file that must not exist yet.
pub(crate) fn create_new(name: &Name) -> io::Result<File> {
    perform(Call::Create(name.path()), || private(name, OFlags::CREATE | OFlags::EXCL))
}

/// Opens a file for reading and writing, and creates it if it does not exist.
pub(crate) fn open_or_create(name: &Name) -> io::Result<File> {
    let call = if name.exists() { Call::Open(name.path()) } else { Call::Create(name.path()) };
    perform(call, || private(name, OFlags::CREATE))
}

/// Opens an existing file for reading and writing.
pub(crate) fn open_existing(name: &Name) -> io::Result<File> {
    perform(Call::Open(name.path()), || open_plain(name, OFlags::RDWR))
}

/// Opens an existing file for reading.
pub(crate) fn open_to_read(name: &Name) -> io::Result<File> {
    perform(Call::Open(name.path()), || open_plain(name, OFlags::RDONLY))
}

/// Opens a directory inside another.
pub(crate) fn open_dir(name: &Name) -> io::Result<Dir> {
    perform(Call::Open(name.path()), || name.open_dir())
}

/// Whether an error says that nothing more can be written: the disk is full, or a quota is used up.
pub(crate) fn is_no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// How much can still be written to the file system of a directory.
pub(crate) fn room_bytes(dir: &Dir) -> io::Result<u64> {
    let found = rustix::fs::fstatvfs(dir)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Whether nothing in a directory can be changed: its file system, its mount, its mode or an
/// immutable flag forbids it.
pub(crate) fn is_read_only(dir: &Dir) -> io::Result<bool> {
    let of_mount = rustix::fs::fstatvfs(dir)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
    Ok(of_mount || !dir.is_writable())
}

/// Creates a directory with mode 0700, and the missing directories above it. Each is made durable
/// in its parent. Does nothing if the directory exists. A symbolic link to a directory is an error:
/// nothing is known about who else can read the directory behind it.
pub(crate) fn create_dir_at(path: &Path) -> io::Result<()> {
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
        lesser::if_there_is(std::fs::set_permissions(path, Permissions::from_mode(0o700)))
    })?;
    sync_parent(path)
}

/// Opens the directory of this name. If it does not exist, this creates it with mode 0700 and makes
/// it durable in its parent.
pub(crate) fn create_dir(name: &Name) -> io::Result<Dir> {
    if !name.exists() {
        tell(Call::CreateDir(name.path()), || {
            rustix::fs::mkdirat(name.dir(), name.name(), Mode::RWXU)?;
            let mode = rustix::fs::chmodat(name.dir(), name.name(), Mode::RWXU, AtFlags::empty());
            lesser::if_there_is(mode.map_err(Into::into))
        })?;
        sync_dir(name.dir())?;
    }
    name.open_dir()
}

/// Creates the missing directories above a path, with the modes that the umask gives.
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

/// Removes a directory and everything in it, or the file of this name. Does nothing if nothing has
/// this name.
pub(crate) fn remove_dir(name: &Name) -> io::Result<()> {
    match name.exists() {
        true => tell(Call::RemoveDir(name.path()), || remove_all(name)),
        false => Ok(()),
    }
}

fn remove_all(name: &Name) -> io::Result<()> {
    match name.look()? {
        None => Ok(()),
        Some(found) if found.is_dir() => {
            for inside in name.open_dir()?.names()? {
                remove_all(&inside)?;
            }
            Ok(rustix::fs::unlinkat(name.dir(), name.name(), AtFlags::REMOVEDIR)?)
        }
        Some(_) => Ok(rustix::fs::unlinkat(name.dir(), name.name(), AtFlags::empty())?),
    }
}

/// Removes one name of a file.
pub(crate) fn remove(name: &Name) -> io::Result<()> {
    tell(Call::Remove(name.path()), || Ok(rustix::fs::unlinkat(name.dir(), name.name(), AtFlags::empty())?))
}

/// The same, but does nothing if there is no such file.
pub(crate) fn remove_if_there(name: &Name) -> io::Result<()> {
    match remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The names in a directory.
pub(crate) fn list(dir: &Dir) -> io::Result<Vec<Name>> {
    perform(Call::List(dir.path()), || dir.names())
}

/// Gives a directory mode 0700.
pub(crate) fn make_dir_private(dir: &Dir) -> io::Result<()> {
    lesser::if_there_is(rustix::fs::chmodat(dir, ".", Mode::RWXU, AtFlags::empty()).map_err(Into::into))
}

/// Gives every file in `dir` mode 0600 and every directory 0700: for files that a library created.
pub(crate) fn make_private(dir: &Dir) -> io::Result<()> {
    for name in dir.names()? {
        let Some(found) = name.look()? else { continue };
        let mode = if found.is_dir() { 0o700 } else { 0o600 };
        // The mode of a symbolic link cannot be changed, and the mode of its target must not be.
        if (found.is_dir() || found.is_plain_file()) && found.mode() & 0o777 != mode {
            let mode = Mode::from_raw_mode(mode);
            let changed = rustix::fs::chmodat(dir, name.name(), mode, AtFlags::empty());
            lesser::if_there_is(changed.map_err(Into::into))?;
        }
        if found.is_dir() {
            make_private(&name.open_dir()?)?;
        }
    }
    Ok(())
}

/// The first path, among a directory and everything in it, that users other than the owner may read
/// or change.
pub(crate) fn exposed(dir: &Dir) -> Option<PathBuf> {
    let is_open = |found: Found| found.mode() & 0o077 != 0;
    if Found::of(dir).is_ok_and(is_open) {
        return Some(dir.path().to_owned());
    }
    dir.names().ok()?.into_iter().find_map(|name| match name.look().ok()?? {
        found if found.is_dir() => exposed(&name.open_dir().ok()?),
        found if !found.is_symbolic_link() && is_open(found) => Some(name.path().to_owned()),
        _ => None,
    })
}

/// The first entry in a directory that is neither a directory nor a plain file with exactly one
/// name, and what it is. A library that works with paths must not meet such an entry: it would
/// follow the link, or change the file under its other name.
pub(crate) fn stranger(dir: &Dir) -> io::Result<Option<(Name, &'static str)>> {
    for name in dir.names()? {
        let Some(found) = name.look()? else { continue };
        if found.is_dir() {
            if let Some(stranger) = stranger(&name.open_dir()?)? {
                return Ok(Some(stranger));
            }
        } else if !found.is_plain_file() {
            return Ok(Some((name, found.what())));
        } else if found.has_other_names() {
            return Ok(Some((name, "a file with a second name elsewhere")));
        }
    }
    Ok(None)
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(dir: &Dir) -> io::Result<()> {
    tell(Call::SyncDir(dir.path()), || lesser::sync_dir(&dir.open_to_read()?))
}

/// Makes the existence of this name durable. Where the process may create entries in the directory
/// but not open it for reading, this is impossible and is skipped.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().map(|parent| match parent.as_os_str().is_empty() {
        true => Path::new("."),
        false => parent,
    });
    let sync =
        |parent: &Path| tell(Call::SyncDir(parent), || lesser::sync_dir(&std::fs::File::open(parent)?));
    match parent.map_or(Ok(()), sync) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

/// Replaces a file by one with these bytes. When this returns, the new file is complete and
/// durable; after a crash the file is either the old one or the new one.
pub(crate) fn write_whole(name: &Name, bytes: &[u8]) -> io::Result<()> {
    let temporary = name.with_extension("new");
    remove_if_there(&temporary)?;
    let file = create_new(&temporary)?;
    file.write_all_at(bytes, 0)?;
    file.sync()?;
    rename(&temporary, name)?;
    sync_dir(name.dir())
}

/// Renames a file or directory; an existing one with the new name is replaced.
pub(crate) fn rename(from: &Name, to: &Name) -> io::Result<()> {
    tell(Call::Rename(from.path(), to.path()), || {
        Ok(rustix::fs::renameat(from.dir(), from.name(), to.dir(), to.name())?)
    })
}

/// Renames a file to a name that no other file may have.
pub(crate) fn rename_new(from: &Name, to: &Name) -> io::Result<()> {
    tell(Call::Rename(from.path(), to.path()), || lesser::rename_new(from, to))
}

/// Swaps the names of two directories. Where the file system has no such operation, there is a
/// moment when `to` does not exist.
pub(crate) fn exchange_dirs(from: &Name, to: &Name) -> io::Result<()> {
    tell(Call::Exchange(from.path(), to.path()), || {
        let exchange = RenameFlags::EXCHANGE;
        match rustix::fs::renameat_with(from.dir(), from.name(), to.dir(), to.name(), exchange) {
            Err(error) if lesser::is_missing_ability(error) => {
                remove_all(to)?;
                Ok(rustix::fs::renameat(from.dir(), from.name(), to.dir(), to.name())?)
            }
            other => Ok(other?),
        }
    })
}

/// Gives a file a second name, which no other file may have.
pub(crate) fn link(name: &Name, second: &Name) -> io::Result<()> {
    tell(Call::Link(name.path(), second.path()), || {
        Ok(rustix::fs::linkat(name.dir(), name.name(), second.dir(), second.name(), AtFlags::empty())?)
    })
}

/// Gives a complete file its final name, which no other file may have. This is for files outside a
/// store, where no lock keeps others from using that name.
pub(crate) fn publish(from: &Name, to: &Name) -> io::Result<()> {
    match link(from, to) {
        Err(error) if lesser::has_no_links(&error) => {
            // The empty file reserves the name until the complete one replaces it.
            drop(create_new(to)?);
            rename(from, to).inspect_err(|_| drop(remove(to)))
        }
        other => other.and_then(|()| remove(from)),
    }
}

/// Gives a file another name in `dir`: its own name, with a number appended if that is taken.
/// Returns the name; if the file already has one in `dir`, that one. Where the file system has no
/// hard links, a copy gets the name.
pub(crate) fn link_into(name: &Name, dir: &Dir) -> io::Result<Name> {
    let found = name.look()?.ok_or(io::ErrorKind::NotFound)?;
    for number in 0u32.. {
        let mut second = name.name().to_owned();
        if number > 0 {
            second.push(format!(".{number}"));
        }
        let second = dir.join(second);
        let linked = match link(name, &second) {
            Err(error) if lesser::has_no_links(&error) && found.is_plain_file() => match second.exists() {
                true => Err(io::ErrorKind::AlreadyExists.into()),
                false => copy(name, &second),
            },
            other => other,
        };
        match linked {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if second.look()?.is_some_and(|there| there.identity() == found.identity())
                    || (found.is_plain_file() && is_copy(name, &second)?)
                {
                    return Ok(second);
                }
            }
            other => return other.map(|()| second),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// The number of bytes that are copied or compared at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Makes a durable copy of a file under a name that no other file may have. If copying fails, the
/// partial copy is removed.
pub(crate) fn copy(from: &Name, to: &Name) -> io::Result<()> {
    let from = open_to_read(from)?;
    let copy = create_new(to)?;
    let copied = from.pieces(|piece, at_bytes| copy.write_all_at(piece, at_bytes).map(|()| true));
    copied.and_then(|_| copy.sync()).inspect_err(|_| drop(remove(to)))
}

/// Whether two names are plain files with the same bytes.
fn is_copy(name: &Name, other: &Name) -> io::Result<bool> {
    if !other.look()?.is_some_and(|found| found.is_plain_file()) {
        return Ok(false);
    }
    let (file, other) = (open_to_read(name)?, open_to_read(other)?);
    if file.length_bytes()? != other.length_bytes()? {
        return Ok(false);
    }
    let mut same = vec![0; PIECE_BYTES];
    file.pieces(|piece, at_bytes| {
        other.read_exact_at(&mut same[..piece.len()], at_bytes)?;
        Ok(same[..piece.len()] == *piece)
    })
}

impl File {
    /// Passes the file's content to `take`, piece by piece, as long as `take` returns true. Returns
    /// whether it did so to the end.
    fn pieces(&self, mut take: impl FnMut(&[u8], u64) -> io::Result<bool>) -> io::Result<bool> {
        let (mut at_bytes, end_bytes) = (0, self.length_bytes()?);
        let mut piece = vec![0; PIECE_BYTES];
        while at_bytes < end_bytes {
            let bytes = usize::try_from(end_bytes - at_bytes).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            self.read_exact_at(&mut piece[..bytes], at_bytes)?;
            if !take(&piece[..bytes], at_bytes)? {
                return Ok(false);
            }
            at_bytes += bytes as u64;
        }
        Ok(true)
    }
}

/// All bytes of a small file; an error if it has more than `max_bytes`.
pub(crate) fn read_bounded(name: &Name, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    perform(Call::Read(name.path()), || {
        let file = open_plain(name, OFlags::RDONLY)?.file;
        file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)
    })?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// How many bytes the files in `dir` take on the disk.
pub(crate) fn disk_bytes(dir: &Dir) -> io::Result<u64> {
    let mut total_bytes = 0;
    for name in dir.names()? {
        // A file may disappear meanwhile, such as a pack that gc removes.
        let Ok(Some(found)) = name.look() else { continue };
        total_bytes += found.disk_bytes();
        if found.is_dir() {
            total_bytes += disk_bytes(&name.open_dir()?)?;
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
        let link = Name::at(&link).unwrap();
        assert!(open_or_create(&link).is_err());
        assert!(open_existing(&link).is_err());
        assert!(read_bounded(&link, 100).is_err());
        write_whole(&link, b"new").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn a_pipe_is_refused_and_nobody_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = Name::at(&dir.path().join("pipe")).unwrap();
        rustix::fs::mknodat(pipe.dir(), pipe.name(), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        for opened in [open_or_create(&pipe), open_existing(&pipe), open_to_read(&pipe)] {
            assert_eq!(opened.unwrap_err().to_string(), "it is a FIFO and no plain file");
        }
        assert!(read_bounded(&pipe, 100).is_err());
    }

    #[test]
    fn removing_a_directory_removes_links_and_not_what_they_lead_to() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("inside"), dir.path().join("outside"));
        std::fs::create_dir_all(inside.join("deep/er")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("precious"), "precious").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("deep/link")).unwrap();
        remove_dir(&Name::at(&inside).unwrap()).unwrap();
        assert!(!inside.exists() && outside.join("precious").exists());
    }

    #[test]
    fn a_file_that_is_set_aside_twice_has_one_name_there() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("aside")).unwrap();
        let aside = Dir::open(&dir.path().join("aside")).unwrap();
        let file = Name::at(&dir.path().join("file")).unwrap();
        std::fs::write(file.path(), "one").unwrap();
        // As on a file system without hard links.
        copy(&file, &aside.join("file")).unwrap();
        assert_eq!(link_into(&file, &aside).unwrap().name(), "file");
        std::fs::write(file.path(), "two").unwrap();
        assert_eq!(link_into(&file, &aside).unwrap().name(), "file.1");
        assert_eq!(link_into(&file, &aside).unwrap().name(), "file.1");
    }
}
