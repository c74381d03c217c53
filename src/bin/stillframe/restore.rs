//! `restore`.

use std::time::Instant;

use serde::Serialize;

use crate::arguments;
use crate::context::{Context, display};
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::json::milliseconds;
use crate::output::Style;
use crate::progress::progress;

/// Writes the image of a snapshot to a file, or a core.
pub(crate) fn restore(context: &Context, arguments: &arguments::Restore) -> anyhow::Result<Exit> {
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
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
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
