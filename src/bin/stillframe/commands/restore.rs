//! `restore`.

use std::time::Instant;

use serde::Serialize;
use stillframe::{SnapshotId, Store};

use crate::arguments;
use crate::context::{Context, display};
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::json::milliseconds;
use crate::output::Style;
use crate::progress::progress;
use crate::rollback;

/// Brings the memory of a snapshot back.
pub(crate) fn restore(context: &Context, arguments: &arguments::Restore) -> anyhow::Result<Exit> {
    if arguments.into_pid.is_none() && arguments.leave.is_given() {
        return Err(wrong_usage(
            "--leave-new-memory, --leave-shared-memory, --leave-descriptors, --leave-devices and --seek-files are for \
             --into-pid",
        ));
    }
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    match arguments.into_pid {
        Some(pid) => rollback::into_process(context, &store, id, pid, &arguments.leave),
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
    let progress = progress(context, "restoring");
    let (path, bytes, written_bytes, threads) = match (&arguments.core, &arguments.to) {
        (Some(path), _) => {
            let stats = store.restore(id)?.progress(progress).into_core(path, arguments.force)?;
            (path, stats.bytes, stats.written_bytes, Some(stats.threads))
        }
        (None, Some(path)) if arguments.in_place => {
            let stats = store.roll_back(id)?.progress(progress).file(path)?;
            (path, stats.bytes, stats.written_bytes, None)
        }
        (None, Some(path)) => {
            let stats = store.restore(id)?.progress(progress).into_file(path, arguments.force)?;
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
        let memory = match arguments.in_place {
            true => format!("{}, of which {} differed", human::size(bytes), human::size(written_bytes)),
            false => format!("{}, {} of it holes", human::size(bytes), human::size(holes_bytes)),
        };
        let mut lines = vec![
            ("snapshot", output.styled(Style::Id, &human::short(id))),
            ("restored to", display(path)),
            ("memory", memory),
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
