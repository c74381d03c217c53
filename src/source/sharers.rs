//! Processes that share the memory of another process without being threads of it.
//!
//! `clone` with `CLONE_VM` and without `CLONE_THREAD` makes such a process, and so does `vfork`
//! until the child calls `execve`. It continues to write while all threads of the other process are
//! stopped.
//!
//! Nothing in `/proc` names these processes, so every process is compared (`kcmp`; 0.6 µs each).
//! This is done before the process is stopped. Afterwards only pids that the kernel has assigned
//! since are compared. This is enough, because only a process that shares the memory already can
//! make a new one, and pids are assigned in ascending order.

use std::io;

use rustix::fs::{Dir, Mode, OFlags};

use super::proc_directory::ProcDirectory;
use crate::sys::kcmp::same_memory;

/// If at least this many pids were assigned since the last search, searching all processes is
/// faster.
const MAX_NEW_PIDS: u32 = 1000;

/// The known processes that share the memory of one process.
#[derive(Debug, Default)]
pub(super) struct Sharers {
    /// In ascending order.
    pub(super) pids: Vec<u32>,
    /// The last pid that the kernel had assigned before the search.
    last_pid: Option<u32>,
}

impl Sharers {
    /// Searches all processes. The process is not stopped, so there may be further ones when this
    /// returns.
    ///
    /// `ESRCH` if the process has ended. `ENOSYS` or `EPERM` if the kernel has no `kcmp` or a
    /// sandbox forbids it.
    pub(super) fn find(process: &ProcDirectory) -> io::Result<Sharers> {
        let thread = living_thread(process)?;
        // A sandbox that forbids this call also forbids it on this process.
        same_memory(std::process::id(), std::process::id())?;
        let last_pid = last_pid();
        let pids = all_pids()?.into_iter().filter(|pid| shares(process, thread, *pid)).collect();
        Ok(Sharers { pids, last_pid })
    }

    /// Searches again, and returns the processes that were not known before. `thread` is a live
    /// thread of the process.
    pub(super) fn find_new(&mut self, process: &ProcDirectory, thread: u32) -> io::Result<Vec<u32>> {
        let now = last_pid();
        let candidates = match (self.last_pid, now) {
            (Some(before), Some(now)) if (before..before.saturating_add(MAX_NEW_PIDS)).contains(&now) => {
                (before + 1..=now).collect()
            }
            _ => all_pids()?,
        };
        let is_new = |pid: &u32| !self.pids.contains(pid) && shares(process, thread, *pid);
        let new: Vec<u32> = candidates.into_iter().filter(is_new).collect();
        self.pids.extend(&new);
        self.pids.sort_unstable();
        self.last_pid = now;
        Ok(new)
    }
}

/// A thread of the process that has not ended. The first one may have ended, and then has no
/// memory.
fn living_thread(process: &ProcDirectory) -> io::Result<u32> {
    let lives = |tid: &u32| process.thread_stat(*tid).is_ok_and(|stat| !stat.is_dead());
    let found = process.thread_ids()?.into_iter().find(lives);
    found.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// Whether this is another process with the same memory.
fn shares(process: &ProcDirectory, thread: u32, pid: u32) -> bool {
    if pid == process.pid() || !same_memory(thread, pid).unwrap_or(false) {
        return false;
    }
    // It may be a thread of the process, and it has no memory if the thread has ended meanwhile.
    let other = ProcDirectory::open(pid);
    let is_process =
        other.as_ref().is_ok_and(|other| other.status_number("status", "Tgid").ok() == Some(pid));
    let lives =
        other.and_then(|other| other.stat()).is_ok_and(|stat| !stat.is_dead() && !stat.is_kernel_thread);
    let thread_lives = process.thread_stat(thread).is_ok_and(|stat| !stat.is_dead());
    is_process && lives && thread_lives
}

fn all_pids() -> io::Result<Vec<u32>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty())?;
    let mut pids = Vec::new();
    for entry in Dir::new(proc)? {
        pids.extend(entry?.file_name().to_str().ok().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(pids)
}

/// The last pid that the kernel has assigned in this pid namespace.
fn last_pid() -> Option<u32> {
    let load = std::fs::read_to_string("/proc/loadavg").ok()?;
    load.trim_end().rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    /// A program that starts a process with its memory on request, and prints the pid of that
    /// process.
    const PROGRAM: &str = r#"
        #define _GNU_SOURCE
        #include <pthread.h>
        #include <sched.h>
        #include <signal.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/prctl.h>
        #include <unistd.h>
        static int sharing(void *unused) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); }
        static void *thread(void *unused) { for (;;) pause(); }
        int main(void) {
            pthread_t t;
            pthread_create(&t, 0, thread, 0);
            if (fork() == 0) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); }
            puts("ready"); fflush(stdout);
            while (getchar() != EOF) {
                int pid = clone(sharing, (char *) malloc(65536) + 65536, CLONE_VM | SIGCHLD, 0);
                printf("%d\n", pid); fflush(stdout);
            }
        }
    "#;

    fn start(dir: &std::path::Path) -> Option<Child> {
        let (source, program) = (dir.join("program.c"), dir.join("program"));
        std::fs::write(&source, PROGRAM).unwrap();
        let built = Command::new("cc").arg("-pthread").arg("-o").args([&program, &source]).status();
        if !built.is_ok_and(|status| status.success()) {
            eprintln!("passed over: needs cc (Debian package gcc)");
            return None;
        }
        Some(Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
    }

    #[test]
    fn processes_with_the_same_memory_are_found_and_threads_and_forked_children_are_not() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let Some(mut child) = start(dir.path()) else { return };
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let pid = child.id();
        let find = || Sharers::find(&ProcDirectory::open(pid)?).map(|sharers| sharers.pids);
        match find() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
                eprintln!("passed over: needs the system call kcmp: {error}");
            }
            found => {
                assert_eq!(found.unwrap(), [0; 0]);
                let process = ProcDirectory::open(pid).unwrap();
                let mut sharers = Sharers::find(&process).unwrap();
                let mut made = Vec::new();
                for _ in 0..3 {
                    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
                    let new: u32 = lines.next().unwrap().unwrap().parse().unwrap();
                    made.push(new);
                    assert_eq!(sharers.find_new(&process, pid).unwrap(), [new]);
                    assert_eq!(sharers.find_new(&process, pid).unwrap(), [0; 0]);
                }
                made.sort_unstable();
                assert_eq!((&sharers.pids, find().unwrap()), (&made, made.clone()));
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(find().unwrap_err().raw_os_error(), Some(libc::ENOENT));
    }
}
