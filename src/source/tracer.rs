//! The tracer: a thread that stops all threads of a process, and of the processes that share its
//! memory. It holds them until the opener closes the channel. See `stop.rs`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use super::SourceError;
use super::injection::{Caller, Foothold, InjectionError, Step};
use super::mutual::conflict;
use super::patience::Patience;
use super::proc_directory::{ProcDirectory, says_gone};
use super::refusal::{Refused, process_error, refusal, traced_by};
use super::sharers::Sharers;
use super::signals::{self, Settlement};
use super::stuck;
use crate::signals::Signal;
use crate::sys::ptrace::{self, Stop};
use crate::threads::{self, RegisterSet, Thread, Threads};

/// How often to poll whether a thread has stopped before sleeping in between: an interrupt from one
/// core to another takes microseconds.
const IMPATIENT_LOOKS: u32 = 64;
const PAUSE_BETWEEN_LOOKS: Duration = Duration::from_micros(100);

/// The kernel may refuse a thread that is ending. After this many refusals the refusal counts.
const REFUSALS_BELIEVED: u32 = 10;

/// For each thread, when it was started, in clock ticks since the machine started.
pub(super) type Starts = Vec<(u32, u64)>;

/// Signals that were sent to a process as a whole, and to its single threads.
pub(super) type Queued = (Vec<Signal>, Vec<(u32, Vec<Signal>)>);

/// What the tracer found once all threads were stopped.
pub(super) struct Found {
    pub(super) threads: Threads,
    /// Other processes that share its memory.
    pub(super) sharers: Vec<u32>,
    pub(super) process_was_stopped: bool,
    /// For each thread.
    pub(super) rseq_areas: Vec<(u32, Range<u64>)>,
    pub(super) process_start: u64,
    pub(super) starts: Starts,
    /// Those sent to the process as a whole, and those of threads that have any.
    pub(super) queued: Queued,
}

impl Found {
    pub(super) fn nothing(pid: u32) -> Found {
        Found {
            threads: no_threads(pid),
            sharers: Vec::new(),
            process_was_stopped: false,
            rseq_areas: Vec::new(),
            process_start: 0,
            starts: Vec::new(),
            queued: (Vec::new(), Vec::new()),
        }
    }
}

/// An order for the tracer, with the channel for its answer.
pub(super) enum Order {
    SetRegisters(Vec<Thread>, Sender<Result<(), SourceError>>),
    SettleSignals(Settlement, Sender<Result<(), SourceError>>),
    MakeCalls(Calls, Sender<Result<(), InjectionError>>),
}

/// System calls that a thread of the process must make.
pub(super) struct Calls {
    /// The pid in the pid namespace of the process.
    pub(super) own_pid: u32,
    pub(super) foothold: Foothold,
    /// `/proc/PID/mem`.
    pub(super) memory: File,
    pub(super) steps: Vec<Step>,
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

/// The state of the tracer thread.
pub(super) struct Tracer {
    process: Held,
    sharers: Sharers,
    /// Processes that share its memory.
    others: Vec<Held>,
    patience: Arc<Patience>,
    /// When the first thread was interrupted.
    first_interrupt: Option<Instant>,
}

/// One process with its stopped threads, and how each is stopped.
struct Held {
    process: Arc<ProcDirectory>,
    threads: BTreeMap<u32, Stop>,
}

impl Tracer {
    pub(super) fn new(process: Arc<ProcDirectory>, patience: Arc<Patience>, sharers: Sharers) -> Self {
        let process = Held { process, threads: BTreeMap::new() };
        Tracer { process, sharers, others: Vec::new(), patience, first_interrupt: None }
    }

    /// Stops all threads, reports, executes orders until the opener closes the channel, and
    /// releases all threads. Returns how long they were paused.
    pub(super) fn run(
        mut self,
        report_to: &Sender<Result<Found, Refused>>,
        orders: &Receiver<Order>,
    ) -> Duration {
        let report = self.stop_all().and_then(|()| Ok(self.found()?));
        let is_stopped = report.is_ok();
        if report_to.send(report).is_ok() && is_stopped {
            // This loop ends when the opener closes the channel.
            for order in orders {
                match order {
                    Order::SetRegisters(threads, answer_to) => {
                        let _ = answer_to.send(self.process.set_registers(&threads));
                    }
                    Order::SettleSignals(settlement, answer_to) => {
                        let _ = answer_to.send(self.process.settle_signals(&settlement));
                    }
                    Order::MakeCalls(calls, answer_to) => {
                        let _ = answer_to.send(self.process.make_calls(&calls));
                    }
                }
            }
        }
        for held in self.others.iter().chain([&self.process]) {
            held.detach();
        }
        self.first_interrupt.map_or(Duration::ZERO, |first| first.elapsed())
    }

    fn stop_all(&mut self) -> Result<(), Refused> {
        let shared_pid = self.process.process.pid();
        let mut at_work = AtWork { patience: &self.patience, first_interrupt: &mut self.first_interrupt };
        self.process.stop(&mut at_work)?;
        // First the sharers that are known already, then those created meanwhile.
        let mut found = self.sharers.pids.clone();
        loop {
            for pid in found.drain(..) {
                if let Some(other) = Held::open(pid)? {
                    self.others.push(other);
                    let last = self.others.len() - 1;
                    self.others[last]
                        .stop(&mut at_work)
                        .map_err(|error| of_sharer(shared_pid, pid, error))?;
                }
            }
            let Some(thread) = self.process.threads.keys().next() else { return Ok(()) };
            // If this cannot be determined, no further sharers are added.
            found = self.sharers.find_new(&self.process.process, *thread).unwrap_or_default();
            if found.is_empty() {
                return Ok(());
            }
        }
    }

    fn found(&self) -> Result<Found, SourceError> {
        let area = |tid: &u32| Some((*tid, ptrace::rseq_area(*tid)?));
        let held = &self.process.threads;
        let rseq_areas = held.keys().filter_map(area);
        let (threads, process_start, starts) = self.process.registers(&self.patience)?;
        Ok(Found {
            threads,
            process_start,
            starts,
            queued: self.process.queued().unwrap_or_default(),
            sharers: self.others.iter().map(|other| other.process.pid()).collect(),
            process_was_stopped: held.values().any(|stop| *stop == Stop::WithProcess),
            rseq_areas: rseq_areas
                .map(|(tid, (at, length))| (tid, at..at.saturating_add(length.into())))
                .collect(),
        })
    }
}

/// The time limit, and since when a thread is paused.
struct AtWork<'a> {
    patience: &'a Patience,
    first_interrupt: &'a mut Option<Instant>,
}

impl AtWork<'_> {
    fn begins_to_pause(&mut self) {
        self.first_interrupt.get_or_insert_with(Instant::now);
    }

    fn did_not_stop(&self, process: &ProcDirectory, why: String) -> Refused {
        let paused = self.first_interrupt.map(|first| first.elapsed());
        self.patience.did_not_stop(process.pid(), why, paused).into()
    }
}

impl Held {
    /// A process that shares memory; `None` if it has ended.
    fn open(pid: u32) -> Result<Option<Held>, SourceError> {
        match ProcDirectory::open(pid) {
            Ok(process) => Ok(Some(Held { process: Arc::new(process), threads: BTreeMap::new() })),
            Err(gone) if says_gone(&gone) => Ok(None),
            Err(error) => Err(process_error(pid, "look up", error)),
        }
    }

    fn detach(&self) {
        for (tid, stop) in &self.threads {
            let signal = if let Stop::Signal { signal, .. } = stop { *signal } else { 0 };
            // A thread that was killed meanwhile cannot be detached, which does no harm.
            let _ = ptrace::detach(*tid, signal);
        }
    }

    /// Stops the listed threads, and repeats until no new threads appear. This ends, because
    /// stopped threads create no threads.
    fn stop(&mut self, at_work: &mut AtWork<'_>) -> Result<(), Refused> {
        let pid = self.process.pid();
        at_work.patience.expect(self.process.stat().map_or(0, |stat| stat.thread_count));
        let conflict = conflict(&self.process, || at_work.patience.is_over())
            .map_err(|error| self.error("look at the threads of", error))?;
        if let Some(why) = conflict {
            let why = format!("{why}; try again when it has done that");
            return Err(Refused::Busy(SourceError::Uncapturable { pid, why }));
        }
        at_work.patience.went_on();
        loop {
            let listed =
                self.process.thread_ids().map_err(|error| self.error("list the threads of", error))?;
            let new: Vec<u32> =
                listed.iter().filter(|tid| !self.threads.contains_key(tid)).copied().collect();
            // A thread that waits, for a disk for example, stops when the wait is over. The other
            // threads run until then.
            let in_kernel = |tid: &u32| {
                at_work.patience.went_on();
                self.process.thread_stat(*tid).is_ok_and(|stat| stat.state == 'D')
            };
            let (waiting, running): (Vec<u32>, Vec<u32>) = new.into_iter().partition(in_kernel);
            let found_none =
                !self.stop_these(&waiting, false, at_work)? & !self.stop_these(&running, true, at_work)?;
            if found_none && self.are_all_held(&listed)? {
                return Ok(());
            }
            at_work.patience.check()?;
            if at_work.patience.is_over() {
                let why =
                    "its threads start and end so fast that they could not all be stopped; try again later";
                return Err(at_work.did_not_stop(&self.process, why.to_owned()));
            }
            std::thread::yield_now();
        }
    }

    /// Stops these threads; `false` if all of them have ended.
    fn stop_these(&mut self, tids: &[u32], run: bool, at_work: &mut AtWork<'_>) -> Result<bool, Refused> {
        let mut asked = Vec::with_capacity(tids.len());
        for tid in tids {
            if run {
                at_work.begins_to_pause();
            }
            if self.seize(*tid)? {
                asked.push(*tid);
            }
            at_work.patience.went_on();
        }
        for tid in &asked {
            self.wait_until_stopped(*tid, at_work)?;
        }
        Ok(!asked.is_empty())
    }

    /// Whether every existing thread has been stopped. A listing alone is not enough: if the thread
    /// at which the kernel's listing stands ends, the kernel may omit threads. The number of
    /// threads is reliable.
    fn are_all_held(&mut self, listed: &[u32]) -> Result<bool, SourceError> {
        // A held thread may have ended.
        for tid in self.threads.keys().copied().collect::<Vec<_>>() {
            if self.stop_of(tid)?.is_none() {
                self.threads.remove(&tid);
            }
        }
        let stat = self.process.stat().map_err(|error| self.error("look at", error))?;
        if self.threads.is_empty() && stat.is_dead() && stat.thread_count <= 1 {
            return Err(SourceError::LiveProcessEnded { pid: self.process.pid() });
        }
        let held = listed.iter().filter(|tid| self.threads.contains_key(tid)).count();
        // A first thread that has ended stays listed while other threads run.
        let dead_leader = usize::from(stat.is_dead());
        Ok(!self.threads.is_empty() && held + dead_leader >= stat.thread_count)
    }

    /// Seizes and interrupts a thread; `false` if it has ended.
    fn seize(&mut self, tid: u32) -> Result<bool, Refused> {
        let mut refusals = 0;
        while let Err(error) = ptrace::seize(tid) {
            match self.process.thread_stat(tid) {
                Ok(stat) if stat.is_dead() => return Ok(false),
                Err(gone) if says_gone(&gone) => return Ok(false),
                _ => {}
            }
            // We may trace it already under another number: a thread that calls `execve` takes over
            // the number of the first thread.
            let tracer = self.process.status_number(&format!("task/{tid}/status"), "TracerPid").unwrap_or(0);
            if tracer == own_tid() {
                break;
            }
            // Or the first thread has just ended for that `execve`, and its number now names the
            // other thread. Or another tracer has released the thread, or is releasing it at this
            // moment; then the thread's parent may be reported as its tracer.
            refusals += 1;
            let refused = match tracer {
                0 => None,
                _ => Some(traced_by(&self.process, tracer)),
            };
            if matches!(refused, Some(Refused::Busy(_))) || refusals == REFUSALS_BELIEVED {
                return Err(refused.unwrap_or_else(|| refusal(&self.process, tid, "stop", error)));
            }
            std::thread::sleep(PAUSE_BETWEEN_LOOKS);
        }
        // The number may have been reused for a thread of another process since it was listed. That
        // thread is not interrupted, and is released when this thread ends.
        if self.process.thread_stat(tid).is_err() {
            return Ok(false);
        }
        match ptrace::interrupt(tid) {
            Ok(()) => Ok(true),
            Err(error) if says_gone(&error) => Ok(false),
            Err(error) => Err(self.error("interrupt", error).into()),
        }
    }

    fn wait_until_stopped(&mut self, tid: u32, at_work: &mut AtWork<'_>) -> Result<(), Refused> {
        let mut looks = 0;
        loop {
            if let Some(stop) = self.stop_of(tid)? {
                at_work.begins_to_pause();
                at_work.patience.went_on();
                self.threads.insert(tid, stop);
                return Ok(());
            }
            looks += 1;
            if looks < IMPATIENT_LOOKS {
                std::thread::yield_now();
                continue;
            }
            at_work.patience.check()?;
            match self.process.thread_stat(tid) {
                Ok(stat) if stat.is_dead() => return Ok(()),
                Ok(stat) if at_work.patience.is_over() => {
                    let why = stuck::why(&self.process, tid, stat.state);
                    return Err(at_work.did_not_stop(&self.process, why));
                }
                Ok(_) => {}
                Err(gone) if says_gone(&gone) => return Ok(()),
                Err(error) => return Err(self.error("look at", error).into()),
            }
            std::thread::sleep(PAUSE_BETWEEN_LOOKS);
        }
    }

    fn stop_of(&self, tid: u32) -> Result<Option<Stop>, SourceError> {
        ptrace::stop(tid).map_err(|error| self.error("look at a thread of", error))
    }

    fn make_calls(&self, calls: &Calls) -> Result<(), InjectionError> {
        let can_call = |stop: &Stop| matches!(stop, Stop::Interrupted | Stop::WithProcess);
        let Some((tid, _)) = self.threads.iter().find(|(_, stop)| can_call(stop)) else {
            return Err(InjectionError::Impossible(
                "all its threads are on their way into a signal".to_owned(),
            ));
        };
        let others: Vec<u32> = self.threads.keys().copied().filter(|other| other != tid).collect();
        let is_stopped = self.threads.values().any(|stop| *stop == Stop::WithProcess);
        let caller = Caller {
            pid: self.process.pid(),
            own_pid: calls.own_pid,
            tid: *tid,
            others: &others,
            is_stopped,
            memory: &calls.memory,
            foothold: calls.foothold,
        };
        caller.make(&calls.steps)
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

    fn settle_signals(&mut self, settlement: &Settlement) -> Result<(), SourceError> {
        let mut settle = || -> io::Result<()> {
            for tid in &settlement.dropped {
                let stop = signals::drop_signal(*tid)?;
                self.threads.insert(*tid, stop);
            }
            settlement.changes.iter().try_for_each(|change| signals::change(self.process.pid(), change))
        };
        let settled = settle();
        settled.map_err(|error| self.error("set the signals of", error))
    }

    /// The signals that were sent and that no thread has taken. Kernels before 3.10 do not report
    /// them.
    fn queued(&self) -> io::Result<Queued> {
        let read = |tid: u32, of_process: bool| -> io::Result<Vec<Signal>> {
            let queued = ptrace::queued_signals(tid, of_process)?;
            Ok(queued.into_iter().map(|information| Signal(information.to_vec())).collect())
        };
        let shared = self.threads.keys().next().map_or(Ok(Vec::new()), |tid| read(*tid, true))?;
        let mut threads = Vec::new();
        for tid in self.threads.keys() {
            let queued = read(*tid, false)?;
            if !queued.is_empty() {
                threads.push((*tid, queued));
            }
        }
        Ok((shared, threads))
    }

    /// The registers of all stopped threads, and the start times of the process and its threads.
    fn registers(&self, patience: &Patience) -> Result<(Threads, u64, Starts), SourceError> {
        let stat = self.process.stat().map_err(|error| self.error("look at", error))?;
        let mut threads = Vec::with_capacity(self.threads.len());
        let mut starts = Vec::with_capacity(self.threads.len());
        for (tid, stop) in &self.threads {
            let (thread, start) =
                self.thread(*tid, *stop).map_err(|error| self.error("read the registers of", error))?;
            threads.push(thread);
            starts.push((*tid, start));
            patience.went_on();
        }
        // The threads are already sorted by number. The first thread may have a higher number than
        // others.
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
        process_error(self.process.pid(), action, source)
    }
}

/// Converts an error of a process that shares the memory of process `pid` into an error about
/// `pid`.
fn of_sharer(pid: u32, sharer: u32, error: Refused) -> Refused {
    let why =
        |error: &SourceError| format!("process {sharer} shares its memory and must be stopped too; {error}");
    match error {
        Refused::Busy(error) => Refused::Busy(SourceError::Uncapturable { pid, why: why(&error) }),
        Refused::Error(SourceError::Interrupted) => SourceError::Interrupted.into(),
        Refused::Error(error) => SourceError::Uncapturable { pid, why: why(&error) }.into(),
    }
}

fn own_tid() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
}
