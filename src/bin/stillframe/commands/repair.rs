//! `repair`: repairs a damaged store.

use clap::Args;
use stillframe::Store;
use stillframe::repair::{RepairOptions, RepairReport};

use crate::context::{Context, display};
use crate::errors::Exit;
use crate::human;
use crate::output::{Output, Style};
use crate::progress::progress;

const EXAMPLES: &str = "\
Examples:
  stillframe repair --dry-run
  stillframe repair";

/// Repair a damaged store
///
/// Rebuilds the index from the packs, truncates incomplete ends of packs, rewrites a damaged FORMAT file and copies
/// intact objects out of damaged packs.
///
/// repair deletes nothing. It moves what it cannot use to the folder damaged/ of the store; the file REPORT.txt there
/// lists what was moved, why, and which snapshots lost data. If repair is interrupted, run it again.
///
/// The exit code is 5 if snapshots lost data or objects were damaged. Capturing the same memory again heals them.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Repair {
    /// Report the damage only, change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Repairs a store.
pub(super) fn repair(context: &Context, arguments: &Repair) -> anyhow::Result<Exit> {
    let output = &context.output;
    let options = RepairOptions::new()
        .dry_run(arguments.dry_run)
        .wait(context.wait)
        .trust_owner(context.trust_owner)
        .progress(progress(context, "repairing"));
    let report = Store::repair(context.store_path()?, &options)?;
    drop(options);
    let is_whole = report.damaged.is_empty() && report.lost_snapshots.is_empty();
    if output.json {
        output.json(&report)?;
    } else if !output.quiet || !is_whole {
        print_report(output, &report, is_whole, arguments.dry_run)?;
    }
    Ok(if is_whole { Exit::Done } else { Exit::Damage })
}

fn print_report(output: &Output, report: &RepairReport, is_whole: bool, dry_run: bool) -> anyhow::Result<()> {
    let damaged =
        report.damaged.iter().map(|line| ("damaged", output.styled(Style::Bad, &human::plain(line))));
    let lost = report.lost_snapshots.iter().map(|id| ("lost", output.styled(Style::Id, &id.to_string())));
    let index = match (report.index_rebuilt, dry_run) {
        (true, false) => "rebuilt from the packs",
        (true, true) => "would be rebuilt from the packs",
        (false, _) => "unchanged",
    };
    let mut lines: Vec<_> = damaged.chain(lost).collect();
    lines.push(("index", index.to_owned()));
    lines.push(("objects", format!("{} intact", human::count(report.objects))));
    if is_whole {
        lines.push(("lost", "nothing".to_owned()));
    }
    if let Some(path) = &report.report {
        lines.push(("report", display(path)));
    }
    output.text(&output.lines(&lines))
}
