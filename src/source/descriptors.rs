//! The open files of a process, read from `/proc/PID/fd` and `/proc/PID/fdinfo`.
//!
//! Each descriptor costs some microseconds, and a process may have thousands. So they are examined
//! before the process is paused. During the pause they are only listed, and the positions of
//! regular files are read; the rest is taken from the first pass. If a descriptor is closed and
//! opened again between the two passes, its old file may be recorded. A rollback then finds a
//! difference, and reports or refuses it; it never takes different files for the same one.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};

use super::proc_directory::ProcDirectory;
use crate::descriptors::{Descriptor, Descriptors};

/// Reads all descriptors; `None` without the permission to see them.
pub(super) fn look(process: &ProcDirectory) -> Option<Descriptors> {
    look_again(process, process.pid(), &Descriptors::default())
}

/// Reads the descriptors of a process that is paused now and had `before` a short time ago. `tid`
/// is one of its threads that has not ended.
pub(super) fn look_again(process: &ProcDirectory, tid: u32, before: &Descriptors) -> Option<Descriptors> {
    let known: HashMap<u32, &Descriptor> = before.0.iter().map(|it| (it.number, it)).collect();
    let mut numbers = process.numbers(&format!("task/{tid}/fd")).ok()?;
    numbers.sort_unstable();
    let directory = process.open_path(&format!("task/{tid}/fdinfo")).ok()?;
    let mut found = Vec::with_capacity(numbers.len());
    for number in numbers {
        // It was closed after it was listed.
        match known.get(&number) {
            Some(known) if !known.is_file => found.push((*known).clone()),
            Some(known) => {
                let Ok(Information { inode, flags, mount, position }) = information(&directory, number)
                else {
                    continue;
                };
                if (inode, flags, mount) == (known.inode, known.flags, known.mount) {
                    found.push(Descriptor { position, ..(*known).clone() });
                } else {
                    found.extend(descriptor(process, tid, &directory, number).ok());
                }
            }
            None => found.extend(descriptor(process, tid, &directory, number).ok()),
        }
    }
    Some(Descriptors(found))
}

/// The first lines of `/proc/PID/fdinfo/N`.
struct Information {
    position: u64,
    flags: u32,
    mount: u64,
    /// 0 before Linux 5.14.
    inode: u64,
}

fn information(directory: &OwnedFd, number: u32) -> io::Result<Information> {
    let file =
        rustix::fs::openat(directory, number.to_string(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // The needed lines come first; for an epoll descriptor, a line for each file follows.
    let mut text = [0; 256];
    let length = rustix::io::read(&file, &mut text)?;
    let field = |key: &[u8]| {
        let lines = text[..length].split(|byte| *byte == b'\n');
        let value = lines.filter_map(|line| line.strip_prefix(key)).next()?;
        str::from_utf8(value).ok().map(str::trim)
    };
    let number_of = |key: &[u8]| field(key).and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
    Ok(Information {
        position: number_of(b"pos:"),
        flags: field(b"flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok()).unwrap_or(0),
        mount: number_of(b"mnt_id:"),
        inode: number_of(b"ino:"),
    })
}

fn descriptor(process: &ProcDirectory, tid: u32, directory: &OwnedFd, number: u32) -> io::Result<Descriptor> {
    let target = process.read_link(&format!("task/{tid}/fd/{number}"))?;
    let Information { position, flags, mount, inode } = information(directory, number)?;
    let mut found = Descriptor { number, target, flags, mount, inode, ..Descriptor::default() };
    if found.is_path() {
        // This sends no request to a file server.
        let at = process.open_path(&format!("task/{tid}/fd/{number}"))?;
        let wanted = StatxFlags::TYPE | StatxFlags::BTIME;
        let how = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        if let Ok(status) = rustix::fs::statx(&at, "", how, wanted) {
            let mode = u32::from(status.stx_mode);
            found.is_file = FileType::from_raw_mode(mode) == FileType::RegularFile;
            if status.stx_mask & StatxFlags::BTIME.bits() != 0 {
                let seconds = u64::try_from(status.stx_btime.tv_sec).unwrap_or(0);
                found.born_ns =
                    seconds.saturating_mul(1_000_000_000).saturating_add(status.stx_btime.tv_nsec.into());
            }
        }
    }
    if found.is_file {
        found.position = position;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn this_process_has_what_it_has_opened_and_positions_are_those_of_the_second_look() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        let me = ProcDirectory::open(std::process::id()).unwrap();
        let before = look(&me).unwrap();
        file.write_all(b"twelve bytes").unwrap();
        file.seek(SeekFrom::Start(5)).unwrap();
        let found = look_again(&me, me.pid(), &before).unwrap();
        let of = |all: &Descriptors, raw: i32| {
            all.0.iter().find(|it| it.number == raw.cast_unsigned()).cloned().unwrap()
        };
        let raw = file.as_file().as_raw_fd();
        let (then, now) = (of(&before, raw), of(&found, raw));
        assert_eq!((then.position, now.position, now.is_file), (0, 5, true));
        assert!(now.is_same(&then) && now.is_for_writing() && now.inode != 0);
        assert_eq!(now.name(), file.path().as_os_str().as_encoded_bytes());
        let pipe = of(&found, reader.as_raw_fd());
        assert!(pipe.target.starts_with(b"pipe:[") && !pipe.is_file && !pipe.is_for_writing());
    }
}
