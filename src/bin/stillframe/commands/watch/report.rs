//! What a watch prints: a line for each snapshot, and the totals.

use std::time::Duration;

use stillframe::CaptureStats;

use crate::commands::capture::CaptureJson;
use crate::errors::CommandError;
use crate::human;
use crate::output::{Column, Output, table_row, title_row};

/// What a watch prints: a line for each snapshot, and what they come to.
pub(super) struct Report {
    output: Output,
    region_bytes: u64,
    pub(super) snapshots: u64,
    memory_bytes: u64,
    added_bytes: u64,
    longest_pause: Duration,
    /// The error after which nothing is printed. Snapshots are still taken.
    output_error: Option<anyhow::Error>,
}

/// The columns are wide enough for all values: a line is printed before the next one is known.
const COLUMNS: [Column; 7] = [
    Column::left("TIME").width(8),
    Column::id("SNAPSHOT").width(12),
    Column::right("MEMORY").width(8),
    Column::right("CHANGED").width(8),
    Column::right("NEW ON DISK").width(11),
    Column::right("PAUSED").width(8),
    Column::right("TOOK").width(8),
];

impl Report {
    pub(super) fn new(output: Output, region_bytes: u64) -> Report {
        Report {
            output,
            region_bytes,
            snapshots: 0,
            memory_bytes: 0,
            added_bytes: 0,
            longest_pause: Duration::ZERO,
            output_error: None,
        }
    }

    pub(super) fn add(&mut self, capture: &CaptureStats) {
        self.snapshots += 1;
        self.memory_bytes += capture.memory_bytes;
        self.added_bytes += capture.added_bytes;
        self.longest_pause = self.longest_pause.max(capture.paused);
        let printed = if self.output_error.is_none() { self.print(capture) } else { Ok(()) };
        self.keep_error(printed);
    }

    /// Prints the totals.
    pub(super) fn totals(&mut self) {
        let printed = if self.output_error.is_none() { self.print_totals() } else { Ok(()) };
        self.keep_error(printed);
    }

    /// Why not everything was printed, unless the reader closed standard output.
    pub(super) fn output_error(&mut self) -> Option<anyhow::Error> {
        let is_closed_pipe =
            |error: &anyhow::Error| matches!(error.downcast_ref(), Some(CommandError::ClosedPipe));
        self.output_error.take().filter(|error| !is_closed_pipe(error))
    }

    fn keep_error(&mut self, printed: anyhow::Result<()>) {
        if let Err(error) = printed {
            self.output.note(&format!("{error}; the watch continues and prints nothing more"));
            self.output_error = Some(error);
        }
    }

    fn print(&self, capture: &CaptureStats) -> anyhow::Result<()> {
        if self.output.json {
            return self.output.json_line(&CaptureJson::new(capture, None));
        }
        if self.output.quiet {
            return self.output.text(&format!("{}\n", capture.id));
        }
        if self.snapshots == 1 {
            self.output.text(&title_row(&self.output, &COLUMNS))?;
        }
        // An upper bound: the last region of a mapping may be shorter.
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

    fn print_totals(&self) -> anyhow::Result<()> {
        if self.output.json || self.output.quiet || self.snapshots == 0 {
            return Ok(());
        }
        let ratio = match self.added_bytes {
            0 => String::new(),
            added_bytes => {
                format!(", {} smaller", human::times(self.memory_bytes as f64 / added_bytes as f64))
            }
        };
        self.output.text(&format!(
            "{}: {} of memory in {} on disk{ratio}; longest pause {}\n",
            human::counted(self.snapshots, "snapshot"),
            human::size(self.memory_bytes),
            human::size(self.added_bytes),
            human::duration(self.longest_pause),
        ))
    }
}
