//! `stats`: what is stored, and how much space that saves.

use clap::Args;

use crate::context::{Context, display};
use crate::errors::Exit;
use crate::human;

const EXAMPLES: &str = "\
Examples:
  stillframe stats
  stillframe stats --json";

/// Show what is stored and how much space that saves
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Stats {}

/// Shows what is stored.
pub(super) fn stats(context: &Context) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let stats = store.stats()?;
    if output.json {
        output.json(&stats)?;
        return Ok(Exit::Done);
    }
    let saved = match (stats.logical_bytes, stats.disk_bytes) {
        (0, _) | (_, 0) => "nothing yet".to_owned(),
        (logical_bytes, disk_bytes) => {
            format!("{} smaller than the memory", human::times(logical_bytes as f64 / disk_bytes as f64))
        }
    };
    output.text(&output.lines(&[
        ("store", display(&store.info().path)),
        ("snapshots", format!("{} of {}", human::count(stats.snapshots), human::processes(stats.processes))),
        (
            "memory",
            format!(
                "{} in all snapshots, {} zeros",
                human::size(stats.logical_bytes),
                human::size(stats.zero_bytes)
            ),
        ),
        (
            "distinct",
            format!(
                "{} in {}, {} as deltas",
                human::size(stats.unique_bytes),
                human::counted(stats.regions, "region"),
                human::count(stats.deltas)
            ),
        ),
        (
            "stored",
            format!(
                "{}, compressed {}",
                human::size(stats.stored_bytes),
                human::times(stats.compression_ratio)
            ),
        ),
        (
            "on disk",
            format!("{}, {} for the index", human::size(stats.disk_bytes), human::size(stats.index_bytes)),
        ),
        ("saved", saved),
    ]))?;
    Ok(Exit::Done)
}
