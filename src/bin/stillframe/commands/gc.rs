//! `gc`: frees the space that no snapshot needs.

use clap::Args;
use stillframe::GcOptions;

use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::progress::progress;
use crate::values::percent;

const EXAMPLES: &str = "\
Examples:
  stillframe gc --dry-run
  stillframe gc
  stillframe gc --erase";

/// Free the space that no snapshot needs
///
/// Without --erase some bytes of forgotten snapshots stay: bases of deltas that other snapshots need, and up to
/// --max-unused percent of each pack. With --erase none stay in the files of the store. It cannot erase copies of the
/// store, snapshots of the file system, and blocks that the file system or an SSD has freed and not yet overwritten.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Gc {
    /// Report only, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Erase all data of forgotten snapshots
    ///
    /// Stores deltas from forgotten data whole, and rewrites the index and each pack that has such data. If not all of
    /// it can be erased, gc refuses before it changes anything.
    #[arg(long)]
    erase: bool,
    /// Unused part of a pack to accept [default: 10]
    ///
    /// A pack with a larger unused part is rewritten. A smaller value means a smaller store, a larger value a faster gc.
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = percent(0), hide_default_value = true)]
    max_unused: u8,
}

/// Frees the space that no snapshot needs.
pub(super) fn gc(context: &Context, arguments: &Gc) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let options = GcOptions::new()
        .dry_run(arguments.dry_run)
        .erase(arguments.erase)
        .max_unused_percent(arguments.max_unused)
        .progress(progress(context, "collecting"));
    let stats = store.gc(&options)?;
    drop(options);
    if output.json {
        output.json(&stats)?;
    } else if !output.quiet {
        let would = if arguments.dry_run { "would be " } else { "" };
        if arguments.erase {
            let erased = if arguments.dry_run { "would erase" } else { "erased" };
            output.text(&output.lines(&[(erased, human::size(stats.erased_bytes))]))?;
        }
        output.text(&output.lines(&[
            (if arguments.dry_run { "would free" } else { "freed" }, human::size(stats.freed_bytes)),
            (
                "regions",
                format!(
                    "{} needed, {} {would}dropped",
                    human::count(stats.live_regions),
                    human::count(stats.dead_regions)
                ),
            ),
            (
                "packs",
                format!(
                    "{} {would}removed, {} {would}rewritten",
                    human::count(stats.packs_removed),
                    human::count(stats.packs_rewritten)
                ),
            ),
            ("took", human::duration(stats.elapsed)),
        ]))?;
    }
    Ok(Exit::Done)
}
