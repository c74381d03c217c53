//! A live process as a sink: its memory is written while all its threads are held.
//!
//! Should the writer die, the kernel lets the threads run on, and with memory half written that must not be.
//! So before the first byte the process gets a SIGSTOP. Held threads do not take it; threads that
//! are let go meet it before they return to the program, and stand still in state T, until somebody
//! sends SIGCONT. When everything is written SIGCONT takes it back, and then they are let go: the process
//! has never stopped as far as its parent can see.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::SinkError;

/// The memory of a process whose threads are held.
pub(crate) struct ProcessSink {
    pid: u32,
    memory: File,
    process: OwnedFd,
}

impl ProcessSink {
    /// For the process with this pid, and `/proc/PID/mem` of it.
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

    /// Writes what is there at `address` once more: an error where it cannot be written.
    pub(crate) fn try_to_write(&self, address: u64) -> Result<(), SinkError> {
        let mut byte = [0];
        let tried = self.memory.read_exact_at(&mut byte, address);
        tried
            .and_then(|()| self.memory.write_all_at(&byte, address))
            .map_err(self.failed("write the read-only memory of"))
    }

    /// From here on the process stands still if its threads are let go, unless it
    /// [goes on](Self::goes_on) before.
    pub(crate) fn stands_still(&self) -> Result<(), SinkError> {
        let sent = pidfd_send_signal(&self.process, Signal::STOP);
        sent.map_err(|error| self.failed("stop")(error.into()))
    }

    /// Everything is written: it goes on when its threads are let go.
    pub(crate) fn goes_on(&self) -> Result<(), SinkError> {
        let sent = pidfd_send_signal(&self.process, Signal::CONT);
        sent.map_err(|error| self.failed("let go on")(error.into()))
    }

    /// Writes at an address, whatever the protection there. Threads may write different parts at once.
    pub(crate) fn write_at(&self, address: u64, bytes: &[u8]) -> Result<(), SinkError> {
        self.memory.write_all_at(bytes, address).map_err(self.failed("write the memory of"))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> SinkError {
        let pid = self.pid;
        move |source| SinkError::LiveProcess { pid, action, source }
    }
}
