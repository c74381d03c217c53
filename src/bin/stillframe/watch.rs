//! `watch`: snapshots at intervals, of a running process or of a command that it starts.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use stillframe::{Capture, CaptureOptions, Error, ProcessSource, Progress, Store, Trigger};

use crate::arguments;
use crate::capture::{check_running, file_name};
use crate::context::Context;
use crate::errors::{CommandError, Exit};
use crate::human;
use crate::json::CaptureObject;
use crate::output::{Column, Output, table_row, title_row};

/// How often a waiting watch looks whether the process still runs and nobody pressed ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A command gets so long to load itself before its first snapshot.
const FIRST_AFTER: Duration = Duration::from_millis(100);

/// A process whose capture failed gets so long to be seen ending, which explains the failure.
const ENDING_WITHIN: Duration = Duration::from_millis(500);

/// At a terminal ctrl-C reaches the command too. If it runs on for so long, it is told by us.
const INTERRUPT_AFTER: Duration = Duration::from_millis(500);

/// A command that does not care about SIGINT gets SIGTERM after so long.
const TERMINATE_AFTER: Duration = Duration::from_secs(5);

/// Takes snapshots until the process ends, the count is reached, or somebody presses ctrl-C.
pub(crate) fn watch(context: &Context, arguments: arguments::Watch) -> anyhow::Result<Exit> {
    if let Some(pid) = arguments.pid {
        check_running(pid)?;
    }
    let store = context.open_or_create()?;
    // From here on ctrl-C must not end us before the command.
    let interrupted = context.interrupted();
    let (mut target, default_name, first_after) = match (arguments.pid, arguments.command.split_first()) {
        (None, Some((program, rest))) => {
            let target = Target::start(context, program, rest)?;
            (target, file_name(Path::new(program)), FIRST_AFTER.min(arguments.every))
        }
        (pid, _) => {
            let pid = pid.unwrap_or_default();
            (Target::running(pid), format!("pid:{pid}"), Duration::ZERO)
        }
    };
    let mut report = Report::new(context.output, store.info().region_size.bytes() as u64);
    let watching = Watching {
        context,
        interrupted,
        store,
        process: arguments.process.unwrap_or(default_name),
        every: arguments.every,
        count: arguments.count.unwrap_or(u64::MAX),
        store_as: arguments.store_as,
    };
    let end = watching.run(&mut target, &mut report, first_after);
    // A command may run on for long: others may use the store meanwhile.
    drop(watching);
    let end = end.inspect_err(|_| target.stop(context))?;
    report.totals()?;
    let end = target.finish(context, end);
    if let Some(ending) = target.ending() {
        context.output.note(&ending);
    }
    context.output.hint("look at the snapshots: stillframe list");
    if end == End::Interrupted { Ok(Exit::Interrupted) } else { Ok(Exit::Done) }
}

/// Why a watch is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    ProcessEnded,
    CountReached,
    Interrupted,
}

struct Watching<'a> {
    context: &'a Context,
    interrupted: Arc<AtomicBool>,
    store: Store,
    process: String,
    every: Duration,
    count: u64,
    store_as: arguments::StoreAs,
}

impl Watching<'_> {
    fn run(&self, target: &mut Target, report: &mut Report, first_after: Duration) -> anyhow::Result<End> {
        let source = ProcessSource::new(target.pid);
        let options = CaptureOptions {
            trigger: Trigger::Periodic,
            like: self.store_as.like.clone(),
            codec: self.store_as.codec,
            deltas: !self.store_as.no_deltas,
            progress: Progress::new().cancel_when(self.interrupted.clone()),
            ..Default::default()
        };
        let mut due = Instant::now() + first_after;
        while report.snapshots < self.count {
            if let Some(end) = self.wait_until(due, target)? {
                return Ok(end);
            }
            let started = Instant::now();
            match self.store.process(&self.process).capture(&source, &options) {
                Ok(capture) => report.add(&capture)?,
                Err(Error::Interrupted) => return Ok(End::Interrupted),
                // Whatever went wrong with a process that has ended: that it has ended is why.
                Err(Error::Source(error)) => match target.has_ended_within(ENDING_WITHIN)? {
                    true => return Ok(End::ProcessEnded),
                    false => return Err(Error::Source(error).into()),
                },
                Err(error) => return Err(error.into()),
            }
            // After a capture that took longer than the interval the next one starts at once.
            due = started + self.every;
        }
        Ok(End::CountReached)
    }

    /// Waits until it is time for a snapshot; says so if the watch is over before.
    fn wait_until(&self, due: Instant, target: &mut Target) -> anyhow::Result<Option<End>> {
        loop {
            if self.context.is_interrupted() {
                return Ok(Some(End::Interrupted));
            }
            if target.has_ended()? {
                return Ok(Some(End::ProcessEnded));
            }
            match due.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Ok(None),
                left => std::thread::sleep(left.min(LOOK_EVERY)),
            }
        }
    }
}

/// The process that is watched.
struct Target {
    pid: u32,
    /// Tells the process from a later one with the same pid.
    started_ticks: Option<u64>,
    /// The command, if the watch has started it.
    command: Option<Started>,
}

struct Started {
    child: Child,
    name: String,
    /// Set when it has ended: how, if that is known.
    ended: Option<Option<ExitStatus>>,
}

impl Target {
    /// A process that runs already.
    fn running(pid: u32) -> Target {
        Target { pid, started_ticks: running_since_ticks(pid), command: None }
    }

    /// Starts a command.
    fn start(context: &Context, program: &OsString, arguments: &[OsString]) -> anyhow::Result<Target> {
        // The command must create its files as if it had been started without us. What this
        // program creates meanwhile lies in the store, which nobody else may enter.
        let private_umask = rustix::process::umask(context.inherited_umask);
        let child = Command::new(program).args(arguments).stdout(Stdio::from(io::stderr())).spawn();
        rustix::process::umask(private_umask);
        let name = human::plain(&program.to_string_lossy());
        let child = child.map_err(|source| CommandError::Start { name: name.clone(), source })?;
        let pid = child.id();
        Ok(Target {
            pid,
            started_ticks: running_since_ticks(pid),
            command: Some(Started { child, name, ended: None }),
        })
    }

    /// Whether the process has ended. A command that has is reaped.
    fn has_ended(&mut self) -> anyhow::Result<bool> {
        match &mut self.command {
            Some(command) => command.has_ended(),
            None => Ok(self.started_ticks.is_none() || running_since_ticks(self.pid) != self.started_ticks),
        }
    }

    fn has_ended_within(&mut self, patience: Duration) -> anyhow::Result<bool> {
        let started = Instant::now();
        loop {
            if self.has_ended()? {
                return Ok(true);
            }
            if started.elapsed() > patience {
                return Ok(false);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Leaves no command behind: lets it run to its end, or until ctrl-C. Says why it is over.
    fn finish(&mut self, context: &Context, end: End) -> End {
        if end == End::CountReached
            && let Some(command) = self.command.as_ref().filter(|command| command.ended.is_none())
        {
            context.output.hint(&format!("{} runs on; ctrl-C ends it", command.name));
        }
        while end == End::CountReached && !context.is_interrupted() && self.is_command_running() {
            std::thread::sleep(LOOK_EVERY);
        }
        if self.is_command_running() {
            self.stop(context);
            return End::Interrupted;
        }
        end
    }

    /// How the command ended, if there was one.
    fn ending(&self) -> Option<String> {
        let command = self.command.as_ref()?;
        let status = command.ended.flatten();
        let status = status.map_or_else(|| "ended".to_owned(), |status| format!("ended: {status}"));
        Some(format!("{} {status}", command.name))
    }

    /// Ends the command: asks it to, more firmly after a while, and kills it when ctrl-C is pressed
    /// once more.
    fn stop(&mut self, context: &Context) {
        context.clear_interrupt();
        let started = Instant::now();
        let mut requests =
            [(INTERRUPT_AFTER, Signal::INT), (TERMINATE_AFTER, Signal::TERM)].into_iter().peekable();
        while self.is_command_running() {
            if context.is_interrupted() {
                context.clear_interrupt();
                self.signal(Signal::KILL);
            }
            if let Some((_, signal)) = requests.next_if(|(after, _)| started.elapsed() > *after) {
                context.output.hint("waiting for the command to end; ctrl-C kills it");
                self.signal(signal);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn is_command_running(&mut self) -> bool {
        // What cannot be waited for is not waited for.
        self.command.as_mut().is_some_and(|command| matches!(command.has_ended(), Ok(false)))
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // Not reaped yet, so the pid is still its own; that it is gone is no trouble.
        let _ = pid.map(|pid| kill_process(pid, signal));
    }
}

impl Started {
    fn has_ended(&mut self) -> anyhow::Result<bool> {
        if self.ended.is_none() {
            self.ended = match self.child.try_wait() {
                Ok(status) => status.map(Some),
                // A capture that was just stopping the command may have been told of its end first.
                Err(error) if error.raw_os_error() == Some(Errno::CHILD.raw_os_error()) => Some(None),
                Err(error) => return Err(error).context("cannot wait for the command"),
            };
        }
        Ok(self.ended.is_some())
    }
}

/// When a running process was started, in clock ticks since the machine was; `None` if there is
/// no such process or only its remains.
fn running_since_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, its name in brackets, may hold anything, blanks and brackets too.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let (state, started_ticks) = (fields.first()?, fields.get(19)?);
    if ["Z", "X", "x"].contains(state) { None } else { started_ticks.parse().ok() }
}

/// What a watch prints: a line for each snapshot, and what they come to.
struct Report {
    output: Output,
    region_bytes: u64,
    snapshots: u64,
    memory_bytes: u64,
    added_bytes: u64,
    longest_pause: Duration,
}

/// Wide enough for whatever may come, since the lines are printed before the next is known.
const COLUMNS: [Column; 7] = [
    Column::left("TIME").width(8),
    Column::id("SNAPSHOT").width(12),
    Column::right("MEMORY").width(8),
    Column::right("CHANGED").width(8),
    Column::right("NEW ON DISK").width(11),
    Column::right("STOOD STILL").width(11),
    Column::right("TOOK").width(8),
];

impl Report {
    fn new(output: Output, region_bytes: u64) -> Report {
        let longest_pause = Duration::ZERO;
        Report { output, region_bytes, snapshots: 0, memory_bytes: 0, added_bytes: 0, longest_pause }
    }

    fn add(&mut self, capture: &Capture) -> anyhow::Result<()> {
        self.snapshots += 1;
        self.memory_bytes += capture.memory_bytes;
        self.added_bytes += capture.added_bytes;
        self.longest_pause = self.longest_pause.max(capture.paused);
        if self.output.json {
            return self.output.json_line(&CaptureObject::from(capture));
        }
        if self.output.quiet {
            return self.output.text(&format!("{}\n", capture.id));
        }
        if self.snapshots == 1 {
            self.output.text(&title_row(&self.output, &COLUMNS))?;
        }
        // The last region of a mapping is shorter, so this may be a little too much.
        let changed_bytes = (capture.changed_regions * self.region_bytes).min(capture.memory_bytes);
        let cells = [
            human::time_of_day(capture.time),
            human::short(capture.id),
            human::size(capture.memory_bytes),
            human::size(changed_bytes),
            human::size(capture.added_bytes),
            human::duration(capture.paused),
            human::duration(capture.elapsed),
        ];
        self.output.text(&table_row(&self.output, &COLUMNS, &cells))
    }

    /// What all snapshots come to.
    fn totals(&self) -> anyhow::Result<()> {
        if self.output.json || self.output.quiet {
            return Ok(());
        }
        if self.snapshots == 0 {
            self.output.note("the process ended before the first snapshot; a shorter --every comes sooner");
            return Ok(());
        }
        let ratio = match self.added_bytes {
            0 => String::new(),
            added_bytes => format!(", {} less", human::times(self.memory_bytes as f64 / added_bytes as f64)),
        };
        self.output.text(&format!(
            "{}: {} of memory in {} on disk{ratio}; it never stood still for more than {}\n",
            human::counted(self.snapshots, "snapshot"),
            human::size(self.memory_bytes),
            human::size(self.added_bytes),
            human::duration(self.longest_pause),
        ))
    }
}
