//! Stopping every thread of a process, and letting all of them go again whatever happens.
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
//! The kernel ties what is traced to the thread that traces, and lets go of it when that thread
//! ends. So the tracer is a thread made for one stop: whether the opener returns, fails, panics or
//! the whole program is killed, it ends, and nothing stays stopped. That holds even for what it
//! could not detach itself, such as a thread that was seized and would not stop. It also leaves
//! the opener free to move between threads, and to give up when the kernel does not answer the tracer.

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

/// How often the opener looks for ended threads and whether it is to give up: stopping takes less, but for rare races.
const PAUSE_BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// Looking for ended threads takes this part of the time at most.
const REST_AFTER_A_LOOK: u32 = 20;

/// When the time is over the tracer says so. If it does not for so long, the kernel does not answer it.
const TRACER_IS_STUCK_AFTER: Duration = Duration::from_millis(300);

/// A tracer that was given up ends within this, if the kernel answers it.
const TRACER_ENDS_WITHIN: Duration = Duration::from_millis(200);

/// A process whose threads are all stopped. Dropping it lets them go.
pub(super) struct StoppedProcess {
    found: Found,
    /// Hanging up tells the tracer to let go.
    hold: Option<(Sender<Order>, JoinHandle<Duration>)>,
    stood_still: Duration,
}

impl StoppedProcess {
    /// Stops every thread of the process, and of others that share its memory.
    ///
    /// If a thread does not stop within `timeout`, all are let go. None is paused for longer.
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
            // Of two that wait for one another, the one with the lower pid comes first.
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
        // An error lets all go before the caller hears of it.
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
                // With thousands of threads that takes milliseconds, and the tracer waits for the same locks.
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

    /// Other processes that share its memory. They are stopped, too.
    pub(super) fn sharers(&self) -> &[u32] {
        &self.found.sharers
    }

    /// Whether the process was stopped before, by SIGSTOP say, and will be when it is let go.
    pub(super) fn process_was_stopped(&self) -> bool {
        self.found.process_was_stopped
    }

    /// The signals that threads are on their way into, and get when they are let go: bit `n - 1` for
    /// signal `n`.
    pub(super) fn signals_on_their_way(&self) -> u64 {
        let signals = self.found.threads.threads.iter().map(|thread| thread.pending_signal);
        signals.filter(|signal| (1..=64).contains(signal)).fold(0, |mask, signal| mask | 1 << (signal - 1))
    }

    /// Where the kernel writes for the threads by itself: their areas for restartable sequences.
    pub(super) fn rseq_areas(&self) -> &[(u32, Range<u64>)] {
        &self.found.rseq_areas
    }

    /// When the process and its threads were started.
    pub(super) fn starts(&self) -> (u64, &[(u32, u64)]) {
        (self.found.process_start, &self.found.starts)
    }

    /// Gives these threads, all of which are stopped, their registers and signal masks.
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

    /// Changes the signals that are on their way to it; see [`signals`](super::signals).
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

    /// The signals that have been sent and that no thread has taken: to the process as a whole, and to single threads.
    pub(super) fn queued_signals(&self) -> &Queued {
        &self.found.queued
    }

    /// Has a thread make system calls; see [`injection`](super::injection).
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

    /// Lets all threads go and answers how long the process was paused: from the first interrupt
    /// to the last detach. The second call answers the same.
    pub(super) fn let_go(&mut self) -> Duration {
        if let Some((hold, tracer)) = self.hold.take() {
            drop(hold);
            // Had the tracer panicked, the kernel would have let go.
            self.stood_still = tracer.join().unwrap_or_default();
        }
        self.stood_still
    }

    /// Lets all go, and does not wait for a tracer that the kernel does not answer. Such a tracer lets go and ends
    /// once it is answered, or with this program.
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

/// Takes notice of threads that have ended although they were seized: SIGKILL and another thread's
/// call of `execve` end them all the same. That call waits until somebody has taken notice, and
/// seizing a thread waits for that call; so it is the opener that does this, while the tracer may be
/// stuck.
///
/// Not of the first thread: its end is that of the process, which its parent wants to hear of, and
/// the parent may be this very program.
fn reap(process: &ProcDirectory) {
    let options = WaitIdOptions::EXITED
        | WaitIdOptions::NOHANG
        | WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    for tid in process.thread_ids().unwrap_or_default() {
        if let Some(id) = Pid::from_raw(tid.cast_signed()).filter(|_| tid != process.pid()) {
            // One that is not ours, or lives, is left as it is.
            let _ = rustix::process::waitid(WaitId::Pid(id), options);
        }
    }
}
