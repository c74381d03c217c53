//! A directory that is held open, and names in it.
//!
//! ```text
//! Dir ─ a descriptor of the directory: the same directory even after it was moved or replaced
//!  └─ Name ─ one name in it, looked up from the descriptor; a symbolic link there is not followed
//! ```
//!
//! The kernel looks a path up from the root each time it is used, and by then the path may lead to
//! another directory. So everything in a store is reached through the types of this file. The paths
//! that they keep serve for messages, and for the witnesses of call.rs, which identify files by
//! path.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags, Stat};

/// A directory that is held open.
#[derive(Clone, Debug)]
pub(crate) struct Dir(Arc<Held>);

#[derive(Debug)]
struct Held {
    /// Opened with O_PATH, which needs no permission to read the directory.
    descriptor: OwnedFd,
    /// The path under which it was opened.
    path: PathBuf,
    /// The same path made absolute: the process may change its working directory.
    absolute: PathBuf,
}

/// A name in a directory. There need not be a file of this name.
#[derive(Clone, Debug)]
pub(crate) struct Name {
    dir: Dir,
    /// The directory's path and the name.
    path: PathBuf,
}

/// The identity of a file: no two files have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

const HOLD: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Dir {
    /// Opens the directory at a path given by the user. Symbolic links on the way are followed.
    pub(crate) fn open(path: &Path) -> io::Result<Dir> {
        let descriptor = rustix::fs::open(path, HOLD, Mode::empty())?;
        let absolute = std::path::absolute(path)?;
        Ok(Dir(Arc::new(Held { descriptor, path: path.to_owned(), absolute })))
    }

    /// The path under which it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }

    /// A name in this directory.
    pub(crate) fn join(&self, name: impl AsRef<OsStr>) -> Name {
        Name { dir: self.clone(), path: self.0.path.join(name.as_ref()) }
    }

    /// A path to this directory, for libraries that need one. It is valid while this is open and
    /// /proc is mounted.
    pub(crate) fn held_path(&self) -> PathBuf {
        let held = PathBuf::from(format!("/proc/self/fd/{}", self.0.descriptor.as_raw_fd()));
        let leads_here =
            rustix::fs::stat(&held).is_ok_and(|found| Some(Identity::of(&found)) == self.identity().ok());
        if leads_here { held } else { self.0.absolute.clone() }
    }

    /// The identity of this directory.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        Ok(Identity::of(&rustix::fs::fstat(self)?))
    }

    /// The uid of its owner.
    pub(crate) fn owner_uid(&self) -> io::Result<u32> {
        Ok(rustix::fs::fstat(self)?.st_uid)
    }

    /// Whether its path still leads to it. Where the path cannot be inspected, the answer is yes.
    pub(crate) fn is_at_its_path(&self) -> io::Result<bool> {
        match rustix::fs::stat(&self.0.absolute) {
            Ok(found) => Ok(Identity::of(&found) == self.identity()?),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(false),
            Err(_) => Ok(true),
        }
    }

    /// Opens the directory for reading, locking and syncing, which an O_PATH descriptor cannot do.
    pub(crate) fn open_to_read(&self) -> io::Result<std::fs::File> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(self, ".", flags, Mode::empty())?.into())
    }

    /// Whether entries can be created and removed in it: not where its mode, an immutable flag or
    /// its mount forbids that.
    pub(crate) fn is_writable(&self) -> bool {
        rustix::fs::accessat(self, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
    }

    /// The names in it.
    pub(crate) fn names(&self) -> io::Result<Vec<Name>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(self.open_to_read()?)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(self.join(name));
            }
        }
        Ok(names)
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.descriptor.as_fd()
    }
}

impl Name {
    /// The name at the end of a path given by the user. Symbolic links to its directory are
    /// followed; a symbolic link of this name is not.
    pub(crate) fn at(path: &Path) -> io::Result<Name> {
        let Some(name) = path.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it names no file"));
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let dir = Dir::open(parent.unwrap_or(Path::new(".")))?;
        Ok(Name { path: path.with_file_name(name), dir })
    }

    /// The directory that contains it.
    pub(crate) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// The name alone, without its directory.
    pub(crate) fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    /// The path under which users know it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// For messages.
    pub(crate) fn display(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    /// The same name with another extension.
    pub(crate) fn with_extension(&self, extension: &str) -> Name {
        Name { dir: self.dir.clone(), path: self.path.with_extension(extension) }
    }

    /// What exists under this name; `None` if nothing does. A symbolic link counts as itself.
    pub(crate) fn look(&self) -> io::Result<Option<Found>> {
        match rustix::fs::statat(&self.dir, self.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(Found(stat))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether something exists under this name. If that cannot be found out, the answer is no.
    pub(crate) fn exists(&self) -> bool {
        self.look().is_ok_and(|found| found.is_some())
    }

    /// Whether the file of this name may be written: not where its mode, an immutable flag or its
    /// mount forbids that.
    pub(crate) fn is_writable(&self) -> bool {
        rustix::fs::accessat(&self.dir, self.name(), Access::WRITE_OK, AtFlags::EACCESS).is_ok()
    }

    /// Whether a directory has this name. A link to a directory does not count.
    pub(crate) fn is_dir(&self) -> bool {
        self.look().is_ok_and(|found| found.is_some_and(|found| found.is_dir()))
    }

    /// Opens the directory of this name. A symbolic link is an error.
    pub(crate) fn open_dir(&self) -> io::Result<Dir> {
        let descriptor = rustix::fs::openat(&self.dir, self.name(), HOLD | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| match (error, self.look()) {
            (_, Ok(Some(found))) if !found.is_dir() => found.is_no("directory"),
            (error, _) => error.into(),
        })?;
        let absolute = self.dir.0.absolute.join(self.name());
        Ok(Dir(Arc::new(Held { descriptor, path: self.path.clone(), absolute })))
    }
}

impl From<&Name> for PathBuf {
    fn from(name: &Name) -> PathBuf {
        name.path.clone()
    }
}

impl From<&Dir> for PathBuf {
    fn from(dir: &Dir) -> PathBuf {
        dir.path().to_owned()
    }
}

/// What exists under a name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found(Stat);

impl Found {
    /// The same for an open file.
    pub(crate) fn of(file: impl AsFd) -> io::Result<Found> {
        Ok(Found(rustix::fs::fstat(file)?))
    }

    fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.0.st_mode)
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    pub(crate) fn is_plain_file(&self) -> bool {
        self.file_type() == FileType::RegularFile
    }

    pub(crate) fn is_symbolic_link(&self) -> bool {
        self.file_type() == FileType::Symlink
    }

    /// Whether the file has more than one name.
    pub(crate) fn has_other_names(&self) -> bool {
        self.0.st_nlink > 1
    }

    /// How many bytes it takes on the disk.
    pub(crate) fn disk_bytes(&self) -> u64 {
        u64::try_from(self.0.st_blocks).unwrap_or(0).saturating_mul(512)
    }

    /// Its permission bits.
    pub(crate) fn mode(&self) -> u32 {
        self.0.st_mode & 0o7777
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::of(&self.0)
    }

    /// Its kind, in words.
    pub(crate) fn what(&self) -> &'static str {
        match self.file_type() {
            FileType::RegularFile => "a plain file",
            FileType::Directory => "a directory",
            FileType::Symlink => "a symbolic link",
            FileType::Fifo => "a FIFO",
            FileType::Socket => "a socket",
            FileType::CharacterDevice | FileType::BlockDevice => "a device",
            _ => "of an unknown kind",
        }
    }

    /// The error that says that this is not what was `expected`.
    pub(crate) fn is_no(&self, expected: &str) -> io::Error {
        let kind = if self.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
        io::Error::new(kind, format!("it is {} and no {expected}", self.what()))
    }
}

impl Identity {
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    fn of(stat: &Stat) -> Identity {
        Identity { device: stat.st_dev as u64, inode: stat.st_ino as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_stays_the_one_that_was_opened_when_another_takes_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("store"), dir.path().join("moved"));
        std::fs::create_dir(&path).unwrap();
        let held = Dir::open(&path).unwrap();
        assert!(held.is_at_its_path().unwrap());
        std::fs::rename(&path, &moved).unwrap();
        assert!(!held.is_at_its_path().unwrap());
        std::fs::create_dir(&path).unwrap();
        assert!(!held.is_at_its_path().unwrap());
        std::fs::write(path.join("file"), "of the other").unwrap();
        assert!(!held.join("file").exists());
        std::fs::write(moved.join("file"), "ours").unwrap();
        assert!(held.join("file").look().unwrap().unwrap().is_plain_file());
        assert_eq!(std::fs::read(held.held_path().join("file")).unwrap(), b"ours");
    }

    #[test]
    fn a_symbolic_link_is_no_directory_in_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("packs")).unwrap();
        std::os::unix::fs::symlink("packs", dir.path().join("link")).unwrap();
        let held = Dir::open(dir.path()).unwrap();
        assert!(held.join("packs").open_dir().is_ok());
        let error = held.join("link").open_dir().unwrap_err();
        assert_eq!(error.to_string(), "it is a symbolic link and no directory");
        assert!(!held.join("link").is_dir());
    }
}
