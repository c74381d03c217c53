//! `restore`.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use stillframe::{Mapping, RollBackStats, SnapshotId, Store};

use crate::arguments;
use crate::context::{Context, display};
use crate::errors::Exit;
use crate::human;
use crate::json::milliseconds;
use crate::output::Style;
use crate::progress::progress;

/// Brings the memory of a snapshot back.
pub(crate) fn restore(context: &Context, arguments: &arguments::Restore) -> anyhow::Result<Exit> {
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    match (&arguments.to, arguments.into_pid) {
        (Some(path), _) => to_file(context, &store, id, path, arguments.force),
        (None, Some(pid)) => into_process(context, &store, id, pid, arguments.leave_new_memory),
        // The parser wants one of them.
        (None, None) => Ok(Exit::WrongUsage),
    }
}

/// Writes the image to a file.
fn to_file(
    context: &Context,
    store: &Store,
    id: SnapshotId,
    path: &Path,
    force: bool,
) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct RestoreObject {
        id: String,
        bytes: u64,
        written_bytes: u64,
        elapsed_ms: f64,
    }
    let output = &context.output;
    let started = Instant::now();
    let stats = store.restore(id)?.progress(progress(context, "restoring")).into_file(path, force)?;
    let elapsed = started.elapsed();
    if output.json {
        output.json(&RestoreObject {
            id: id.to_string(),
            bytes: stats.bytes,
            written_bytes: stats.written_bytes,
            elapsed_ms: milliseconds(elapsed),
        })?;
    } else if !output.quiet {
        let holes_bytes = stats.bytes.saturating_sub(stats.written_bytes);
        output.text(&output.lines(&[
            ("snapshot", output.styled(Style::Id, &human::short(id))),
            ("restored to", display(path)),
            ("memory", format!("{}, {} of it holes", human::size(stats.bytes), human::size(holes_bytes))),
            ("took", human::duration(elapsed)),
        ]))?;
    }
    Ok(Exit::Done)
}

/// Rolls a running process back.
fn into_process(
    context: &Context,
    store: &Store,
    id: SnapshotId,
    pid: u32,
    leave_new_memory: bool,
) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct RollBackObject {
        id: String,
        bytes: u64,
        written_bytes: u64,
        elapsed_ms: f64,
        paused_ms: f64,
        stopped: bool,
        left_shared: Vec<String>,
    }
    let output = &context.output;
    let stats: RollBackStats = store
        .roll_back(id)?
        .leave_new_memory(leave_new_memory)
        .progress(progress(context, "rolling back"))
        .process(pid)?;
    let named = |mapping: &Mapping| format!("{} {}", mapping.range, human::plain(&mapping.name));
    let left_shared: Vec<String> = stats.left_shared.iter().map(named).collect();
    if output.json {
        output.json(&RollBackObject {
            id: id.to_string(),
            bytes: stats.bytes,
            written_bytes: stats.written_bytes,
            elapsed_ms: milliseconds(stats.elapsed),
            paused_ms: milliseconds(stats.paused),
            stopped: stats.is_stopped,
            left_shared,
        })?;
        return Ok(Exit::Done);
    }
    if !output.quiet {
        output.text(&output.lines(&[
            ("snapshot", output.styled(Style::Id, &human::short(id))),
            ("rolled back", format!("process {pid}")),
            (
                "memory",
                format!(
                    "{}, of which {} differed",
                    human::size(stats.bytes),
                    human::size(stats.written_bytes)
                ),
            ),
            (
                "took",
                format!(
                    "{}, the process stood still for {}",
                    human::duration(stats.elapsed),
                    human::duration(stats.paused)
                ),
            ),
        ]))?;
    }
    for mapping in left_shared {
        output.hint(&format!("left as it is, as others share it: {mapping}"));
    }
    if stats.is_stopped {
        output.hint(&format!("it was stopped before and still is; to let it go on: kill -CONT {pid}"));
    }
    Ok(Exit::Done)
}
