//! `list`: the snapshots, oldest first.

use clap::Args;
use jiff::Timestamp;
use stillframe::Snapshot;

use super::show::labels_text;
use super::snapshot_json::SnapshotJson;
use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Column, print, table};
use crate::values::label;

const EXAMPLES: &str = "\
Examples:
  stillframe list
  stillframe list --process web-1 --label stage=ready";

/// List the snapshots, oldest first
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct List {
    /// Only snapshots of this process
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
    /// Only snapshots with this label (repeatable)
    ///
    /// If repeated, a snapshot must have all of the labels.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
}

/// Lists snapshots, oldest first.
pub(super) fn list(context: &Context, arguments: &List) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let mut snapshots = store.snapshots();
    snapshots.retain(|snapshot| {
        arguments.process.as_ref().is_none_or(|process| snapshot.process() == *process)
            && arguments.labels.iter().all(|(key, value)| snapshot.labels().get(key) == Some(value))
    });
    if output.json {
        let objects = snapshots.into_iter().map(|snapshot| SnapshotJson::new(&snapshot));
        output.json(&objects.collect::<Vec<_>>())?;
    } else if output.quiet {
        print(&snapshots.iter().map(|snapshot| format!("{}\n", snapshot.id())).collect::<String>())?;
    } else if snapshots.is_empty() {
        output.note(if arguments.process.is_some() || !arguments.labels.is_empty() {
            "no snapshot matches; `stillframe list` lists all snapshots"
        } else {
            "the store has no snapshots; `stillframe capture --pid PID` takes one"
        });
    } else {
        let columns = [
            Column::id("SNAPSHOT"),
            Column::left("PROCESS"),
            Column::left("TIME"),
            Column::right("AGE"),
            Column::right("MEMORY"),
            Column::left("TRIGGER"),
            Column::left("LABELS"),
        ];
        let now = Timestamp::now();
        let row = |snapshot: Snapshot<'_>| {
            let record = snapshot.record();
            vec![
                human::short(snapshot.id()),
                human::plain(&record.process),
                human::local_time(record.time),
                human::age(record.time, now),
                human::size(record.memory_bytes),
                human::plain(&record.trigger.to_string()),
                labels_text(snapshot.labels()),
            ]
        };
        output.text(&table(output, &columns, &snapshots.into_iter().map(row).collect::<Vec<_>>()))?;
    }
    Ok(Exit::Done)
}
