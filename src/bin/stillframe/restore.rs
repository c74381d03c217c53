//! `restore`.

use std::time::Instant;

use serde::Serialize;
use stillframe::{Mapping, RollBackStats, SnapshotId, Store};

use crate::arguments;
use crate::context::{Context, display};
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::json::milliseconds;
use crate::output::Style;
use crate::progress::progress;

/// Brings the memory of a snapshot back.
pub(crate) fn restore(context: &Context, arguments: &arguments::Restore) -> anyhow::Result<Exit> {
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    match arguments.into_pid {
        Some(pid) => into_process(context, &store, id, pid, arguments),
        None => to_file(context, &store, id, arguments),
    }
}

/// Writes the image to a file, or a core.
fn to_file(
    context: &Context,
    store: &Store,
    id: SnapshotId,
    arguments: &arguments::Restore,
) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct RestoreObject {
        id: String,
        bytes: u64,
        written_bytes: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        threads: Option<usize>,
        elapsed_ms: f64,
    }
    let output = &context.output;
    let started = Instant::now();
    let restore = store.restore(id)?.progress(progress(context, "restoring"));
    let (path, bytes, written_bytes, threads) = match (&arguments.core, &arguments.to) {
        (Some(path), _) => {
            let stats = restore.into_core(path, arguments.force)?;
            (path, stats.bytes, stats.written_bytes, Some(stats.threads))
        }
        (None, Some(path)) => {
            let stats = restore.into_file(path, arguments.force)?;
            (path, stats.bytes, stats.written_bytes, None)
        }
        (None, None) => return Err(wrong_usage("where to? --to FILE or --core FILE says so")),
    };
    let elapsed = started.elapsed();
    if output.json {
        output.json(&RestoreObject {
            id: id.to_string(),
            bytes,
            written_bytes,
            threads,
            elapsed_ms: milliseconds(elapsed),
        })?;
    } else if !output.quiet {
        let holes_bytes = bytes.saturating_sub(written_bytes);
        let mut lines = vec![
            ("snapshot", output.styled(Style::Id, &human::short(id))),
            ("restored to", display(path)),
            ("memory", format!("{}, {} of it holes", human::size(bytes), human::size(holes_bytes))),
        ];
        lines.extend(threads.map(|threads| match threads {
            0 => (
                "threads",
                "none: the snapshot has no registers, a debugger shows the memory alone".to_owned(),
            ),
            threads => ("threads", human::count(threads as u64)),
        }));
        lines.push(("took", human::duration(elapsed)));
        output.text(&output.lines(&lines))?;
    }
    Ok(Exit::Done)
}

/// Rolls a running process back.
fn into_process(
    context: &Context,
    store: &Store,
    id: SnapshotId,
    pid: u32,
    arguments: &arguments::Restore,
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
        .leave_new_memory(arguments.leave_new_memory)
        .stop_timeout(arguments.stopping.stop_timeout)
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
