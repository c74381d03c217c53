//! `restore`.

use std::time::Instant;

use serde::Serialize;

use crate::arguments;
use crate::context::{Context, display};
use crate::errors::Exit;
use crate::human;
use crate::json::milliseconds;
use crate::output::Style;
use crate::progress::progress;

/// Writes the image of a snapshot to a file.
pub(crate) fn restore(context: &Context, arguments: &arguments::Restore) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct RestoreObject {
        id: String,
        bytes: u64,
        written_bytes: u64,
        elapsed_ms: f64,
    }
    let output = &context.output;
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    let started = Instant::now();
    let stats = store
        .restore(id)?
        .progress(progress(context, "restoring"))
        .into_file(&arguments.to, arguments.force)?;
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
            ("restored to", display(&arguments.to)),
            ("memory", format!("{}, {} of it holes", human::size(stats.bytes), human::size(holes_bytes))),
            ("took", human::duration(elapsed)),
        ]))?;
    }
    Ok(Exit::Done)
}
