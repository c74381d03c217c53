//! Snapshots that failed: each kind of failure is reported once, and the watch tries again after a
//! pause.

use std::time::{Duration, Instant};

use crate::errors::{self, Exit};
use crate::human;
use crate::output::Output;

/// The pause after a failure. It doubles with each further failure, because every attempt pauses
/// the process.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The same failure is reported again after this time.
const REPORT_AGAIN_AFTER: Duration = Duration::from_secs(60);

pub(super) struct Failures {
    output: Output,
    count: u64,
    in_a_row: u32,
    /// The exit code of the first one.
    exit: Option<Exit>,
    /// The last failure that was reported, without its numbers, and the time of the report.
    reported: Option<(String, Instant)>,
}

impl Failures {
    pub(super) fn new(output: Output) -> Failures {
        Failures { output, count: 0, in_a_row: 0, exit: None, reported: None }
    }

    /// Reports a failure, unless it is the same as the last one.
    pub(super) fn add(&mut self, error: &anyhow::Error) {
        self.count += 1;
        self.in_a_row += 1;
        self.exit.get_or_insert(errors::exit(error));
        let text = errors::report_text(error);
        let kind: String = text.chars().filter(|letter| !letter.is_ascii_digit()).collect();
        let is_known = self
            .reported
            .as_ref()
            .is_some_and(|(reported, at)| *reported == kind && at.elapsed() < REPORT_AGAIN_AFTER);
        if !is_known {
            let more = match self.in_a_row {
                1 => String::new(),
                in_a_row => format!(" ({in_a_row} failed in a row)"),
            };
            self.output.error(&format!(
                "{text}\n    no snapshot was taken{more}; the watch continues and tries again"
            ));
            self.reported = Some((kind, Instant::now()));
        }
    }

    /// Reports that snapshots are taken again.
    pub(super) fn succeeded(&mut self) {
        if self.in_a_row > 0 {
            let failed = human::counted(self.in_a_row.into(), "failure");
            self.output.note(&format!("snapshots are taken again, after {failed}"));
        }
        (self.in_a_row, self.reported) = (0, None);
    }

    /// The shortest wait before the next attempt.
    pub(super) fn pause(&self) -> Duration {
        let doublings = self.in_a_row.saturating_sub(1).min(16);
        (FIRST_PAUSE * (1 << doublings)).min(LONGEST_PAUSE)
    }

    /// Reports the number of failures.
    pub(super) fn totals(&self) {
        if self.count > 0 {
            self.output.note(&format!("{} could not be taken", human::counted(self.count, "snapshot")));
        }
    }

    /// The exit code of the first failure, if there was one.
    pub(super) fn exit(&self) -> Option<Exit> {
        self.exit
    }
}
