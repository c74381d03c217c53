//! Opens the files behind the mappings of a process, to read them directly.
//!
//! Bytes of a file that are not in the memory of the process are read from the file. A read through
//! the mapping would allocate them, fill a hole of a file in memory, or send a request to a
//! userfaultfd or to the server of a file system. For the same reason nothing here accesses a file
//! system that may depend on a server: the tables of mounts give the type of each. A file is found
//!
//! 1. by `map_files`, which the kernel shows to processes with `CAP_SYS_ADMIN` or
//!    `CAP_CHECKPOINT_RESTORE`;
//! 2. by its name, as the process sees it;
//! 3. by an open descriptor of the process, or as its executable: files without a name, memfds.
//!
//! A file found by the second or third way is only used if it is the mapped file: the same file
//! system and inode number.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::Arc;

use memmap2::MmapOptions;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::mounts::{FileSystem, Mounts};
use crate::left_out::WhyLeftOut;
use crate::ranges::Ranges;
use crate::source::holes::data_ranges;
use crate::source::maps::{self, MapsLine};
use crate::source::proc_directory::ProcDirectory;
use crate::sys::pagemap::Pages;

/// The kernel's magic number of the file system of files in memory: shared memory, memfd, /dev/shm.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// The device `/dev/zero`.
const ZERO_DEVICE: (u32, u32) = (1, 5);

/// The object behind a mapping.
#[derive(Clone, Debug)]
pub(super) enum Backing {
    /// Nothing: an absent page is zeros.
    Nothing,
    /// A file that can be read directly.
    File(Arc<OpenFile>),
    /// An object that cannot be read directly, and why not.
    Unknown(WhyLeftOut),
}

/// A file behind mappings.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    pub(super) length_bytes: u64,
    file_system: FileSystem,
}

impl OpenFile {
    /// The parts of `within` that may hold anything but zeros, up to the end of the file.
    pub(super) fn data(&self, within: Range<u64>) -> Ranges {
        let within = within.start..within.end.min(self.length_bytes);
        let whole = || Ranges::from(within.clone());
        match self.file_system {
            FileSystem::Memory | FileSystem::DiskWithHoles => {
                data_ranges(&self.file, within.clone()).unwrap_or_else(|_| whole())
            }
            _ => whole(),
        }
    }

    /// Whether it is in memory, and nowhere else.
    pub(super) fn is_memory(&self) -> bool {
        matches!(self.file_system, FileSystem::Memory | FileSystem::HugePages)
    }

    /// Whether a mapping may show it as it was before.
    pub(super) fn may_be_newer(&self) -> bool {
        self.file_system == FileSystem::Overlay
    }
}

/// A mapped file by its device, number and name, and whether it may be written through the mapping.
type Key = ((u32, u32), u64, Vec<u8>, bool);

/// What is behind the mappings of one process.
pub(super) struct Backings<'a> {
    process: &'a ProcDirectory,
    known: HashMap<Key, Backing>,
    /// Of the process, of this program.
    mounts: Option<(Mounts, Mounts)>,
    /// The file system of memfds and of shared memory without a name.
    shared_memory: Option<(u32, u32)>,
    /// The open files of the process by name.
    descriptors: Option<HashMap<Vec<u8>, Vec<String>>>,
}

impl<'a> Backings<'a> {
    pub(super) fn new(process: &'a ProcDirectory) -> Self {
        let shared_memory = rustix::fs::memfd_create("stillframe", rustix::fs::MemfdFlags::CLOEXEC);
        let shared_memory = shared_memory.and_then(rustix::fs::fstat).ok();
        Backings {
            process,
            known: HashMap::new(),
            mounts: None,
            shared_memory: shared_memory.map(|stat| device(stat.st_dev)),
            descriptors: None,
        }
    }

    /// What is behind a mapping, which the process has just so.
    pub(super) fn of(&mut self, line: &MapsLine) -> Backing {
        if line.inode == 0 {
            // Without a file, or something of the kernel's.
            return if line.absent_is_zero {
                Backing::Nothing
            } else {
                Backing::Unknown(WhyLeftOut::Refused)
            };
        }
        let is_shared = line.mapping.protection.shared;
        let name = line.mapping.name.as_bytes();
        if name.starts_with(b"/secretmem") && self.file_system(line) == FileSystem::Other {
            return Backing::Unknown(WhyLeftOut::Secret);
        }
        if !is_shared && line.flags.is_hugetlb && name.starts_with(b"/anon_hugepage") {
            return match self.is_mounted(line) {
                false => Backing::Nothing,
                true => self.file(line),
            };
        }
        let is_written = is_shared && line.mapping.protection.write;
        let key = (line.device, line.inode, name.to_owned(), is_written);
        if let Some(backing) = self.known.get(&key) {
            return backing.clone();
        }
        let backing = self.file(line);
        self.known.insert(key, backing.clone());
        backing
    }

    /// This program's vDSO as a file with an offset, if it begins with the same bytes as the vDSO
    /// of the process.
    pub(super) fn own_vdso(&self, line: &MapsLine, pages: &Pages) -> Option<(Arc<OpenFile>, u64)> {
        let start = line.mapping.range.start();
        let page_bytes = rustix::param::page_size();
        // Its first page contains the ELF header, which the loader of programs reads.
        pages.held.first().filter(|held| held.start == start)?;
        let lines = maps::parse(&std::fs::read("/proc/self/maps").ok()?).ok()?;
        let own = lines.into_iter().find(|own| own.mapping.name == line.mapping.name)?.mapping.range;
        let file = File::open("/proc/self/mem").ok()?;
        let (mut here, mut there) = (vec![0; page_bytes], vec![0; page_bytes]);
        file.read_exact_at(&mut here, own.start()).ok()?;
        self.process.open_file("mem").ok()?.read_exact_at(&mut there, start).ok()?;
        let is_same = own.length_bytes() == line.mapping.range.length_bytes() && here == there;
        let file = OpenFile { file, length_bytes: u64::MAX, file_system: FileSystem::Other };
        is_same.then(|| (Arc::new(file), own.start()))
    }

    fn file(&mut self, line: &MapsLine) -> Backing {
        let file_system = self.file_system(line);
        match file_system {
            FileSystem::Server => return Backing::Unknown(WhyLeftOut::FileServer),
            FileSystem::Other => return Backing::Unknown(WhyLeftOut::FileClosed),
            _ => {}
        }
        match self.find(line) {
            Some(Found::Zeros(_)) if !line.mapping.protection.shared => Backing::Nothing,
            Some(Found::File(file)) => match open_file(file, file_system) {
                Some(file) if self.is_as_it_was_mapped(&file, line) => Backing::File(Arc::new(file)),
                _ => Backing::Unknown(WhyLeftOut::FileClosed),
            },
            _ => Backing::Unknown(WhyLeftOut::FileClosed),
        }
    }

    /// Whether a mapping of this file shows its present contents. On overlayfs it may show the file
    /// of the lower layer, as it was before a write, unless the process opened it for writing.
    fn is_as_it_was_mapped(&self, file: &OpenFile, line: &MapsLine) -> bool {
        let protection = line.mapping.protection;
        if file.file_system != FileSystem::Overlay || protection.shared && protection.write {
            return true;
        }
        let changed = file.file.metadata().map(|metadata| metadata.ctime());
        matches!((changed, self.process.started()), (Ok(changed), Ok(started)) if changed < started)
    }

    fn mounts(&mut self) -> &(Mounts, Mounts) {
        let process = self.process;
        self.mounts.get_or_insert_with(|| {
            let own = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
            (Mounts::parse(&process.read("mountinfo").unwrap_or_default()), Mounts::parse(&own))
        })
    }

    fn is_mounted(&mut self, line: &MapsLine) -> bool {
        let (theirs, own) = self.mounts();
        theirs.file_system(line.device).or(own.file_system(line.device)).is_some()
    }

    fn file_system(&mut self, line: &MapsLine) -> FileSystem {
        if self.shared_memory == Some(line.device) {
            return FileSystem::Memory;
        }
        let (theirs, own) = self.mounts();
        let mounted = theirs.file_system(line.device).or(own.file_system(line.device));
        mounted.unwrap_or(match line.device.0 {
            _ if line.flags.is_hugetlb => FileSystem::HugePages,
            0 => FileSystem::Other,
            // A real device that is mounted elsewhere: the lower layers of a container.
            _ => FileSystem::Disk,
        })
    }

    /// Finds the file in one of the three ways.
    fn find(&mut self, line: &MapsLine) -> Option<Found> {
        let range = line.mapping.range;
        let map_file = format!("map_files/{:x}-{:x}", range.start(), range.end());
        if let Ok(path) = self.process.open_path(&map_file) {
            return reopen(&path);
        }
        if let Some(path) = self.by_name(line)
            && let Some(found) = reopen(&path).filter(|found| found.is_mapped_in(line))
        {
            return Some(found);
        }
        let candidates = self.descriptors().get(line.mapping.name.as_bytes()).cloned().unwrap_or_default();
        candidates.iter().find_map(|name| {
            let number = name.strip_prefix("fd/");
            let info = number.and_then(|number| self.process.read(&format!("fdinfo/{number}")).ok());
            if info.as_deref().and_then(inode_in).is_some_and(|inode| inode != line.inode) {
                return None;
            }
            let path = self.process.open_path(name).ok()?;
            reopen(&path).filter(|found| found.is_mapped_in(line))
        })
    }

    fn by_name(&mut self, line: &MapsLine) -> Option<OwnedFd> {
        let name = line.mapping.name.as_bytes();
        let path = name.strip_prefix(b"/")?;
        let own_namespace = std::fs::read_link("/proc/self/ns/mnt").ok()?;
        let is_same = self.process.read_link("ns/mnt").ok()? == own_namespace.as_os_str().as_bytes();
        let (theirs, own) = self.mounts();
        if !(if is_same { own } else { theirs }).asks_no_server(name) {
            return None;
        }
        // The kernel names files as seen from this program's root, if they are visible there.
        let root = match is_same {
            true => rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?,
            false => self.process.open_path("root").ok()?,
        };
        let (flags, resolve) =
            (OFlags::PATH | OFlags::CLOEXEC, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS);
        rustix::fs::openat2(root, OsStr::from_bytes(path), flags, Mode::empty(), resolve).ok()
    }

    fn descriptors(&mut self) -> &HashMap<Vec<u8>, Vec<String>> {
        let process = self.process;
        self.descriptors.get_or_insert_with(|| {
            let mut by_name: HashMap<Vec<u8>, Vec<String>> = HashMap::new();
            let numbers = process.descriptors().unwrap_or_default().into_iter();
            for name in numbers.map(|number| format!("fd/{number}")).chain(["exe".to_owned()]) {
                if let Ok(target) = process.read_link(&name) {
                    by_name.entry(target).or_default().push(name);
                }
            }
            by_name
        })
    }
}

/// The result of a look-up of a file.
enum Found {
    File(File),
    /// The device that reads as zeros, with its file system and inode number.
    Zeros(((u32, u32), u64)),
}

impl Found {
    /// Whether it is the mapped file. Some file systems (btrfs, overlayfs) report other numbers in
    /// a mapping than in `stat`. In that case the file is mapped, and the numbers of that mapping
    /// are compared.
    fn is_mapped_in(&self, line: &MapsLine) -> bool {
        let file = match self {
            Found::Zeros(file) => return *file == (line.device, line.inode),
            Found::File(file) => file,
        };
        let Ok(metadata) = file.metadata() else { return false };
        if metadata.ino() == line.inode && device(metadata.dev()) == line.device {
            return true;
        }
        // The mapping is never accessed.
        let Ok(mapped) = MmapOptions::new().len(1).map_raw_read_only(file) else { return false };
        let address = mapped.as_ptr().addr() as u64;
        let lines = std::fs::read("/proc/self/maps").ok().and_then(|maps| maps::parse(&maps).ok());
        lines.into_iter().flatten().any(|own| {
            own.mapping.range.start() == address && (own.device, own.inode) == (line.device, line.inode)
        })
    }
}

/// Opens the file for reading, if it is a regular file or the device of zeros.
fn reopen(path: &OwnedFd) -> Option<Found> {
    let name = format!("/proc/self/fd/{}", path.as_raw_fd());
    let metadata = std::fs::metadata(&name).ok()?;
    if metadata.file_type().is_char_device() {
        return (device(metadata.rdev()) == ZERO_DEVICE)
            .then(|| Found::Zeros((device(metadata.dev()), metadata.ino())));
    }
    if !metadata.is_file() {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    // Without an update of the access time, if we are permitted to omit it.
    let open = |flags| rustix::fs::open(&name, flags, Mode::empty());
    open(flags | OFlags::NOATIME).or_else(|_| open(flags)).ok().map(|file| Found::File(File::from(file)))
}

fn open_file(file: File, file_system: FileSystem) -> Option<OpenFile> {
    let length_bytes = file.metadata().ok()?.len();
    // A ramfs may look like a tmpfs, but fills its holes when they are read.
    let is_memory = rustix::fs::fstatfs(&file).ok()?.f_type == TMPFS_MAGIC;
    (is_memory == (file_system == FileSystem::Memory)).then_some(OpenFile { file, length_bytes, file_system })
}

/// The inode number in `/proc/PID/fdinfo/N`; older kernels do not report it.
fn inode_in(info: &[u8]) -> Option<u64> {
    let line = info.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"ino:"))?;
    str::from_utf8(line).ok()?.trim().parse().ok()
}

fn device(number: u64) -> (u32, u32) {
    (rustix::fs::major(number), rustix::fs::minor(number))
}
