//! `watch`: snapshots at intervals, of a running process or of a command that it starts.
//!
//! ```text
//! wait until a snapshot is due ─> capture ─┬─> done: a line of the report
//!      ^     │                             └─> failed: reported, and tried again later ──┐
//!      │     └─> the process ended, ctrl-C: over                                     │
//!      └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! If a snapshot fails, the watched process runs on, and the watch continues.

mod failures;
mod report;
mod target;

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args, ValueHint};
use stillframe::record::Trigger;
use stillframe::source::{LiveProcessSource, SourceError};
use stillframe::{CaptureOptions, CaptureStats, Error, Progress, Store};

use super::capture::{file_name, name_of_process};
use super::stopping::Stopping;
use super::store_as::StoreAs;
use crate::context::Context;
use crate::errors::{CommandError, Exit, wrong_usage};
use crate::values::{capture_count, interval, pid};
use failures::Failures;
use report::Report;
use target::Target;

const EXAMPLES: &str = "\
Examples:
  stillframe watch --every 500ms -- python3 app.py --port 8000
  stillframe watch --every 1m --count 60 --process web --pid 4711";

/// Take snapshots at intervals
///
/// Watches a running process, or a command that it starts. Of a command only the process itself is
/// captured, not its children.
///
/// The watch ends when the process ends, after --count snapshots, or on ctrl-C. Ctrl-C also ends a
/// command that the watch started; a second ctrl-C kills it.
///
/// If a snapshot fails, for example because the disk is full or a debugger is attached, the watch
/// reports the error on standard error, closes the store and tries again later. The process runs
/// on.
///
/// The exit code is 0 if at least one snapshot was taken and none failed, or if --count snapshots
/// were taken. Otherwise it is that of the first failure, or 6 if the process ended before the
/// first snapshot.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true), after_long_help = EXAMPLES)]
#[command(override_usage = "\
stillframe watch [OPTIONS] -- COMMAND [ARGUMENT]...
       stillframe watch [OPTIONS] --pid <PID>")]
pub(crate) struct Watch {
    /// Interval between snapshots [default: 1s]
    ///
    /// Such as 500ms, 2s or 1m.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval, hide_default_value = true)]
    every: Duration,
    /// Stop after N snapshots
    ///
    /// A command that the watch started runs on to its end.
    #[arg(long, value_name = "N", value_parser = capture_count)]
    count: Option<u64>,
    /// Process name of the snapshots
    ///
    /// Default: the name of the command, or pid:PID as for capture.
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
    /// Watch this running process
    #[arg(long, group = "source", value_name = "PID", value_parser = pid)]
    pid: Option<u32>,
    #[command(flatten)]
    stopping: Stopping,
    #[command(flatten)]
    store_as: StoreAs,
    /// Command to start and watch
    ///
    /// Its standard output goes to standard error, so that standard output has the snapshots only.
    #[arg(last = true, group = "source", value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    command: Vec<OsString>,
}

/// How often a waiting watch checks whether the process has ended or ctrl-C was pressed.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a started command may load before its first snapshot.
const FIRST_AFTER: Duration = Duration::from_millis(100);

/// How long to wait for the end of a process whose capture failed: the end explains the failure.
const ENDING_WITHIN: Duration = Duration::from_millis(500);

/// Takes snapshots until the process ends, the count is reached, or ctrl-C is pressed.
pub(super) fn watch(context: &Context, arguments: Watch) -> anyhow::Result<Exit> {
    if let Some(pid) = arguments.pid {
        LiveProcessSource::new(pid).check()?;
    }
    if arguments.command.first().is_some_and(|program| program.is_empty()) {
        return Err(wrong_usage("expected the name of a command after --, found an empty one"));
    }
    let store = context.open_or_create()?;
    // From here on ctrl-C must end the command first, and then this program.
    let interrupted = context.interrupted();
    let process = match (arguments.process, arguments.pid, arguments.command.first()) {
        (Some(name), ..) => name,
        (None, Some(pid), _) => name_of_process(context, &store, pid)?,
        (None, None, program) => program.map(|program| file_name(Path::new(program))).unwrap_or_default(),
    };
    let mut options = CaptureOptions::new()
        .trigger(Trigger::Periodic)
        .codec(arguments.store_as.codec)
        .deltas(!arguments.store_as.no_deltas)
        .progress(Progress::new().cancel_when(interrupted));
    options.like = arguments.store_as.like;
    // Wrong options are reported before the command is started.
    store.process(&process).check(&options)?;
    let (mut target, first_after) = match (arguments.pid, arguments.command.split_first()) {
        (None, Some((program, rest))) => {
            (Target::start(context, program, rest)?, FIRST_AFTER.min(arguments.every))
        }
        (pid, _) => (Target::running(pid.unwrap_or_default()), Duration::ZERO),
    };
    let mut report = Report::new(context.output, store.info().region_size.bytes() as u64);
    let mut failures = Failures::new(context.output);
    let mut watching = Watching {
        context,
        source: LiveProcessSource::new(target.pid).stop_timeout(arguments.stopping.stop_timeout),
        store: Some(store),
        process,
        options,
        every: arguments.every,
        count: arguments.count.unwrap_or(u64::MAX),
    };
    let end = watching.run(&mut target, &mut report, &mut failures, first_after);
    // A command may run on for long: the store is closed, so that other processes can use it.
    drop(watching);
    let end = end?;
    report.totals();
    failures.totals();
    let end = target.finish(context, end);
    if let Some(ending) = target.ending() {
        context.output.note(&ending);
    }
    context.output.hint("to see the snapshots: stillframe list");
    let output = report.output_error();
    match (end, failures.exit()) {
        (End::Interrupted, _) => Ok(Exit::Interrupted),
        (End::CountReached, _) => output.map_or(Ok(Exit::Done), Err),
        (End::ProcessEnded, Some(exit)) => Ok(exit),
        (End::ProcessEnded, None) if report.snapshots == 0 => Err(CommandError::NoSnapshot.into()),
        (End::ProcessEnded, None) => output.map_or(Ok(Exit::Done), Err),
    }
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
    source: LiveProcessSource,
    /// `None` after a failure, until the next attempt opens it: until then other processes can free
    /// space in it or repair it.
    store: Option<Store>,
    process: String,
    options: CaptureOptions,
    every: Duration,
    count: u64,
}

impl Watching<'_> {
    /// Fails only if no snapshot of a running process was taken and none can be.
    fn run(
        &mut self,
        target: &mut Target,
        report: &mut Report,
        failures: &mut Failures,
        first_after: Duration,
    ) -> anyhow::Result<End> {
        let mut due = Instant::now() + first_after;
        while report.snapshots < self.count {
            if let Some(end) = self.wait_until(due, target) {
                return Ok(end);
            }
            let started = Instant::now();
            // After a capture that took longer than the interval the next one starts at once.
            due = started + self.every;
            match self.capture() {
                Ok(capture) => {
                    report.add(&capture);
                    failures.succeeded();
                }
                Err(Error::Interrupted) => return Ok(End::Interrupted),
                Err(error) => {
                    if matches!(error, Error::Source(_)) {
                        // If the process has ended, that is the cause of any error.
                        if let Some(end) = self.ends_within(ENDING_WITHIN, target) {
                            return Ok(end);
                        }
                        let is_refused = matches!(error, Error::Source(SourceError::NotPermitted { .. }));
                        if is_refused && report.snapshots == 0 && target.is_running_process() {
                            return Err(error.into());
                        }
                    } else {
                        self.store = None;
                    }
                    failures.add(&error.into());
                    due = started + self.every.max(failures.pause());
                }
            }
        }
        Ok(End::CountReached)
    }

    fn capture(&mut self) -> Result<CaptureStats, Error> {
        let store = match self.store.take() {
            Some(store) => store,
            None => self.context.reopen()?,
        };
        let store = self.store.insert(store);
        store.process(&self.process).capture(&self.source, &self.options)
    }

    /// Waits until a snapshot is due, or gives the reason why the watch is over before that.
    fn wait_until(&self, due: Instant, target: &mut Target) -> Option<End> {
        loop {
            if self.context.is_interrupted() {
                return Some(End::Interrupted);
            }
            if target.has_ended() {
                return Some(End::ProcessEnded);
            }
            match due.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return None,
                left => std::thread::sleep(left.min(LOOK_EVERY)),
            }
        }
    }

    /// Waits up to `patience` for the end of the watch.
    fn ends_within(&self, patience: Duration, target: &mut Target) -> Option<End> {
        self.wait_until(Instant::now() + patience, target)
    }
}
