//! The calls by which a store reads and changes its files. Each call passes through this file, so
//! that a test can watch it, fail it, or leave it out.
//!
//! ```text
//! store ──> file.rs, map.rs ──> perform ──> the operating system
//!                                  │
//!                                  └─ the witness of the directory, where a test has set one
//! ```
//!
//! Without the feature `fault-injection`, witnesses do not exist and every call goes straight to
//! the operating system. The calls that sled makes for the files of the index do not pass through
//! here: nothing acknowledged depends on those files.

use std::fs::File;
#[cfg(not(feature = "fault-injection"))]
use std::io;
use std::path::Path;

/// One call, before it is made.
#[derive(Debug)]
#[non_exhaustive]
pub enum Call<'a> {
    /// Creates a file that does not exist.
    Create(&'a Path),
    /// Opens a file.
    Open(&'a Path),
    /// Reads a file, or a part of it.
    Read(&'a Path),
    /// Lists a directory.
    List(&'a Path),
    /// Maps an open file for reading.
    Map(&'a Path, &'a File),
    /// Writes bytes to an open file, starting at an offset.
    Write {
        /// The path under which it was opened; it may have another name by now.
        path: &'a Path,
        /// The open file.
        file: &'a File,
        /// The offset of the first byte.
        at_bytes: u64,
        /// The bytes to write.
        bytes: &'a [u8],
    },
    /// Truncates an open file, or extends it with zeros.
    SetLength {
        /// The path under which it was opened.
        path: &'a Path,
        /// The open file.
        file: &'a File,
        /// The new length.
        length_bytes: u64,
    },
    /// Makes the bytes of an open file durable.
    Sync(&'a Path, &'a File),
    /// Makes the entries of a directory durable.
    SyncDir(&'a Path),
    /// Creates a directory.
    CreateDir(&'a Path),
    /// Removes a directory and everything in it.
    RemoveDir(&'a Path),
    /// Renames a file or directory; an existing one with the new name is replaced.
    Rename(&'a Path, &'a Path),
    /// Swaps the names of two directories.
    Exchange(&'a Path, &'a Path),
    /// Gives a file a second name (a hard link).
    Link(&'a Path, &'a Path),
    /// Removes one name of a file.
    Remove(&'a Path),
}

impl<'a> Call<'a> {
    /// The file or directory that the call is about.
    pub fn path(&self) -> &'a Path {
        match *self {
            Call::Create(path)
            | Call::Open(path)
            | Call::Read(path)
            | Call::List(path)
            | Call::Map(path, _)
            | Call::Write { path, .. }
            | Call::SetLength { path, .. }
            | Call::Sync(path, _)
            | Call::SyncDir(path)
            | Call::CreateDir(path)
            | Call::RemoveDir(path)
            | Call::Rename(path, _)
            | Call::Exchange(path, _)
            | Call::Link(path, _)
            | Call::Remove(path) => path,
        }
    }

    /// What the call does, in one word.
    pub fn name(&self) -> &'static str {
        match self {
            Call::Create(_) => "create",
            Call::Open(_) => "open",
            Call::Read(_) => "read",
            Call::List(_) => "list",
            Call::Map(..) => "map",
            Call::Write { .. } => "write",
            Call::SetLength { .. } => "set length",
            Call::Sync(..) => "sync",
            Call::SyncDir(_) => "sync directory",
            Call::CreateDir(_) => "create directory",
            Call::RemoveDir(_) => "remove directory",
            Call::Rename(..) => "rename",
            Call::Exchange(..) => "exchange",
            Call::Link(..) => "link",
            Call::Remove(_) => "remove",
        }
    }
}

#[cfg(feature = "fault-injection")]
pub use watched::{Watching, Witness, watch};
#[cfg(feature = "fault-injection")]
pub(crate) use watched::{perform, tell};

#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub(crate) fn perform<T>(_: Call<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    act()
}

#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub(crate) fn tell(_: Call<'_>, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    act()
}

#[cfg(feature = "fault-injection")]
mod watched {
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Call;
    use crate::sync::RwLock;

    /// Stands between a store and its files.
    pub trait Witness: Send + Sync {
        /// Handles a call; `act` makes it. A call that returns something (opening, reading,
        /// mapping, listing) must be made or fail. Any other call may be skipped and still be
        /// reported as made.
        ///
        /// # Errors
        ///
        /// Any error; the store receives it as the result of the call.
        fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()>;
    }

    type Watched = (PathBuf, Arc<dyn Witness>);

    static WITNESSES: RwLock<Vec<Watched>> = RwLock::new(Vec::new());
    /// The number of witnesses. It is usually 0, and then no lock is taken.
    static COUNT: AtomicUsize = AtomicUsize::new(0);

    /// A directory is watched until this is dropped.
    pub struct Watching {
        root: PathBuf,
        witness: Arc<dyn Witness>,
    }

    impl std::fmt::Debug for Watching {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Watching").field("root", &self.root).finish_non_exhaustive()
        }
    }

    /// Sends all calls about a directory and its content to a witness.
    pub fn watch(root: impl Into<PathBuf>, witness: Arc<dyn Witness>) -> Watching {
        let root = root.into();
        let mut witnesses = WITNESSES.write();
        witnesses.push((root.clone(), witness.clone()));
        COUNT.store(witnesses.len(), Ordering::Release);
        Watching { root, witness }
    }

    impl Drop for Watching {
        fn drop(&mut self) {
            let mut witnesses = WITNESSES.write();
            let is_this =
                |(root, witness): &Watched| *root == self.root && Arc::ptr_eq(witness, &self.witness);
            if let Some(at) = witnesses.iter().position(is_this) {
                witnesses.remove(at);
            }
            COUNT.store(witnesses.len(), Ordering::Release);
        }
    }

    fn witness(path: &Path) -> Option<Arc<dyn Witness>> {
        if COUNT.load(Ordering::Acquire) == 0 {
            return None;
        }
        let witnesses = WITNESSES.read();
        witnesses.iter().find(|(root, _)| path.starts_with(root)).map(|(_, witness)| witness.clone())
    }

    /// Makes a call that returns something.
    pub(crate) fn perform<T>(call: Call<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(witness) = witness(call.path()) else { return act() };
        let (mut act, mut value) = (Some(act), None);
        witness.call(&call, &mut || {
            let act = act.take().ok_or_else(|| io::Error::other("the call was made already"))?;
            value = Some(act()?);
            Ok(())
        })?;
        value.ok_or_else(|| io::Error::other("a call that gives something back was left out"))
    }

    /// Makes a call that returns nothing.
    pub(crate) fn tell(call: Call<'_>, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(witness) = witness(call.path()) else { return act() };
        let mut act = Some(act);
        witness.call(&call, &mut || act.take().map_or(Ok(()), |act| act()))
    }
}
