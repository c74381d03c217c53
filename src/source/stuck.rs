//! Threads that cannot be stopped now: they wait in the kernel, where neither a signal nor a tracer
//! reaches them.
//!
//! A thread in state `D` stops when its wait ends. For a disk this takes milliseconds. For a file
//! server that is gone it never happens, and for a child of `vfork` it happens when that child
//! calls `execve` or ends. Stopping the other threads first would pause them for the whole wait. So
//! this module polls `/proc` until no thread is stuck, and only then is the first thread stopped.
//!
//! A thread in a frozen cgroup of version 1 must not even be traced: if its process was stopped by
//! SIGSTOP before, `PTRACE_SEIZE` waits inside the kernel until the cgroup is thawed. (In a cgroup
//! of version 2 a thread stops like any other.)

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::SourceError;
use super::patience::Patience;
use super::proc_directory::{ProcDirectory, says_gone};
use crate::sys::kcmp::same_memory;

const PAUSE_BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// A thread that waits in the kernel.
struct Waiting {
    tid: u32,
    state: char,
    /// The count of voluntary context switches. It changes for a thread that waits repeatedly, for
    /// a disk for example, and is not stuck.
    switches: Option<String>,
}

/// Waits until no thread of the process is stuck. No thread is stopped or traced for that.
///
/// # Errors
///
/// [`SourceError::DidNotStop`] when the time is over, [`SourceError::Interrupted`].
pub(super) fn wait_while_stuck(process: &ProcDirectory, patience: &Patience) -> Result<(), SourceError> {
    let mut waiting = Vec::new();
    // If the process ends meanwhile, the tracer detects it.
    for tid in process.thread_ids().unwrap_or_default() {
        waiting.extend(look(process, tid));
    }
    loop {
        patience.check()?;
        let Some(stuck) = waiting.first() else { return Ok(()) };
        if patience.is_over() {
            let why = why(process, stuck.tid, stuck.state);
            return Err(patience.did_not_stop(process.pid(), why, None));
        }
        std::thread::sleep(PAUSE_BETWEEN_LOOKS);
        waiting.retain(|before| {
            let now = look(process, before.tid);
            now.is_some_and(|now| now.state == before.state && now.switches == before.switches)
        });
    }
}

/// The thread, if it waits where it cannot be stopped.
fn look(process: &ProcDirectory, tid: u32) -> Option<Waiting> {
    let state = process.thread_stat(tid).ok()?.state;
    let is_stuck = match state {
        'D' => true,
        // Kernels before Linux 6.1 show this for a stopped thread in a frozen cgroup as well.
        'T' => frozen_cgroup(process, tid).is_some(),
        _ => false,
    };
    let status = format!("task/{tid}/status");
    is_stuck.then(|| Waiting {
        tid,
        state,
        switches: process.status_text(&status, "voluntary_ctxt_switches").ok().flatten(),
    })
}

/// Why the process cannot be traced: the reason of the first thread that has one.
pub(super) fn why_not_traced(process: &ProcDirectory) -> String {
    let mut threads = process.thread_ids().unwrap_or_default().into_iter();
    let stuck = threads.find_map(|tid| look(process, tid));
    match stuck {
        Some(stuck) => why(process, stuck.tid, stuck.state),
        None => "the kernel does not answer the thread that traces it; try again later".to_owned(),
    }
}

/// Why a thread in this state does not stop, with advice for the user.
pub(super) fn why(process: &ProcDirectory, tid: u32, state: char) -> String {
    let thread = format!("its thread {tid} ({})", name(process, &format!("task/{tid}/comm")));
    if let Some(state_file) = frozen_cgroup(process, tid) {
        let cgroup = state_file.parent().unwrap_or(Path::new("/"));
        return format!(
            "{thread} is in the frozen cgroup {}; thaw it: echo THAWED > {}",
            cgroup.display(),
            state_file.display()
        );
    }
    if state != 'D' {
        return format!("{thread} is in state {state}; see proc(5), and try again later");
    }
    if let Some((child, child_name)) = vfork_child(process, tid) {
        return format!(
            "{thread} waits in vfork for process {child} ({child_name}) to call execve or to end; try again then"
        );
    }
    let symbol = process.read(&format!("task/{tid}/wchan")).unwrap_or_default();
    let symbol = String::from_utf8_lossy(&symbol).into_owned();
    let place = if symbol.is_empty() || symbol == "0" { String::new() } else { format!(" at {symbol}") };
    let call = system_call(process, tid).map(|call| format!(" in {call}")).unwrap_or_default();
    format!(
        "{thread} waits in the kernel{place}{call}, where nothing can stop it (state D): for a disk, a file \
         server or a device; try again when that answers"
    )
}

/// The file `freezer.state` of the frozen cgroup (version 1) that a thread is in.
fn frozen_cgroup(process: &ProcDirectory, tid: u32) -> Option<PathBuf> {
    let cgroups = process.read(&format!("task/{tid}/cgroup")).ok()?;
    let cgroups = String::from_utf8_lossy(&cgroups).into_owned();
    let path = cgroups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|controller| controller == "freezer").then_some(path)
    })?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let file = mounts.lines().find_map(|line| freezer_directory(line, path))?.join("freezer.state");
    let state = std::fs::read_to_string(&file).ok()?;
    matches!(state.trim(), "FROZEN" | "FREEZING").then_some(file)
}

/// The directory of a cgroup, if this line of mountinfo mounts the freezer.
fn freezer_directory(line: &str, path: &str) -> Option<PathBuf> {
    let (mount, source) = line.split_once(" - ")?;
    let source: Vec<&str> = source.split(' ').collect();
    let is_freezer = *source.first()? == "cgroup" && source.last()?.split(',').any(|it| it == "freezer");
    let mount: Vec<&str> = mount.split(' ').collect();
    let (root, at) = (mount.get(3)?, mount.get(4)?);
    let inside = Path::new(path).strip_prefix(root).ok()?;
    is_freezer.then(|| Path::new(at).join(inside))
}

/// The child for which a thread waits in `vfork`: a child that still shares its memory.
fn vfork_child(process: &ProcDirectory, tid: u32) -> Option<(u32, String)> {
    let children = process.read(&format!("task/{tid}/children")).ok()?;
    let children = String::from_utf8_lossy(&children).into_owned();
    let mut children = children.split_ascii_whitespace().filter_map(|child| child.parse().ok());
    let child: u32 = children.find(|child| same_memory(tid, *child).unwrap_or(false))?;
    let child_name = ProcDirectory::open(child).map(|child| name(&child, "comm")).unwrap_or_default();
    Some((child, child_name))
}

/// The system call in which a thread waits, if it operates on a file: the names of the call and of
/// the file.
fn system_call(process: &ProcDirectory, tid: u32) -> Option<String> {
    let line = process.read(&format!("task/{tid}/syscall")).ok()?;
    let line = str::from_utf8(&line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let number: i64 = words.next()?.parse().ok()?;
    let descriptor = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    let name = match number {
        libc::SYS_read => "read",
        libc::SYS_write => "write",
        libc::SYS_pread64 => "pread",
        libc::SYS_pwrite64 => "pwrite",
        libc::SYS_readv => "readv",
        libc::SYS_writev => "writev",
        libc::SYS_fsync => "fsync",
        libc::SYS_fdatasync => "fdatasync",
        libc::SYS_ftruncate => "ftruncate",
        libc::SYS_fallocate => "fallocate",
        libc::SYS_ioctl => "ioctl",
        libc::SYS_getdents64 => "getdents",
        _ => return None,
    };
    let file = process.link(&format!("fd/{descriptor}")).ok();
    let file = file.map(|file| format!(" of {}", file.display())).unwrap_or_default();
    Some(format!("{name}{file}"))
}

/// A name from `comm`, which the process chooses.
pub(super) fn name(process: &ProcDirectory, comm: &str) -> String {
    let name = match process.read(comm) {
        Ok(name) => name,
        Err(error) if says_gone(&error) => b"ended".to_vec(),
        Err(_) => b"?".to_vec(),
    };
    let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
    name.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_freezer_is_found_in_mountinfo_also_where_a_part_of_it_is_mounted() {
        let line = "37 31 0:34 /box /sys/fs/cgroup/freezer rw,relatime shared:7 - cgroup cgroup rw,freezer";
        let found = freezer_directory(line, "/box/a");
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup/freezer/a")));
        assert_eq!(freezer_directory(line, "/other"), None);
        let other = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        assert_eq!(freezer_directory(other, "/a"), None);
        assert_eq!(freezer_directory("37 31", "/a"), None);
    }
}
