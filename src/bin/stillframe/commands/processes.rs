//! `processes`: each process, the number of its snapshots and its newest one.

use clap::Args;
use jiff::Timestamp;

use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Column, table};

const EXAMPLES: &str = "\
Examples:
  stillframe processes
  stillframe processes --json";

/// List the processes that have snapshots
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Processes {}

/// Lists the processes that have snapshots.
pub(super) fn processes(context: &Context) -> anyhow::Result<Exit> {
    let output = &context.output;
    let processes = context.open()?.processes();
    if output.json {
        output.json(&processes)?;
    } else if processes.is_empty() {
        output.note("the store has no snapshots; `stillframe capture --pid PID` takes one");
    } else {
        let columns = [
            Column::left("PROCESS"),
            Column::right("SNAPSHOTS"),
            Column::id("LATEST"),
            Column::left("TIME"),
            Column::right("AGE"),
        ];
        let now = Timestamp::now();
        let rows = processes.iter().map(|summary| {
            vec![
                human::plain(&summary.process),
                human::count(summary.snapshots as u64),
                human::short(summary.latest),
                human::local_time(summary.latest_time),
                human::age(summary.latest_time, now),
            ]
        });
        output.text(&table(output, &columns, &rows.collect::<Vec<_>>()))?;
    }
    Ok(Exit::Done)
}
