//! `/proc/PID`: the kernel's information about a process.
//!
//! The directory is opened once, and everything is read through it. After the process has been
//! reaped, every such read fails, even if another process has the same pid by then.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fs::{Dir, Mode, OFlags};

use crate::record::{MAX_COMMAND_BYTES, cut_command};

/// The kernel's flag of its own threads, in field 9 of `stat`.
const PF_KTHREAD: u64 = 0x0020_0000;

/// `stat` has 52 fields: at most 20 digits each, and a name of 64 bytes.
const LONGEST_LINE_BYTES: usize = 2048;

/// An open `/proc/PID`.
pub(super) struct ProcDirectory {
    pid: u32,
    directory: OwnedFd,
}

/// The used fields of `/proc/PID/stat` and `/proc/PID/task/TID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// A letter: `R`unning, `S`leeping, `D` waiting in the kernel, `T` stopped, `t` stopped by a
    /// tracer, `Z` and `X` dead …
    pub(super) state: char,
    pub(super) parent_pid: u32,
    pub(super) process_group: u32,
    pub(super) session: u32,
    /// How many threads the whole process has, dead threads that are not reaped included.
    pub(super) thread_count: usize,
    pub(super) is_kernel_thread: bool,
    /// Its start time, in clock ticks since the boot.
    pub(super) start: u64,
}

impl Stat {
    pub(super) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

impl ProcDirectory {
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())?;
        Ok(ProcDirectory { pid, directory })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?))
    }

    pub(super) fn open_for_writing(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?))
    }

    /// Opens a file with `O_PATH`: this sends no request to its file system or driver.
    pub(super) fn open_path(&self, name: &str) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?)
    }

    /// The target of one of the kernel's links.
    pub(super) fn read_link(&self, name: &str) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.directory, name, Vec::new())?.into_bytes())
    }

    pub(super) fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        // Large enough that one call reads most of these files.
        let mut bytes = Vec::with_capacity(16 * 1024);
        self.open_file(name)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a file of one line, which the kernel returns in one call. With thousands of threads
    /// each call matters.
    fn read_line(&self, name: &str) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty())?;
        let mut line = vec![0; LONGEST_LINE_BYTES];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut line))?;
        line.truncate(length);
        Ok(line)
    }

    pub(super) fn stat(&self) -> io::Result<Stat> {
        parse_stat(&self.read_line("stat")?)
    }

    pub(super) fn thread_stat(&self, tid: u32) -> io::Result<Stat> {
        parse_stat(&self.read_line(&format!("task/{tid}/stat"))?)
    }

    /// The name of a thread.
    pub(super) fn thread_name(&self, tid: u32) -> io::Result<Vec<u8>> {
        let mut name = self.read_line(&format!("task/{tid}/comm"))?;
        name.truncate(name.trim_ascii_end().len());
        Ok(name)
    }

    /// Its start time, in seconds of the machine's present clock.
    pub(super) fn started(&self) -> io::Result<i64> {
        let ticks = self.stat()?.start;
        let seconds = i64::try_from(ticks / rustix::param::clock_ticks_per_second().max(1)).unwrap_or(0);
        let since_boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec;
        Ok(rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec - since_boot + seconds)
    }

    /// A thread's name and `stat`, in one read.
    pub(super) fn named_thread_stat(&self, tid: u32) -> io::Result<(Vec<u8>, Stat)> {
        let line = self.read_line(&format!("task/{tid}/stat"))?;
        let stat = parse_stat(&line)?;
        let begin = line.iter().position(|byte| *byte == b'(').map_or(0, |at| at + 1);
        let end = line.iter().rposition(|byte| *byte == b')').unwrap_or(begin);
        Ok((line.get(begin..end).unwrap_or_default().to_vec(), stat))
    }

    /// The ids of its threads. The kernel may leave out some while others end.
    pub(super) fn thread_ids(&self) -> io::Result<Vec<u32>> {
        self.numbers("task")
    }

    /// The numbers of its descriptors.
    pub(super) fn descriptors(&self) -> io::Result<Vec<u32>> {
        self.numbers("fd")
    }

    /// The names in a directory that are numbers: `task/TID/fd`.
    pub(super) fn numbers(&self, name: &str) -> io::Result<Vec<u32>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&self.directory, name, flags, Mode::empty())?;
        let mut numbers = Vec::new();
        for entry in Dir::new(directory)? {
            // "." and ".." are not numbers.
            numbers.extend(entry?.file_name().to_str().ok().and_then(|name| name.parse::<u32>().ok()));
        }
        Ok(numbers)
    }

    /// A number in `/proc/PID/status` (`Tgid`, `TracerPid`), or in that of a thread,
    /// `task/TID/status`.
    pub(super) fn status_number(&self, file: &str, key: &str) -> io::Result<u32> {
        let status = self.read(file)?;
        status_number(&status, key).ok_or_else(|| unreadable("status", &status))
    }

    /// A text in `status`, or in that of a thread; `None` if the kernel has no such field.
    pub(super) fn status_text(&self, file: &str, key: &str) -> io::Result<Option<String>> {
        Ok(status_text(&self.read(file)?, key).map(str::to_owned))
    }

    /// Its real and its effective user.
    pub(super) fn users(&self) -> Option<(u32, u32)> {
        let text = self.status_text("status", "Uid").ok()??;
        let mut numbers = text.split_ascii_whitespace().map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// The executable, if this process may read the link.
    pub(super) fn executable(&self) -> Option<PathBuf> {
        self.link("exe").ok()
    }

    /// The user who owns a file in it.
    pub(super) fn owner(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::fs::statat(&self.directory, name, rustix::fs::AtFlags::empty())?.st_uid)
    }

    /// The target of a link: `exe`, `fd/3`.
    pub(super) fn link(&self, name: &str) -> io::Result<PathBuf> {
        let path = rustix::fs::readlinkat(&self.directory, name, Vec::new())?;
        Ok(PathBuf::from(std::ffi::OsString::from_vec(path.into_bytes())))
    }

    /// The command line; empty if the process has cleared it. A long one is truncated to its first
    /// words and a mark: a process can fill it with megabytes of empty words.
    pub(super) fn command_line(&self) -> Vec<String> {
        let mut bytes = Vec::new();
        let first = self.open_file("cmdline").map(|file| file.take(MAX_COMMAND_BYTES as u64 + 1));
        if first.and_then(|mut first| first.read_to_end(&mut bytes)).is_err() {
            return Vec::new();
        }
        let is_cut = bytes.len() > MAX_COMMAND_BYTES;
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        if bytes.is_empty() {
            return Vec::new();
        }
        let words = bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        match is_cut {
            true => cut_command(words),
            false => words.collect(),
        }
    }
}

/// Whether this is the error of `/proc` for a process or a thread that has ended.
pub(super) fn says_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn parse_stat(line: &[u8]) -> io::Result<Stat> {
    let parsed = || {
        // The name is in parentheses and may itself have parentheses and spaces.
        let name_end = line.iter().rposition(|byte| *byte == b')')?;
        let rest = str::from_utf8(line.get(name_end + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // The first field here is field 3 of proc(5).
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Stat {
            state: field(3)?.chars().next()?,
            // Some of these are -1 or 0 where the pid namespace hides them.
            parent_pid: field(4)?.parse().unwrap_or(0),
            process_group: field(5)?.parse().unwrap_or(0),
            session: field(6)?.parse().unwrap_or(0),
            is_kernel_thread: field(9)?.parse::<u64>().ok()? & PF_KTHREAD != 0,
            thread_count: field(20)?.parse().ok()?,
            start: field(22)?.parse().ok()?,
        })
    };
    parsed().ok_or_else(|| unreadable("stat", line))
}

fn status_number(status: &[u8], key: &str) -> Option<u32> {
    status_text(status, key)?.parse().ok()
}

fn status_text<'s>(status: &'s [u8], key: &str) -> Option<&'s str> {
    let value = status
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(key.as_bytes())?.strip_prefix(b":"))?;
    str::from_utf8(value).ok().map(str::trim)
}

fn unreadable(what: &str, found: &[u8]) -> io::Error {
    let found = String::from_utf8_lossy(&found[..found.len().min(100)]);
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/PID/{what} has an unknown form: {found:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_confuse_the_stat_line() {
        let line = b"77 (a) S (b) T 1 70 60 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 3 0 999 1 1\n";
        let expected = Stat {
            state: 'T',
            parent_pid: 1,
            process_group: 70,
            session: 60,
            thread_count: 3,
            is_kernel_thread: false,
            start: 999,
        };
        assert_eq!(parse_stat(line).unwrap(), expected);
        for length in 0..40 {
            assert!(parse_stat(&line[..length]).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn this_process_is_found_with_its_threads() {
        let me = ProcDirectory::open(std::process::id()).unwrap();
        let my_tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        assert!(me.thread_ids().unwrap().contains(&my_tid));
        assert_eq!(me.status_number("status", "Tgid").unwrap(), me.pid());
        let (name, stat) = me.named_thread_stat(my_tid).unwrap();
        let expected = me.read(&format!("task/{my_tid}/comm")).unwrap();
        assert_eq!((stat.state, name.as_slice()), ('R', expected.trim_ascii_end()));
        assert_eq!(me.thread_stat(my_tid).unwrap().start, stat.start);
        assert_eq!(me.executable().unwrap(), std::env::current_exe().unwrap());
        assert_eq!(me.command_line(), std::env::args().collect::<Vec<_>>());
    }

    #[test]
    fn what_was_opened_does_not_become_another_process() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let directory = ProcDirectory::open(child.id()).unwrap();
        child.wait().unwrap();
        assert!(says_gone(&directory.stat().unwrap_err()));
        assert!(says_gone(&ProcDirectory::open(child.id()).map(|_| ()).unwrap_err()));
    }
}
