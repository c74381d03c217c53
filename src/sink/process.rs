//! A live process as a sink: its memory is written while all its threads are paused.
//!
//! If the writer dies, the kernel resumes the threads. They must not run with memory that is half
//! written. So the process gets a SIGSTOP before the first byte is written. Paused threads do not
//! take it. Threads that are resumed take it before they return to the program, and are then
//! stopped in state T until SIGCONT arrives. When everything is written, SIGCONT cancels it, and
//! the threads are resumed: the parent of the process never sees it stopped.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::SinkError;

/// The memory of a process whose threads are paused.
pub(crate) struct ProcessSink {
    pid: u32,
    memory: File,
    process: OwnedFd,
}

impl ProcessSink {
    /// For the process with this pid. `memory` is its `/proc/PID/mem`.
    pub(crate) fn new(pid: u32, memory: File) -> Result<ProcessSink, SinkError> {
        let open = || {
            pidfd_open(Pid::from_raw(pid.cast_signed()).ok_or(rustix::io::Errno::SRCH)?, PidfdFlags::empty())
        };
        let process = open().map_err(|error| SinkError::LiveProcess {
            pid,
            action: "get hold of",
            source: error.into(),
        })?;
        Ok(ProcessSink { pid, memory, process })
    }

    /// Writes the present bytes at `address` once more: an error if that memory cannot be written.
    pub(crate) fn try_to_write(&self, address: u64) -> Result<(), SinkError> {
        let mut byte = [0];
        let tried = self.memory.read_exact_at(&mut byte, address);
        tried
            .and_then(|()| self.memory.write_all_at(&byte, address))
            .map_err(self.failed("write the read-only memory of"))
    }

    /// From now on the process is stopped when its threads are resumed, unless
    /// [`goes_on`](Self::goes_on) is called before.
    pub(crate) fn stands_still(&self) -> Result<(), SinkError> {
        let sent = pidfd_send_signal(&self.process, Signal::STOP);
        sent.map_err(|error| self.failed("stop")(error.into()))
    }

    /// Everything is written: the process continues when its threads are resumed.
    pub(crate) fn goes_on(&self) -> Result<(), SinkError> {
        let sent = pidfd_send_signal(&self.process, Signal::CONT);
        sent.map_err(|error| self.failed("let go on")(error.into()))
    }

    /// Writes at an address, regardless of its protection. Threads may write different parts at the
    /// same time.
    pub(crate) fn write_at(&self, address: u64, bytes: &[u8]) -> Result<(), SinkError> {
        self.memory.write_all_at(bytes, address).map_err(self.failed("write the memory of"))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> SinkError {
        let pid = self.pid;
        move |source| SinkError::LiveProcess { pid, action, source }
    }
}
