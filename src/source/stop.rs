//! Stopping every thread of a process, and letting all of them go again whatever happens.
//!
//! ```text
//!  the opener                      the tracer, a thread of its own
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
//! the opener free to move between threads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions};

use super::injection::{Call, Caller, Foothold, InjectionError};
use super::proc_directory::{ProcDirectory, says_gone};
use super::{SourceError, refusal};
use crate::sys::ptrace::{self, Stop};
use crate::threads::{self, RegisterSet, Thread, Threads};

/// How long the threads may take to stop. Those that run need microseconds. One that waits in the
/// kernel where no signal reaches it (for a disk or a network file system that went away) may
/// need for ever, and the others must not stand still as long.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often to ask whether a thread has stopped before sleeping between: an interrupt from one
/// core to another takes microseconds.
const IMPATIENT_LOOKS: u32 = 64;
const PAUSE_BETWEEN_LOOKS: Duration = Duration::from_micros(100);

/// How often the opener looks for ended threads: stopping takes less, but for rare races.
const PAUSE_BETWEEN_REAPS: Duration = Duration::from_millis(2);

/// A thread may be refused because it is just ending; how often until it counts as a refusal.
const REFUSALS_BELIEVED: u32 = 3;

/// A process whose threads all stand still. Dropping it lets them go.
pub(super) struct StoppedProcess {
    found: Found,
    /// Hanging up tells the tracer to let go.
    hold: Option<(Sender<Order>, JoinHandle<Duration>)>,
    stood_still: Duration,
}

/// What the tracer found when all stood still.
struct Found {
    threads: Threads,
    process_was_stopped: bool,
    /// By thread.
    rseq_areas: Vec<(u32, Range<u64>)>,
    process_start: u64,
    /// By thread.
    starts: Vec<(u32, u64)>,
}

/// What the tracer is to do, and where it answers.
enum Order {
    SetRegisters(Vec<Thread>, Sender<Result<(), SourceError>>),
    MakeCalls(Calls, Sender<Result<Vec<i64>, InjectionError>>),
}

/// Calls for a thread of the process to make.
pub(super) struct Calls {
    /// The pid as the process itself knows it.
    pub(super) own_pid: u32,
    pub(super) foothold: Foothold,
    /// `/proc/PID/mem`.
    pub(super) memory: File,
    pub(super) calls: Vec<Call>,
}

impl StoppedProcess {
    /// Stops every thread of the process.
    pub(super) fn stop(process: &Arc<ProcDirectory>) -> Result<Self, SourceError> {
        let pid = process.pid();
        let traced = Arc::clone(process);
        let (report_to, report) = channel();
        let (hold, orders) = channel();
        let tracer = std::thread::Builder::new()
            .name("stillframe-stop".to_owned())
            .spawn(move || Tracer::new(&traced).run(&report_to, &orders))
            .map_err(|source| SourceError::Process { pid, action: "start a thread that stops", source })?;
        let mut stopped = StoppedProcess {
            found: Found {
                threads: no_threads(pid),
                process_was_stopped: false,
                rseq_areas: Vec::new(),
                process_start: 0,
                starts: Vec::new(),
            },
            hold: Some((hold, tracer)),
            stood_still: Duration::ZERO,
        };
        // An error drops `stopped`, so that all is let go before the caller hears of it.
        stopped.found = loop {
            match report.recv_timeout(PAUSE_BETWEEN_REAPS) {
                Ok(found) => break found?,
                Err(RecvTimeoutError::Timeout) => reap(process),
                Err(RecvTimeoutError::Disconnected) => {
                    let source = io::Error::other("the thread that stops it ended early");
                    return Err(SourceError::Process { pid, action: "stop", source });
                }
            }
        };
        Ok(stopped)
    }

    pub(super) fn threads(&self) -> &Threads {
        &self.found.threads
    }

    /// Whether the process stood still before, by SIGSTOP say, and will when it is let go.
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

    /// Gives these threads, all of which stand still, their registers and signal masks.
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

    /// Has a thread make system calls; see [`injection`](super::injection).
    pub(super) fn make_calls(&self, calls: Calls) -> Result<Vec<i64>, InjectionError> {
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

    /// Lets all threads go and answers how long the process stood still: from the first interrupt
    /// to the last detach. The second call answers the same.
    pub(super) fn let_go(&mut self) -> Duration {
        if let Some((hold, tracer)) = self.hold.take() {
            drop(hold);
            // Had the tracer panicked, the kernel would have let go.
            self.stood_still = tracer.join().unwrap_or_default();
        }
        self.stood_still
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        self.let_go();
    }
}

fn no_threads(pid: u32) -> Threads {
    Threads {
        machine: threads::MACHINE,
        pid,
        parent_pid: 0,
        process_group: 0,
        session: 0,
        threads: Vec::new(),
    }
}

/// What the tracer's thread works on.
struct Tracer<'a> {
    process: &'a ProcDirectory,
    first_interrupt: Option<Instant>,
    /// The threads that stand still, and how.
    held: BTreeMap<u32, Stop>,
}

impl<'a> Tracer<'a> {
    fn new(process: &'a ProcDirectory) -> Self {
        Tracer { process, first_interrupt: None, held: BTreeMap::new() }
    }

    fn run(mut self, report_to: &Sender<Result<Found, SourceError>>, orders: &Receiver<Order>) -> Duration {
        let report = self.stop_all().and_then(|()| self.found());
        let is_stopped = report.is_ok();
        if report_to.send(report).is_ok() && is_stopped {
            // This ends when the opener hangs up.
            for order in orders {
                match order {
                    Order::SetRegisters(threads, answer_to) => {
                        let _ = answer_to.send(self.set_registers(&threads));
                    }
                    Order::MakeCalls(calls, answer_to) => {
                        let _ = answer_to.send(self.make_calls(&calls));
                    }
                }
            }
        }
        for (tid, stop) in &self.held {
            let signal = if let Stop::Signal { signal, .. } = stop { *signal } else { 0 };
            // A thread that was killed meanwhile cannot be detached, and need not be.
            let _ = ptrace::detach(*tid, signal);
        }
        self.first_interrupt.map_or(Duration::ZERO, |first| first.elapsed())
    }

    fn make_calls(&self, calls: &Calls) -> Result<Vec<i64>, InjectionError> {
        let can_call = |stop: &Stop| matches!(stop, Stop::Interrupted | Stop::WithProcess);
        let Some((tid, _)) = self.held.iter().find(|(_, stop)| can_call(stop)) else {
            return Err(InjectionError::Impossible(
                "all its threads are on their way into a signal".to_owned(),
            ));
        };
        let others: Vec<u32> = self.held.keys().copied().filter(|other| other != tid).collect();
        let is_stopped = self.held.values().any(|stop| *stop == Stop::WithProcess);
        let caller = Caller {
            pid: self.process.pid(),
            own_pid: calls.own_pid,
            tid: *tid,
            others: &others,
            is_stopped,
            memory: &calls.memory,
            foothold: calls.foothold,
        };
        caller.make(&calls.calls)
    }

    /// Stops what is listed until nothing new can appear: threads that stand still make no others.
    fn stop_all(&mut self) -> Result<(), SourceError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let listed =
                self.process.thread_ids().map_err(|error| self.error("list the threads of", error))?;
            let mut asked = Vec::new();
            for tid in &listed {
                if !self.held.contains_key(tid) && self.seize(*tid)? {
                    asked.push(*tid);
                }
            }
            let found_none = asked.is_empty();
            for tid in asked {
                self.wait_until_stopped(tid, deadline)?;
            }
            if found_none && self.are_all_held(&listed)? {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(self.uncapturable(format!(
                    "its threads start and end so fast that they could not all be stopped within {} seconds",
                    PATIENCE.as_secs()
                )));
            }
            std::thread::yield_now();
        }
    }

    /// Whether every thread there is stands still. A list alone does not tell, as the kernel leaves
    /// out threads when the one it stands at ends meanwhile; the count of threads does.
    fn are_all_held(&mut self, listed: &[u32]) -> Result<bool, SourceError> {
        // One that was held may have ended.
        for tid in self.held.keys().copied().collect::<Vec<_>>() {
            if self.stop_of(tid)?.is_none() {
                self.held.remove(&tid);
            }
        }
        let stat = self.process.stat().map_err(|error| self.error("look at", error))?;
        if self.held.is_empty() && stat.is_dead() && stat.thread_count <= 1 {
            return Err(SourceError::ProcessEnded { pid: self.process.pid() });
        }
        let held = listed.iter().filter(|tid| self.held.contains_key(tid)).count();
        // A first thread that has ended stays listed while others run.
        let dead_leader = usize::from(stat.is_dead());
        Ok(!self.held.is_empty() && held + dead_leader >= stat.thread_count)
    }

    /// Seizes and interrupts a thread; `false` if it has ended.
    fn seize(&mut self, tid: u32) -> Result<bool, SourceError> {
        let mut refusals = 0;
        while let Err(error) = ptrace::seize(tid) {
            match self.process.thread_stat(tid) {
                Ok(stat) if stat.is_dead() => return Ok(false),
                Err(gone) if says_gone(&gone) => return Ok(false),
                _ => {}
            }
            // It may be ours already under another number: a thread that calls `execve` takes on
            // that of the first one.
            let tracer = self.process.status_number(&format!("task/{tid}/status"), "TracerPid");
            if tracer.ok() == Some(own_tid()) {
                break;
            }
            // Or the first one had just ended for that, and the number now stands for the other.
            refusals += 1;
            if refusals == REFUSALS_BELIEVED {
                return Err(refusal(self.process, tid, "stop", error));
            }
        }
        // The number may have gone to a thread of another process since it was listed. That one is
        // not interrupted, and let go when this thread ends.
        if self.process.thread_stat(tid).is_err() {
            return Ok(false);
        }
        self.first_interrupt.get_or_insert_with(Instant::now);
        match ptrace::interrupt(tid) {
            Ok(()) => Ok(true),
            Err(error) if says_gone(&error) => Ok(false),
            Err(error) => Err(self.error("interrupt", error)),
        }
    }

    fn wait_until_stopped(&mut self, tid: u32, deadline: Instant) -> Result<(), SourceError> {
        let mut looks = 0;
        loop {
            if let Some(stop) = self.stop_of(tid)? {
                self.held.insert(tid, stop);
                return Ok(());
            }
            looks += 1;
            if looks < IMPATIENT_LOOKS {
                std::thread::yield_now();
                continue;
            }
            match self.process.thread_stat(tid) {
                Ok(stat) if stat.is_dead() => return Ok(()),
                Ok(stat) if Instant::now() > deadline => {
                    return Err(self.uncapturable(format!(
                        "its thread {tid} did not stop within {} seconds; it is in state {} ({}), try again later",
                        PATIENCE.as_secs(),
                        stat.state,
                        if stat.state == 'D' { "waiting in the kernel" } else { "see proc(5)" },
                    )));
                }
                Ok(_) => {}
                Err(gone) if says_gone(&gone) => return Ok(()),
                Err(error) => return Err(self.error("look at", error)),
            }
            std::thread::sleep(PAUSE_BETWEEN_LOOKS);
        }
    }

    fn stop_of(&self, tid: u32) -> Result<Option<Stop>, SourceError> {
        ptrace::stop(tid).map_err(|error| self.error("look at a thread of", error))
    }

    fn found(&self) -> Result<Found, SourceError> {
        let area = |tid: &u32| Some((*tid, ptrace::rseq_area(*tid)?));
        let rseq_areas = self.held.keys().filter_map(area);
        let (threads, process_start, starts) = self.registers()?;
        Ok(Found {
            threads,
            process_start,
            starts,
            process_was_stopped: self.held.values().any(|stop| *stop == Stop::WithProcess),
            rseq_areas: rseq_areas
                .map(|(tid, (at, length))| (tid, at..at.saturating_add(length.into())))
                .collect(),
        })
    }

    fn set_registers(&self, threads: &[Thread]) -> Result<(), SourceError> {
        for thread in threads {
            let set = || -> io::Result<()> {
                for set in &thread.registers {
                    ptrace::set_register_set(thread.tid, set.note_type, &set.bytes)?;
                }
                ptrace::set_signal_mask(thread.tid, thread.signal_mask)
            };
            set().map_err(|error| self.error("set the registers of", error))?;
        }
        Ok(())
    }

    /// The registers of all threads, which stand still, and when the process and they were started.
    fn registers(&self) -> Result<(Threads, u64, Vec<(u32, u64)>), SourceError> {
        let stat = self.process.stat().map_err(|error| self.error("look at", error))?;
        let mut threads = Vec::with_capacity(self.held.len());
        let mut starts = Vec::with_capacity(self.held.len());
        for (tid, stop) in &self.held {
            let (thread, start) =
                self.thread(*tid, *stop).map_err(|error| self.error("read the registers of", error))?;
            threads.push(thread);
            starts.push((*tid, start));
        }
        // By number already; the first one may have a higher number than others.
        threads.sort_by_key(|thread| thread.tid != self.process.pid());
        let threads = Threads {
            parent_pid: stat.parent_pid,
            process_group: stat.process_group,
            session: stat.session,
            threads,
            ..no_threads(self.process.pid())
        };
        Ok((threads, stat.start, starts))
    }

    fn thread(&self, tid: u32, stop: Stop) -> io::Result<(Thread, u64)> {
        let (name, stat) = self.process.named_thread_stat(tid)?;
        let mut registers = Vec::new();
        for note_type in threads::register_set_types() {
            if let Some(bytes) = ptrace::register_set(tid, *note_type)? {
                registers.push(RegisterSet { note_type: *note_type, bytes });
            }
        }
        if !registers.iter().any(|set| set.note_type == threads::NT_PRSTATUS) {
            return Err(io::Error::other("the kernel gives no general registers"));
        }
        let (pending_signal, signal_information) = match stop {
            Stop::Interrupted | Stop::WithProcess | Stop::Call => (0, Vec::new()),
            Stop::Signal { signal, information } => (signal, information.to_vec()),
        };
        let signal_mask = ptrace::signal_mask(tid)?;
        let thread = Thread { tid, name, signal_mask, pending_signal, signal_information, registers };
        Ok((thread, stat.start))
    }

    fn error(&self, action: &'static str, source: io::Error) -> SourceError {
        let pid = self.process.pid();
        if says_gone(&source) {
            SourceError::ProcessEnded { pid }
        } else {
            SourceError::Process { pid, action, source }
        }
    }

    fn uncapturable(&self, why: String) -> SourceError {
        SourceError::Uncapturable { pid: self.process.pid(), why }
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

fn own_tid() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}
