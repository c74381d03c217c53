//! A real file system in user space that passes everything on to a directory, but for what it is told to lack.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::needs::passed_over;

/// What a file system cannot do, and what it answers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lacks {
    /// Renaming only where nothing is overwritten, and exchanging.
    pub(crate) rename_flags: Option<Errno>,
    pub(crate) links: Option<Errno>,
    pub(crate) sync_dir: Option<Errno>,
    pub(crate) locks: Option<Errno>,
    pub(crate) modes: Option<Errno>,
    /// Mapping a file shared with others: it is opened past the page cache.
    pub(crate) shared_mappings: bool,
}

/// Mounted until it is dropped.
pub(crate) struct Mounted {
    _session: BackgroundSession,
    pub(crate) path: PathBuf,
}

/// Mounts one over the directory `below` at `path`, which must be an empty directory; `None` where nobody may.
pub(crate) fn mount(below: &Path, path: &Path, lacks: Lacks) -> Option<Mounted> {
    let file_system = Passing { lacks, nodes: Arc::default(), root: below.to_owned() };
    match fuser::spawn_mount(file_system, path, &Config::default()) {
        Ok(session) => Some(Mounted { _session: session, path: path.to_owned() }),
        Err(error) => {
            passed_over(&format!("FUSE cannot be used here (/dev/fuse, and root or the Debian package fuse3): {error}"));
            None
        }
    }
}

#[derive(Default)]
struct Nodes {
    /// Where each was seen last, below the root.
    paths: HashMap<u64, PathBuf>,
    files: HashMap<u64, Arc<File>>,
    next_file: u64,
}

struct Passing {
    lacks: Lacks,
    nodes: Arc<Mutex<Nodes>>,
    root: PathBuf,
}

const TTL: Duration = Duration::ZERO;
const GENERATION: Generation = Generation(0);

impl Passing {
    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, node: INodeNo) -> io::Result<PathBuf> {
        if node == INodeNo::ROOT {
            return Ok(self.root.clone());
        }
        self.nodes().paths.get(&node.0).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn below(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    fn file(&self, handle: FileHandle) -> io::Result<Arc<File>> {
        self.nodes().files.get(&handle.0).cloned().ok_or_else(|| io::Error::from_raw_os_error(9))
    }

    fn add(&self, file: File) -> FileHandle {
        let mut nodes = self.nodes();
        nodes.next_file += 1;
        let number = nodes.next_file;
        nodes.files.insert(number, Arc::new(file));
        FileHandle(number)
    }

    fn look(&self, path: PathBuf) -> io::Result<FileAttr> {
        let found = path.symlink_metadata()?;
        let attributes = self.attributes(&found);
        self.nodes().paths.insert(found.ino(), path);
        Ok(attributes)
    }

    fn attributes(&self, found: &fs::Metadata) -> FileAttr {
        let is_root = self.root.metadata().is_ok_and(|root| root.ino() == found.ino());
        let time = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        FileAttr {
            ino: if is_root { INodeNo::ROOT } else { INodeNo(found.ino()) },
            size: found.len(),
            blocks: found.blocks(),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: kind(found.file_type()),
            perm: u16::try_from(found.mode() & 0o7777).unwrap_or(0),
            nlink: small(found.nlink()),
            uid: found.uid(),
            gid: found.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn opened(&self) -> FopenFlags {
        if self.lacks.shared_mappings { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() }
    }

    fn rename_all(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        for path in self.nodes().paths.values_mut() {
            if let Ok(rest) = path.strip_prefix(from) {
                *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
        Ok(())
    }
}

fn kind(of: fs::FileType) -> FileType {
    use std::os::unix::fs::FileTypeExt;
    match of {
        of if of.is_dir() => FileType::Directory,
        of if of.is_symlink() => FileType::Symlink,
        of if of.is_fifo() => FileType::NamedPipe,
        _ => FileType::RegularFile,
    }
}

/// Answers with what was done, or with why it was not.
macro_rules! answer {
    ($reply:expr, $done:expr, |$value:ident| $answer:expr) => {
        match (|| -> io::Result<_> { $done })() {
            Ok($value) => $answer,
            Err(error) => $reply.error(Errno::from(error)),
        }
    };
}

impl Filesystem for Passing {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Otherwise the kernel has locks of its own for it.
        if self.lacks.locks.is_some() {
            let _ = config.add_capabilities(InitFlags::FUSE_FLOCK_LOCKS);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(reply, self.look(self.below(parent, name)?), |found| reply.entry(&TTL, &found, GENERATION));
    }

    fn getattr(&self, _: &Request, node: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let found = || match handle {
            Some(handle) => self.file(handle)?.metadata(),
            None => match self.path(node).and_then(|path| path.symlink_metadata()) {
                Ok(found) if found.ino() == node.0 || node == INodeNo::ROOT => Ok(found),
                // It has no name any more and is open still.
                _ => {
                    let files: Vec<_> = self.nodes().files.values().cloned().collect();
                    let open = files.iter().filter_map(|file| file.metadata().ok());
                    open.into_iter().find(|found| found.ino() == node.0).ok_or_else(|| io::ErrorKind::NotFound.into())
                }
            },
        };
        answer!(reply, found(), |found| reply.attr(&TTL, &self.attributes(&found)));
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let (Some(_), Some(error)) = (mode, self.lacks.modes) {
            return reply.error(error);
        }
        let change = || {
            let path = self.path(node);
            if let Some(mode) = mode {
                fs::set_permissions(path.as_ref().map_err(|error| error.kind())?, fs::Permissions::from_mode(mode))?;
            }
            if let Some(size) = size {
                match handle {
                    Some(handle) => self.file(handle)?.set_len(size)?,
                    None => fs::OpenOptions::new().write(true).open(path.as_ref().map_err(|error| error.kind())?)?.set_len(size)?,
                }
            }
            match handle {
                Some(handle) => self.file(handle)?.metadata(),
                None => path?.symlink_metadata(),
            }
        };
        answer!(reply, change(), |found| reply.attr(&TTL, &self.attributes(&found)));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let make = || {
            let path = self.below(parent, name)?;
            fs::DirBuilder::new().mode(mode).create(&path)?;
            self.look(path)
        };
        answer!(reply, make(), |found| reply.entry(&TTL, &found, GENERATION));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer!(reply, fs::remove_file(self.below(parent, name)?), |_done| reply.ok());
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer!(reply, fs::remove_dir(self.below(parent, name)?), |_done| reply.ok());
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if let (true, Some(error)) = (!flags.is_empty(), self.lacks.rename_flags) {
            return reply.error(error);
        }
        let rename = || {
            let (from, to) = (self.below(parent, name)?, self.below(new_parent, new_name)?);
            if flags.contains(RenameFlags::RENAME_NOREPLACE) && to.symlink_metadata().is_ok() {
                return Err(io::Error::from_raw_os_error(17));
            }
            if flags.contains(RenameFlags::RENAME_EXCHANGE) {
                let aside = to.with_extension("exchanged");
                self.rename_all(&to, &aside)?;
                self.rename_all(&from, &to)?;
                return self.rename_all(&aside, &from);
            }
            self.rename_all(&from, &to)
        };
        answer!(reply, rename(), |_done| reply.ok());
    }

    fn link(&self, _: &Request, node: INodeNo, new_parent: INodeNo, new_name: &OsStr, reply: ReplyEntry) {
        if let Some(error) = self.lacks.links {
            return reply.error(error);
        }
        let link = || {
            let (path, second) = (self.path(node)?, self.below(new_parent, new_name)?);
            fs::hard_link(&path, &second)?;
            Ok(self.attributes(&second.symlink_metadata()?))
        };
        answer!(reply, link(), |found| reply.entry(&TTL, &found, GENERATION));
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let open = || {
            let writes = flags.0 & 0b11 != 0;
            let file = fs::OpenOptions::new().read(true).write(writes).open(self.path(node)?)?;
            Ok(self.add(file))
        };
        answer!(reply, open(), |handle| reply.opened(handle, self.opened()));
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let create = || {
            let path = self.below(parent, name)?;
            let is_new = flags & 0o200 != 0;
            let mut options = fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).create_new(is_new).mode(mode);
            let file = options.open(&path)?;
            Ok((self.look(path)?, self.add(file)))
        };
        answer!(reply, create(), |made| reply.created(&TTL, &made.0, GENERATION, made.1, self.opened()));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = || {
            let (file, mut bytes, mut read) = (self.file(handle)?, vec![0; size as usize], 0);
            loop {
                match file.read_at(&mut bytes[read..], offset + read as u64)? {
                    0 => break,
                    more => read += more,
                }
            }
            bytes.truncate(read);
            Ok(bytes)
        };
        answer!(reply, read(), |bytes| reply.data(&bytes));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = u32::try_from(data.len()).unwrap_or(u32::MAX);
        answer!(reply, self.file(handle)?.write_all_at(data, offset), |_done| reply.written(written));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.nodes().files.remove(&handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        answer!(reply, self.file(handle)?.sync_all(), |_done| reply.ok());
    }

    fn readdir(&self, _: &Request, node: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let list = || {
            let mut entries: Vec<_> = fs::read_dir(self.path(node)?)?.collect::<io::Result<_>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for (entry, at) in entries.iter().zip(1u64..).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
                let found = entry.path().symlink_metadata()?;
                if reply.add(INodeNo(found.ino()), at, kind(found.file_type()), entry.file_name()) {
                    break;
                }
            }
            Ok(())
        };
        answer!(reply, { let mut list = list; list() }, |_done| reply.ok());
    }

    fn fsyncdir(&self, _: &Request, node: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.lacks.sync_dir {
            Some(error) => reply.error(error),
            None => answer!(reply, File::open(self.path(node)?)?.sync_all(), |_done| reply.ok()),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 30, 1 << 29, 1 << 29, 1 << 20, 1 << 20, 4096, 255, 4096);
    }

    fn setlk(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(self.lacks.locks.unwrap_or(Errno::ENOSYS));
    }
}
