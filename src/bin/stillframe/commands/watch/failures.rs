//! Snapshots that could not be taken: each kind is told, and when to try again.

use std::time::{Duration, Instant};

use crate::errors::{self, Exit};
use crate::human;
use crate::output::Output;

/// The pause after a failure, which grows to twice as long with each further one: every attempt pauses the process.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The same failure is told again after so long.
const TELL_AGAIN_AFTER: Duration = Duration::from_secs(60);

pub(super) struct Failures {
    output: Output,
    count: u64,
    in_a_row: u32,
    /// What the first one would have ended another verb with.
    exit: Option<Exit>,
    /// The last one that was told, without its numbers, and when.
    told: Option<(String, Instant)>,
}

impl Failures {
    pub(super) fn new(output: Output) -> Failures {
        Failures { output, count: 0, in_a_row: 0, exit: None, told: None }
    }

    /// Tells a failure, unless it is the same as the last one.
    pub(super) fn add(&mut self, error: &anyhow::Error) {
        self.count += 1;
        self.in_a_row += 1;
        self.exit.get_or_insert(errors::exit(error));
        let text = errors::told(error);
        let kind: String = text.chars().filter(|letter| !letter.is_ascii_digit()).collect();
        let is_told =
            self.told.as_ref().is_some_and(|(told, at)| *told == kind && at.elapsed() < TELL_AGAIN_AFTER);
        if !is_told {
            let more = match self.in_a_row {
                1 => String::new(),
                in_a_row => format!(" ({in_a_row} failed in a row)"),
            };
            self.output.error(&format!(
                "{text}\n    no snapshot was taken{more}; the watch goes on and tries again"
            ));
            self.told = Some((kind, Instant::now()));
        }
    }

    /// Tells that snapshots are taken again.
    pub(super) fn succeeded(&mut self) {
        if self.in_a_row > 0 {
            let failed = human::counted(self.in_a_row.into(), "failure");
            self.output.note(&format!("snapshots are taken again, after {failed}"));
        }
        (self.in_a_row, self.told) = (0, None);
    }

    /// How long to wait before the next attempt at least.
    pub(super) fn pause(&self) -> Duration {
        let doublings = self.in_a_row.saturating_sub(1).min(16);
        (FIRST_PAUSE * (1 << doublings)).min(LONGEST_PAUSE)
    }

    /// Tells how many there were.
    pub(super) fn totals(&self) {
        if self.count > 0 {
            self.output.note(&format!("{} could not be taken", human::counted(self.count, "snapshot")));
        }
    }

    /// What to exit with because of them, if there were any.
    pub(super) fn exit(&self) -> Option<Exit> {
        self.exit
    }
}
