//! Taking signals out of the queues of a process whose threads are held, and putting others in.
//!
//! A tracer sees each signal before its thread does, and may drop it. So a thread that is let run with one signal
//! open in its mask, and that signal in its queue, stops again before it runs an instruction of its program. A signal
//! that is blocked in that moment goes back into the queue, with the particulars (`siginfo_t`) that the tracer has set:
//! that is how one gets into a queue that looks as if another thread or the kernel had sent it.
//!
//! ```text
//! take out:  held ── only S open, resume ──> about to get S ── interrupt, resume without S ──────> held
//! put in:    S sent; held ── the same ─────> about to get S, particulars set, all blocked ──┐
//!            held <── S is in the queue again <────────────── interrupt, resume into S <────┘
//! ```
//!
//! All threads are left with the signal mask that this needed: a rollback sets registers and masks afterwards.

use std::io;
use std::time::{Duration, Instant};

use crate::signals::Signal;
use crate::sys::ptrace::{self, Stop};

/// What is to be done about the signals of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settlement {
    /// Threads that are about to get a signal which they are not to get.
    pub(crate) dropped: Vec<u32>,
    /// One signal of one queue each.
    pub(crate) changes: Vec<Change>,
}

impl Settlement {
    /// Whether nothing is to be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.dropped.is_empty() && self.changes.is_empty()
    }
}

/// What is to be in a queue of one signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// The thread whose queue it is, or which gets the signals of the process.
    pub(crate) tid: u32,
    pub(crate) signal: i32,
    /// How many there are, all of which are taken out.
    pub(crate) taken_out: usize,
    /// Those that are put into the thread's queue then, in order.
    pub(crate) put_in: Vec<Signal>,
}

/// How long a thread may take to stop again. It has nothing to do.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many SIGSTOPs may be in the way.
const MAX_STOPS: usize = 4;
const ALL_SIGNALS: u64 = u64::MAX;

/// Makes a thread that is about to get a signal not get it. Answers how it is held then.
pub(super) fn drop_signal(tid: u32) -> io::Result<Stop> {
    hold_again(tid, 0)
}

/// Makes a queue what it is to be. The thread is held otherwise than about to get a signal, and is so afterwards.
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

/// Lets a held thread run to the next of its signals, which must be this one.
fn next_of_queue(tid: u32, expected: i32) -> io::Result<ptrace::SignalInformation> {
    for _ in 0..MAX_STOPS {
        ptrace::resume(tid)?;
        match next_stop(tid)? {
            Stop::Signal { signal, information } if signal == expected => return Ok(information),
            // A SIGSTOP of the thread alone: the process has another. And one that stood still when it was
            // interrupted does so once more.
            Stop::Signal { signal: libc::SIGSTOP, .. } | Stop::Interrupted | Stop::WithProcess => {}
            other => return Err(unexpected(other)),
        }
    }
    Err(io::Error::other("a thread is stopped over and over"))
}

/// Holds a thread that is about to get a signal before it does anything; `signal` is 0 or the same, which it then has
/// in its queue.
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
