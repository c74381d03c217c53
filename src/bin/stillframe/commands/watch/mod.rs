//! `watch`: snapshots at intervals, of a running process or of a command that it starts.
//!
//! ```text
//! wait until a snapshot is due ─> capture ─┬─> done: a line of the report
//!      ^     │                             └─> failed: told, and tried again later ──┐
//!      │     └─> the process ended, ctrl-C: over                                     │
//!      └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Whatever goes wrong with a snapshot, the watched process goes on, and so does the watch.

mod failures;
mod report;
mod target;

use std::path::Path;
use std::time::{Duration, Instant};

use stillframe::{Capture, CaptureOptions, Error, ProcessSource, Progress, SourceError, Store, Trigger};

use crate::arguments;
use crate::capture::{file_name, name_of_process};
use crate::context::Context;
use crate::errors::{CommandError, Exit};
use failures::Failures;
use report::Report;
use target::Target;

/// How often a waiting watch looks whether the process still runs and nobody pressed ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A command gets so long to load itself before its first snapshot.
const FIRST_AFTER: Duration = Duration::from_millis(100);

/// A process whose capture failed gets so long to be seen ending, which explains the failure.
const ENDING_WITHIN: Duration = Duration::from_millis(500);

/// Takes snapshots until the process ends, the count is reached, or somebody presses ctrl-C.
pub(crate) fn watch(context: &Context, arguments: arguments::Watch) -> anyhow::Result<Exit> {
    if let Some(pid) = arguments.pid {
        ProcessSource::new(pid).check()?;
    }
    let store = context.open_or_create()?;
    // From here on ctrl-C must not end us before the command.
    let interrupted = context.interrupted();
    let process = match (arguments.process, arguments.pid, arguments.command.first()) {
        (Some(name), ..) => name,
        (None, Some(pid), _) => name_of_process(context, &store, pid)?,
        (None, None, program) => program.map(|program| file_name(Path::new(program))).unwrap_or_default(),
    };
    let options = CaptureOptions {
        trigger: Trigger::Periodic,
        like: arguments.store_as.like,
        codec: arguments.store_as.codec,
        deltas: !arguments.store_as.no_deltas,
        progress: Progress::new().cancel_when(interrupted),
        ..Default::default()
    };
    // What is wrong from the beginning is told before a command is started.
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
        source: ProcessSource::new(target.pid).stop_timeout(arguments.stopping.stop_timeout),
        store: Some(store),
        process,
        options,
        every: arguments.every,
        count: arguments.count.unwrap_or(u64::MAX),
    };
    let end = watching.run(&mut target, &mut report, &mut failures, first_after);
    // A command may run on for long: others may use the store meanwhile.
    drop(watching);
    let end = end?;
    report.totals();
    failures.totals();
    let end = target.finish(context, end);
    if let Some(ending) = target.ending() {
        context.output.note(&ending);
    }
    context.output.hint("look at the snapshots: stillframe list");
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
    source: ProcessSource,
    /// `None` after it has failed, until it is opened for the next attempt: others may make room in it, or repair it, meanwhile.
    store: Option<Store>,
    process: String,
    options: CaptureOptions,
    every: Duration,
    count: u64,
}

impl Watching<'_> {
    /// An error only if no snapshot of a running process was taken and none can be.
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
                        // Whatever went wrong with a process that has ended: that it has ended is why.
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

    fn capture(&mut self) -> Result<Capture, Error> {
        let store = match self.store.take() {
            Some(store) => store,
            None => self.context.reopen()?,
        };
        let store = self.store.insert(store);
        store.process(&self.process).capture(&self.source, &self.options)
    }

    /// Waits until it is time for a snapshot; says so if the watch is over before.
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

    /// Whether the watch is over within `patience`.
    fn ends_within(&self, patience: Duration, target: &mut Target) -> Option<End> {
        self.wait_until(Instant::now() + patience, target)
    }
}
