//! Removes signals from the queues of a process whose threads are paused, and adds others.
//!
//! A tracer sees each signal before its thread does, and may drop it. So a thread that is resumed
//! with one unblocked signal in its mask, and that signal in its queue, stops again before it runs
//! an instruction of its program. If the signal is blocked at that moment, it returns to the queue
//! with the details (`siginfo_t`) that the tracer has set. This is how a signal gets into a queue
//! and looks as if another thread or the kernel had sent it.
//!
//! ```text
//! remove: paused ── unblock only S, resume ──> about to get S ── interrupt, drop S ──> paused
//! add:    S is sent; paused ── the same ────> about to get S; set siginfo, block all ──┐
//!         paused <── S is in the queue again <────────── interrupt, resume with S <────┘
//! ```
//!
//! All threads are left with the signal mask that this needed: a rollback sets registers and masks
//! afterwards.

use std::io;
use std::time::{Duration, Instant};

use crate::signals::Signal;
use crate::sys::ptrace::{self, Stop};

/// The changes to the signals of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settlement {
    /// Threads that are about to receive a signal that must be dropped.
    pub(crate) dropped: Vec<u32>,
    /// One change for each signal number and queue.
    pub(crate) changes: Vec<Change>,
}

impl Settlement {
    /// Whether nothing is to be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.dropped.is_empty() && self.changes.is_empty()
    }
}

/// The change of one signal number in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// The thread with the queue, or the thread that receives the signals of the process.
    pub(crate) tid: u32,
    pub(crate) signal: i32,
    /// How many signals there are; all of them are removed.
    pub(crate) taken_out: usize,
    /// The signals that are then added to the thread's queue, in order.
    pub(crate) put_in: Vec<Signal>,
}

/// How long a thread may take to stop again. It has nothing to do.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many SIGSTOPs may come first.
const MAX_STOPS: usize = 4;
const ALL_SIGNALS: u64 = u64::MAX;

/// Drops the signal that a thread is about to receive. Returns the stop in which the thread is then
/// held.
pub(super) fn drop_signal(tid: u32) -> io::Result<Stop> {
    hold_again(tid, 0)
}

/// Applies a change to a queue. The thread is held, but not about to receive a signal, both before
/// and afterwards.
pub(super) fn change(pid: u32, change: &Change) -> io::Result<()> {
    let Change { tid, signal, taken_out, put_in } = change;
    let only_this = ALL_SIGNALS & !(1 << (signal - 1));
    ptrace::set_signal_mask(*tid, only_this)?;
    for _ in 0..*taken_out {
        let _ = next_of_queue(*tid, *signal)?;
        hold_again(*tid, 0)?;
    }
    for _ in put_in {
        ptrace::send_to_thread(pid, *tid, *signal)?;
    }
    for Signal(information) in put_in {
        let mut there = next_of_queue(*tid, *signal)?;
        let length = there.len().min(information.len());
        there[..length].copy_from_slice(&information[..length]);
        ptrace::set_signal_information(*tid, &there)?;
        ptrace::set_signal_mask(*tid, ALL_SIGNALS)?;
        hold_again(*tid, *signal)?;
        ptrace::set_signal_mask(*tid, only_this)?;
    }
    Ok(())
}

/// Resumes a held thread until it receives the next of its signals, which must be this one.
fn next_of_queue(tid: u32, expected: i32) -> io::Result<ptrace::SignalInformation> {
    for _ in 0..MAX_STOPS {
        ptrace::resume(tid)?;
        match next_stop(tid)? {
            Stop::Signal { signal, information } if signal == expected => return Ok(information),
            // A SIGSTOP of the thread alone: the process has another one. A thread that was stopped
            // when it was interrupted stops once more.
            Stop::Signal { signal: libc::SIGSTOP, .. } | Stop::Interrupted | Stop::WithProcess => {}
            other => return Err(unexpected(other)),
        }
    }
    Err(io::Error::other("a thread is stopped over and over"))
}

/// Holds a thread that is about to receive a signal, before it runs. `signal` is 0, or the same
/// signal, which then returns to its queue.
fn hold_again(tid: u32, signal: i32) -> io::Result<Stop> {
    ptrace::interrupt(tid)?;
    ptrace::resume_into(tid, signal)?;
    match next_stop(tid)? {
        stop @ (Stop::Interrupted | Stop::WithProcess) => Ok(stop),
        other => Err(unexpected(other)),
    }
}

fn next_stop(tid: u32) -> io::Result<Stop> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(stop) = ptrace::stop(tid)? {
            return Ok(stop);
        }
        if Instant::now() > deadline {
            return Err(io::Error::other("a thread that was to take a signal does not stop"));
        }
        std::thread::yield_now();
    }
}

fn unexpected(stop: Stop) -> io::Error {
    io::Error::other(match stop {
        Stop::Signal { signal, .. } => {
            format!("a thread that was to take another signal got signal {signal}")
        }
        other => format!("a thread that was to take a signal is held otherwise ({other:?})"),
    })
}
