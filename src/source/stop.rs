//! Stops all threads of a process and releases all of them, even after a failure.
//!
//! ```text
//!  the opener                      the tracer, a thread of its own (tracer.rs)
//!  waits while a thread is stuck
//!  stop() ------ starts ---------> seizes and interrupts every thread, reads the registers
//!         <----- reports ---------
//!  copies the memory               waits
//!  set_registers() -- asks ------> sets them, in a rollback only
//!         <----- answers ---------
//!  let_go() ---- hangs up -------> detaches every thread and ends
//!         <----- joins -----------
//! ```
//!
//! The kernel binds a traced thread to the thread that traces it, and releases the traced thread
//! when the tracing thread ends. So each stop has its own tracer thread. Whether the opener
//! returns, fails, panics or the whole program is killed, the tracer ends and no thread stays
//! stopped. That includes threads that the tracer could not detach, for example a thread that was
//! seized and did not stop. Also, the opener can move between threads, and can give up if the
//! kernel blocks the tracer.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions};

use super::SourceError;
use super::injection::InjectionError;
use super::mutual::TRACER_NAME;
use super::patience::Patience;
use super::proc_directory::ProcDirectory;
use super::refusal::Refused;
use super::sharers::Sharers;
use super::signals::Settlement;
use super::stuck::{self, wait_while_stuck};
use super::tracer::{Calls, Found, Order, Queued, Tracer};
use crate::progress::Progress;
use crate::threads::{Thread, Threads};

/// How often the opener looks for ended threads and checks whether to give up. Except for rare
/// races, stopping takes less time than this.
const PAUSE_BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// After a search for ended threads, the opener waits this many times as long as the search took.
const REST_AFTER_A_LOOK: u32 = 20;

/// The tracer reports when the time limit is over. If this time passes without a report, the kernel
/// is blocking the tracer.
const TRACER_IS_STUCK_AFTER: Duration = Duration::from_millis(300);

/// A tracer that was given up ends within this time, unless the kernel blocks it.
const TRACER_ENDS_WITHIN: Duration = Duration::from_millis(200);

/// A process whose threads are all stopped. Dropping this value releases them.
pub(super) struct StoppedProcess {
    found: Found,
    /// The tracer releases all threads when this channel is closed.
    hold: Option<(Sender<Order>, JoinHandle<Duration>)>,
    stood_still: Duration,
}

impl StoppedProcess {
    /// Stops all threads of the process, and of other processes that share its memory.
    ///
    /// If a thread does not stop within `timeout`, all threads are released. No thread is paused
    /// for longer than that.
    pub(super) fn stop(
        process: &Arc<ProcDirectory>,
        timeout: Duration,
        progress: &Progress,
    ) -> Result<Self, SourceError> {
        let whole = Patience::new(timeout, progress);
        for attempt in 0.. {
            wait_while_stuck(process, &whole)?;
            match Self::attempt(process, Arc::new(Patience::new(timeout, progress))) {
                Ok(stopped) => return Ok(stopped),
                Err(Refused::Error(error)) => return Err(error),
                Err(Refused::Busy(error)) if whole.is_over() => return Err(error),
                Err(Refused::Busy(_)) => {}
            }
            // If two programs wait for each other, the one with the lower pid goes first.
            let comes_first = std::process::id() < process.pid();
            let pause = Duration::from_millis(1 + attempt % 4 + if comes_first { 0 } else { 3 });
            std::thread::sleep(pause);
        }
        unreachable!("the attempts are only ended by returning")
    }

    fn attempt(process: &Arc<ProcDirectory>, patience: Arc<Patience>) -> Result<Self, Refused> {
        let pid = process.pid();
        let error = |action, source| SourceError::LiveProcess { pid, action, source };
        let sharers = Sharers::find(process).unwrap_or_default();
        let (report_to, report) = channel();
        let (hold, orders) = channel();
        let tracer = Tracer::new(Arc::clone(process), patience.clone(), sharers);
        let tracer = std::thread::Builder::new()
            .name(TRACER_NAME.to_owned())
            .spawn(move || tracer.run(&report_to, &orders))
            .map_err(|source| error("start a thread that stops", source))?;
        let mut stopped = StoppedProcess {
            found: Found::nothing(pid),
            hold: Some((hold, tracer)),
            stood_still: Duration::ZERO,
        };
        // On an error the tracer releases all threads before it reports the error.
        let mut looked_until = Instant::now();
        let mut look_again_after = PAUSE_BETWEEN_LOOKS;
        let found = loop {
            match report.recv_timeout(PAUSE_BETWEEN_LOOKS) {
                Ok(found) => break found,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let source = io::Error::other("the thread that stops it ended early");
                    break Err(error("stop", source).into());
                }
            }
            if looked_until.elapsed() >= look_again_after {
                // With thousands of threads the search takes milliseconds, and the tracer waits for
                // the same locks.
                let begun = Instant::now();
                reap(process);
                looked_until = Instant::now();
                look_again_after = (looked_until - begun) * REST_AFTER_A_LOOK;
            }
            if let Err(interrupted) = patience.check() {
                break Err(interrupted.into());
            }
            if patience.is_over_for(TRACER_IS_STUCK_AFTER) {
                let why = stuck::why_not_traced(process);
                break Err(patience.did_not_stop(pid, why, None).into());
            }
        };
        match found {
            Ok(found) => {
                stopped.found = found;
                Ok(stopped)
            }
            Err(refused) => {
                patience.give_up();
                stopped.give_up();
                Err(refused)
            }
        }
    }

    pub(super) fn threads(&self) -> &Threads {
        &self.found.threads
    }

    /// Other processes that share its memory. They are stopped too.
    pub(super) fn sharers(&self) -> &[u32] {
        &self.found.sharers
    }

    /// Whether the process was already stopped, by SIGSTOP for example. It stays stopped when it is
    /// released.
    pub(super) fn process_was_stopped(&self) -> bool {
        self.found.process_was_stopped
    }

    /// The signals that threads were about to receive and will receive when they are released: bit
    /// `n - 1` for signal `n`.
    pub(super) fn signals_on_their_way(&self) -> u64 {
        let signals = self.found.threads.threads.iter().map(|thread| thread.pending_signal);
        signals.filter(|signal| (1..=64).contains(signal)).fold(0, |mask, signal| mask | 1 << (signal - 1))
    }

    /// The areas for restartable sequences, which the kernel writes for each thread.
    pub(super) fn rseq_areas(&self) -> &[(u32, Range<u64>)] {
        &self.found.rseq_areas
    }

    /// The start times of the process and its threads.
    pub(super) fn starts(&self) -> (u64, &[(u32, u64)]) {
        (self.found.process_start, &self.found.starts)
    }

    /// Sets the registers and signal masks of these threads. All of them must be stopped.
    pub(super) fn set_registers(&self, threads: Vec<Thread>) -> Result<(), SourceError> {
        let pid = self.found.threads.pid;
        let (answer_to, answer) = channel();
        let order = Order::SetRegisters(threads, answer_to);
        let is_asked = self.hold.as_ref().is_some_and(|(hold, _)| hold.send(order).is_ok());
        match answer.recv() {
            Ok(done) if is_asked => done,
            _ => Err(SourceError::Released { pid }),
        }
    }

    /// Changes the pending signals of the process; see [`signals`](super::signals).
    pub(super) fn settle_signals(&self, settlement: Settlement) -> Result<(), SourceError> {
        let pid = self.found.threads.pid;
        let (answer_to, answer) = channel();
        let order = Order::SettleSignals(settlement, answer_to);
        let is_asked = self.hold.as_ref().is_some_and(|(hold, _)| hold.send(order).is_ok());
        match answer.recv() {
            Ok(done) if is_asked => done,
            _ => Err(SourceError::Released { pid }),
        }
    }

    /// The signals that were sent and that no thread has taken: those for the process as a whole,
    /// and those for single threads.
    pub(super) fn queued_signals(&self) -> &Queued {
        &self.found.queued
    }

    /// Makes a thread execute system calls; see [`injection`](super::injection).
    pub(super) fn make_calls(&self, calls: Calls) -> Result<(), InjectionError> {
        let (answer_to, answer) = channel();
        let order = Order::MakeCalls(calls, answer_to);
        let is_asked = self.hold.as_ref().is_some_and(|(hold, _)| hold.send(order).is_ok());
        match answer.recv() {
            Ok(done) if is_asked => done,
            _ => Err(InjectionError::Impossible("it is not held any more".to_owned())),
        }
    }

    pub(super) fn is_held(&self) -> bool {
        self.hold.is_some()
    }

    /// Releases all threads and returns how long the process was paused: from the first interrupt
    /// to the last detach. A second call returns the same.
    pub(super) fn let_go(&mut self) -> Duration {
        if let Some((hold, tracer)) = self.hold.take() {
            drop(hold);
            // If the tracer panicked, the kernel has released the threads.
            self.stood_still = tracer.join().unwrap_or_default();
        }
        self.stood_still
    }

    /// Abandons the tracer without waiting, because the kernel may block it. The tracer releases
    /// all threads and ends once the kernel returns, or when this program ends.
    fn give_up(&mut self) {
        let Some((hold, tracer)) = self.hold.take() else { return };
        drop(hold);
        let started = Instant::now();
        while !tracer.is_finished() && started.elapsed() < TRACER_ENDS_WITHIN {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Reaps threads that have ended although they were seized: SIGKILL, or a call of `execve` in
/// another thread, ends them anyway. That `execve` waits until they are reaped, and seizing a
/// thread waits for that `execve`. So the opener does this, because the tracer may be blocked.
///
/// The first thread is not reaped: its end is the end of the process, which its parent waits for,
/// and the parent may be this program.
fn reap(process: &ProcDirectory) {
    let options = WaitIdOptions::EXITED
        | WaitIdOptions::NOHANG
        | WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    for tid in process.thread_ids().unwrap_or_default() {
        if let Some(id) = Pid::from_raw(tid.cast_signed()).filter(|_| tid != process.pid()) {
            // A thread that this program does not trace, or that is alive, is not affected.
            let _ = rustix::process::waitid(WaitId::Pid(id), options);
        }
    }
}
