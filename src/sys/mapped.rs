//! Which processes have a file mapped or open: `/proc/*/maps` and `/proc/*/fd` of all processes.
//!
//! The answer is certain only if this process sees all processes: it runs in the first pid
//! namespace, `/proc` is mounted so that no process is hidden, and it may inspect each of them. A
//! file that was sent in a message (SCM_RIGHTS) and not yet received is invisible to everyone. For
//! processes that may not be inspected, `is_mapped_elsewhere` uses the kernel's counts. The counts
//! do not cover descriptors, nor mappings that were never accessed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The inode number of the first pid namespace on every Linux: `PROC_PID_INIT_INO`.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// The kernel's flag for its own threads, in field 9 of `stat`.
const PF_KTHREAD: u64 = 0x0020_0000;

/// A file as `/proc/PID/maps` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MappedFile {
    /// Major and minor number; the minor number has 20 bits.
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl MappedFile {
    /// Parses the fields `fe:00` and `1234` of a line. The inner `None` means that the mapping has
    /// no file.
    pub(crate) fn parse(device: &str, inode: &str) -> Option<Option<MappedFile>> {
        let (major, minor) = device.split_once(':')?;
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let device = number(major)?.checked_mul(1 << 20)?.checked_add(number(minor)?)?;
        let inode: u64 = inode.parse().ok()?;
        Some((inode != 0).then_some(MappedFile { device, inode }))
    }

    /// The same for an open file. Some file systems (btrfs, overlayfs) report other numbers here
    /// than in the maps.
    pub(crate) fn of(metadata: &fs::Metadata) -> MappedFile {
        let device = u64::from(rustix::fs::major(metadata.dev())) << 20;
        MappedFile { device: device + u64::from(rustix::fs::minor(metadata.dev())), inode: metadata.ino() }
    }
}

/// Which processes hold which files.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    /// Other processes, by file: pid and name.
    pub(crate) known: HashMap<MappedFile, Vec<(u32, String)>>,
    /// Why there may be further ones; `None` if there are none.
    pub(crate) unknown: Option<String>,
}

/// Whether other processes have pages of these mappings mapped. `pagemap` is that of the process
/// that owns the mappings; the kernel counts for each page how often it is mapped. `ranges` must be
/// all mappings that the process itself has of the file.
///
/// An error where the counts cannot be read: they need `CAP_SYS_ADMIN`.
pub(crate) fn is_mapped_elsewhere(pagemap: &fs::File, ranges: &[Range<u64>]) -> io::Result<bool> {
    /// Bits of a pagemap word: the page is in memory; the page's frame number.
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let counts = fs::File::open("/proc/kpagecount")?;
    let page_bytes = rustix::param::page_size() as u64;
    let mut own: HashMap<u64, u64> = HashMap::new();
    let mut words = vec![0u8; 8 * WORDS_PER_READ];
    for range in ranges {
        let (mut page, end) = (range.start / page_bytes, range.end / page_bytes);
        while page < end {
            let count = usize::try_from(end - page).map_or(WORDS_PER_READ, |left| left.min(WORDS_PER_READ));
            pagemap.read_exact_at(&mut words[..count * 8], page * 8)?;
            for word in words[..count * 8].as_chunks::<8>().0 {
                let word = u64::from_ne_bytes(*word);
                if word & PRESENT != 0 {
                    *own.entry(word & NUMBER).or_default() += 1;
                }
            }
            page += count as u64;
        }
    }
    if own.contains_key(&0) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    for (number, own) in own {
        let mut count = [0; 8];
        counts.read_exact_at(&mut count, number * 8)?;
        if u64::from_ne_bytes(count) > own {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The number of pagemap words in one read: 512 KiB.
const WORDS_PER_READ: usize = 64 * 1024;

/// The time limit for inspecting all processes. A process that hangs in the kernel could make the
/// inspection last without limit.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the caller is asked whether to stop.
const PAUSE_BETWEEN_CHECKS: Duration = Duration::from_millis(20);

/// Finds the processes, apart from the processes `except`, that have these files mapped or have
/// them open under these names. A name is what the kernel shows: `/memfd:x (deleted)`. Meanwhile
/// `check` is called again and again, and its error stops the search.
///
/// The search runs in a thread of its own, because reading `/proc/PID/maps` of a hanging process
/// may block.
pub(crate) fn holders<E>(
    files: HashMap<MappedFile, String>,
    except: Vec<u32>,
    mut check: impl FnMut() -> Result<(), E>,
) -> Result<Holders, E> {
    let (answer_to, answer) = channel();
    let unknown = |why: &str| Holders { unknown: Some(why.to_owned()), ..Holders::default() };
    let look = move || {
        // After the time limit the receiver is gone; that is no error.
        let _ = answer_to.send(look(&files, &except));
    };
    if std::thread::Builder::new().name("stillframe-holders".to_owned()).spawn(look).is_err() {
        return Ok(unknown("no thread can be started to look"));
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        check()?;
        match answer.recv_timeout(PAUSE_BETWEEN_CHECKS) {
            Ok(holders) => return Ok(holders),
            Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
            Err(_) => return Ok(unknown("a process could not be looked at in time")),
        }
    }
}

fn look(files: &HashMap<MappedFile, String>, except: &[u32]) -> Holders {
    let mut holders = Holders { unknown: hidden(), ..Holders::default() };
    let names: HashSet<&str> = files.values().map(String::as_str).collect();
    let processes = match fs::read_dir("/proc") {
        Ok(processes) => processes,
        Err(error) => {
            holders.unknown = Some(format!("/proc cannot be listed: {error}"));
            return holders;
        }
    };
    for process in processes.flatten() {
        let pid = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(pid) = pid.filter(|pid| !except.contains(pid)) else { continue };
        match held_by(&process.path(), files, &names) {
            Ok(held) if held.is_empty() => {}
            Ok(held) => {
                let name = name_of(pid);
                for file in held {
                    holders.known.entry(file).or_default().push((pid, name.clone()));
                }
            }
            // The process has ended.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            Err(_) if is_kernel_thread(pid) => {}
            Err(_) => {
                let why = || format!("process {pid} ({}) may not be looked at", name_of(pid));
                holders.unknown.get_or_insert_with(why);
            }
        }
    }
    holders
}

/// A process, apart from this one, that has the file mapped so that it sees writes to it. Only
/// processes that may be inspected are considered.
pub(crate) fn mapped_shared_by(metadata: &fs::Metadata) -> Option<(u32, String)> {
    let wanted = MappedFile::of(metadata);
    let maps_it = |pid: &u32| {
        let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        lines(&maps).any(|(permissions, file)| file == wanted && permissions.ends_with('s'))
    };
    let pids =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|it| it.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id()).find(maps_it).map(|pid| (pid, name_of(pid)))
}

/// The permissions and the file of each line that has a file.
fn lines(maps: &[u8]) -> impl Iterator<Item = (&str, MappedFile)> {
    maps.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields =
            line.split(|byte| *byte == b' ').skip(1).map(|field| str::from_utf8(field).unwrap_or(""));
        let (permissions, _) = (fields.next()?, fields.next()?);
        Some((permissions, MappedFile::parse(fields.next()?, fields.next()?)??))
    })
}

/// Which of the files a process holds.
fn held_by(
    process: &Path,
    files: &HashMap<MappedFile, String>,
    names: &HashSet<&str>,
) -> io::Result<HashSet<MappedFile>> {
    let mut held = HashSet::new();
    let is_own = process.ends_with(std::process::id().to_string());
    let maps = fs::read(process.join("maps"))?;
    for line in maps.split(|byte| *byte == b'\n') {
        let mut fields =
            line.split(|byte| *byte == b' ').skip(3).map(|field| str::from_utf8(field).unwrap_or(""));
        let file =
            fields.next().zip(fields.next()).and_then(|(device, inode)| MappedFile::parse(device, inode)?);
        held.extend(file.filter(|file| files.contains_key(file)));
    }
    for descriptor in fs::read_dir(process.join("fd"))?.flatten() {
        // Only files of these names are inspected: inspecting others may take long, or block.
        let Ok(name) = fs::read_link(descriptor.path()) else { continue };
        if str::from_utf8(name.as_os_str().as_bytes()).is_ok_and(|name| names.contains(name)) {
            // This program also has files open here through which it reads the memory of the
            // process.
            if is_own && is_read_only(&descriptor.file_name()) {
                continue;
            }
            let file = fs::metadata(descriptor.path()).map(|metadata| MappedFile::of(&metadata));
            held.extend(file.ok().filter(|file| files.contains_key(file)));
        }
    }
    Ok(held)
}

/// Whether a descriptor of this program is open only for reading.
fn is_read_only(number: &std::ffi::OsStr) -> bool {
    let information = fs::read_to_string(Path::new("/proc/self/fdinfo").join(number)).unwrap_or_default();
    let flags = information.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDONLY)
}

/// Why this process cannot see all processes, if that is so.
fn hidden() -> Option<String> {
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    if namespace.as_os_str() != FIRST_PID_NAMESPACE {
        return Some("processes outside of this pid namespace (container) cannot be seen".to_owned());
    }
    let first = fs::metadata("/proc/1");
    first.is_err().then(|| "other users' processes are hidden (the option hidepid of /proc)".to_owned())
}

fn name_of(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
}

fn is_kernel_thread(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().nth(6));
    flags.and_then(|flags| flags.parse::<u64>().ok()).is_some_and(|flags| flags & PF_KTHREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_maps_or_holds_a_file_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let wanted = MappedFile::of(&file.as_file().metadata().unwrap());
        let name = file.path().to_str().unwrap().to_owned();
        let files = HashMap::from([(wanted, name)]);
        let look = |except| holders(files.clone(), vec![except], || Ok::<(), ()>(())).unwrap();
        let me = std::process::id();
        assert!(!look(me).known.contains_key(&wanted));
        // The file is open in this process.
        assert_eq!(look(0).known[&wanted][0].0, me);
        assert_eq!(holders(files, vec![0], || Err(7)).unwrap_err(), 7);
    }

    #[test]
    fn pages_that_another_process_has_mapped_are_told_from_our_own() {
        let pages = 20;
        let bytes = pages * rustix::param::page_size();
        let file = fs::File::from(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes as u64).unwrap();
        let map = || memmap2::MmapOptions::new().map_raw(&file).unwrap();
        let (one, two) = (map(), map());
        super::super::process_memory::copy_own(&[range(&one), range(&two)], &mut vec![0; 2 * bytes]).unwrap();
        let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
        match is_mapped_elsewhere(&pagemap, &[range(&one), range(&two)]) {
            Err(error) => return eprintln!("passed over: needs CAP_SYS_ADMIN: {error}"),
            Ok(is_elsewhere) => assert!(!is_elsewhere),
        }
        // Without the knowledge that it is ours, the second mapping counts like one of another
        // process.
        assert!(is_mapped_elsewhere(&pagemap, &[range(&one)]).unwrap());
    }

    fn range(map: &memmap2::MmapRaw) -> Range<u64> {
        let start = map.as_ptr().addr() as u64;
        start..start + map.len() as u64
    }

    #[test]
    fn numbers_are_those_of_the_maps() {
        assert_eq!(MappedFile::parse("00:01", "77"), Some(Some(MappedFile { device: 1, inode: 77 })));
        assert_eq!(MappedFile::parse("00:00", "0"), Some(None));
        assert_eq!(MappedFile::parse("1:0", "x"), None);
        assert_eq!(
            MappedFile::parse("103:00001", "5"),
            Some(Some(MappedFile { device: (0x103 << 20) + 1, inode: 5 }))
        );
    }
}
