//! `rollback`, which `restore --into-pid` is as well.

use serde::Serialize;
use stillframe::{Mapping, RollBackStats, SnapshotId, Store};

use crate::arguments;
use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::json::milliseconds;
use crate::output::Style;
use crate::progress::progress;

/// Rolls a running process back.
pub(crate) fn rollback(context: &Context, arguments: &arguments::Rollback) -> anyhow::Result<Exit> {
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    into_process(context, &store, id, arguments.pid, &arguments.leave)
}

/// How many lines about descriptors are for people.
const MAX_DESCRIPTORS_TOLD: usize = 20;

/// The same with an open store.
pub(crate) fn into_process(
    context: &Context,
    store: &Store,
    id: SnapshotId,
    pid: u32,
    leave: &arguments::Leave,
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
        left_not_captured_bytes: u64,
        left_descriptors: Vec<String>,
    }
    let output = &context.output;
    let stats: RollBackStats = store
        .roll_back(id)?
        .leave_new_memory(leave.leave_new_memory)
        .leave_shared_memory(leave.leave_shared_memory)
        .leave_descriptors(leave.leave_descriptors)
        .leave_devices(leave.leave_devices)
        .seek_files(leave.seek_files)
        .stop_timeout(leave.stopping.stop_timeout)
        .progress(progress(context, "rolling back"))
        .process(pid)?;
    let named = |mapping: &Mapping| format!("{} {}", mapping.range, human::plain(&mapping.name));
    let left_shared: Vec<String> = stats.left_shared.iter().map(named).collect();
    // The program chose the names of its files.
    let left_descriptors: Vec<String> =
        stats.left_descriptors.iter().map(|line| human::plain(line)).collect();
    if output.json {
        output.json(&RollBackObject {
            id: id.to_string(),
            bytes: stats.bytes,
            written_bytes: stats.written_bytes,
            elapsed_ms: milliseconds(stats.elapsed),
            paused_ms: milliseconds(stats.paused),
            stopped: stats.is_stopped,
            left_shared,
            left_not_captured_bytes: stats.left_not_captured_bytes,
            left_descriptors,
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
    // Whoever reads this, and however quiet it is to be: a part of the process is of another moment.
    for mapping in left_shared {
        output.warning(&format!("left as it is, although it differs, as it is shared: {mapping}"));
    }
    if stats.left_not_captured_bytes > 0 {
        let left = human::size(stats.left_not_captured_bytes);
        output.warning(&format!("left as it is, as the snapshot does not have it: {left} of memory"));
    }
    for line in left_descriptors.iter().take(MAX_DESCRIPTORS_TOLD) {
        output.warning(line);
    }
    if let Some(more) = left_descriptors.len().checked_sub(MAX_DESCRIPTORS_TOLD).filter(|more| *more > 0) {
        output.warning(&format!("{more} more descriptors differ; --json names them all"));
    }
    if stats.is_stopped {
        output.hint(&format!("it was stopped before and still is; to let it go on: kill -CONT {pid}"));
    }
    Ok(Exit::Done)
}
