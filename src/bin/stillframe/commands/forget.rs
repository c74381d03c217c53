//! `forget`: removes snapshots.

use std::collections::HashSet;
use std::time::Duration;

use clap::Args;
use jiff::SignedDuration;
use jiff::tz::TimeZone;
use serde::Serialize;
use stillframe::forget::{ForgetPlan, KeepPolicy};
use stillframe::{SnapshotId, Store};

use crate::context::Context;
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::output::{Column, Output, table};
use crate::values::{duration, keep_count, label};

const EXAMPLES: &str = "\
Examples:
  stillframe forget web-1~3 3f9a0c1b
  stillframe forget --keep-last 10 --keep-daily 7 --dry-run
  stillframe forget --process web-1 --keep-within 7d";

/// Remove snapshots
///
/// Name the snapshots to remove, or say with --keep options which to keep. A snapshot is kept if any of the options
/// keeps it. The options apply to each process separately.
///
/// Hours, days, weeks and months are those of the local time zone (the variable TZ, else that of the machine), or of UTC
/// with --utc. A week begins on Monday.
///
/// The --keep options do not count snapshots whose time is in the future (of a wrong clock), and keep them. To forget
/// one, name it.
///
/// A forgotten snapshot cannot be restored, but its bytes stay in the store until gc. A plain gc leaves some of them:
/// bases of deltas that other snapshots need, and up to a tenth of each pack. To erase a secret, run
/// stillframe gc --erase
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Forget {
    /// Snapshots to forget
    #[arg(value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
    /// Keep the last N
    #[arg(long, value_name = "N", value_parser = keep_count)]
    keep_last: Option<u32>,
    /// Keep the newest of each of N hours
    ///
    /// Only hours that have snapshots count. The same holds for days, weeks and months.
    #[arg(long, value_name = "N", value_parser = keep_count)]
    keep_hourly: Option<u32>,
    /// Keep the newest of each of N days
    #[arg(long, value_name = "N", value_parser = keep_count)]
    keep_daily: Option<u32>,
    /// Keep the newest of each of N weeks
    #[arg(long, value_name = "N", value_parser = keep_count)]
    keep_weekly: Option<u32>,
    /// Keep the newest of each of N months
    #[arg(long, value_name = "N", value_parser = keep_count)]
    keep_monthly: Option<u32>,
    /// Count hours, days and so on in UTC
    #[arg(long)]
    utc: bool,
    /// Keep those younger than this, such as 7d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    keep_within: Option<Duration>,
    /// Keep those with this label (repeatable)
    #[arg(long = "keep-label", value_name = "KEY=VALUE", value_parser = label)]
    keep_labels: Vec<(String, String)>,
    /// Only snapshots of this process
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
    /// Report only, change nothing
    ///
    /// Reports which snapshots would be forgotten and how much space gc would free.
    #[arg(long)]
    dry_run: bool,
    /// Accept --keep options that keep nothing
    #[arg(long)]
    allow_empty: bool,
}

#[derive(Serialize)]
struct ForgetJson {
    forgotten: Vec<String>,
    kept: Vec<String>,
    future: Vec<String>,
    freeable_bytes: u64,
}

/// Removes snapshots.
pub(super) fn forget(context: &Context, arguments: &Forget) -> anyhow::Result<Exit> {
    let output = &context.output;
    let policy = keep_policy(arguments)?;
    match (arguments.snapshots.is_empty(), &policy) {
        (true, None) => {
            return Err(wrong_usage(
                "expected snapshots to forget, or --keep options that say which to keep",
            ));
        }
        (false, Some(_)) => {
            return Err(wrong_usage("expected snapshots to forget or --keep options, not both"));
        }
        _ => {}
    }
    let store = context.open()?;
    let plan = match &policy {
        Some(policy) => store.plan_forget(policy, arguments.process.as_deref())?,
        None => plan_for_names(&store, arguments)?,
    };
    if policy.is_some()
        && plan.keep.len() == plan.future.len()
        && !plan.forget.is_empty()
        && !arguments.allow_empty
    {
        return Err(wrong_usage(format!(
            "these --keep options keep none of {}; change them, or pass --allow-empty to forget all",
            human::counted(plan.forget.len() as u64, "snapshot")
        )));
    }
    let freeable_bytes = store.freeable_bytes(&plan.forget)?;
    let rows = rows(&store, &plan.forget)?;
    if !arguments.dry_run && !plan.forget.is_empty() {
        store.forget(&plan.forget)?;
    }
    if output.json {
        let (forgotten, kept, future) = (ids(&plan.forget), ids(&plan.keep), ids(&plan.future));
        output.json(&ForgetJson { forgotten, kept, future, freeable_bytes })?;
    } else if !output.quiet {
        print_plan(output, &plan, &rows, freeable_bytes, arguments.dry_run)?;
    }
    Ok(Exit::Done)
}

/// The policy of the --keep options, if there are any.
fn keep_policy(arguments: &Forget) -> anyhow::Result<Option<KeepPolicy>> {
    let within = arguments.keep_within.map(SignedDuration::try_from).transpose();
    let policy = KeepPolicy::new()
        .last(arguments.keep_last)
        .hourly(arguments.keep_hourly)
        .daily(arguments.keep_daily)
        .weekly(arguments.keep_weekly)
        .monthly(arguments.keep_monthly)
        .within(within.map_err(|_| wrong_usage("--keep-within: expected a shorter duration"))?)
        .labels(arguments.keep_labels.clone())
        .time_zone(if arguments.utc { TimeZone::UTC } else { TimeZone::system() });
    Ok((!policy.is_empty()).then_some(policy))
}

/// Forgets the named snapshots and keeps all others.
fn plan_for_names(store: &Store, arguments: &Forget) -> anyhow::Result<ForgetPlan> {
    let mut forget: Vec<SnapshotId> = Vec::new();
    let mut seen = HashSet::new();
    for name in &arguments.snapshots {
        let id = store.find(name)?;
        if let Some(process) = &arguments.process
            && store.snapshot(id)?.process() != process
        {
            return Err(wrong_usage(format!("{name} is not a snapshot of the process {process:?}")));
        }
        if seen.insert(id) {
            forget.push(id);
        }
    }
    let considered = store
        .snapshots()
        .into_iter()
        .filter(|snapshot| arguments.process.as_ref().is_none_or(|process| snapshot.process() == process));
    let keep = considered.map(|snapshot| snapshot.id()).filter(|id| !seen.contains(id)).collect();
    let mut plan = ForgetPlan::default();
    (plan.forget, plan.keep) = (forget, keep);
    Ok(plan)
}

fn rows(store: &Store, forget: &[SnapshotId]) -> anyhow::Result<Vec<Vec<String>>> {
    let row = |id: &SnapshotId| {
        let snapshot = store.snapshot(*id)?;
        let record = snapshot.record();
        Ok(vec![
            human::short(*id),
            human::plain(&record.process),
            human::local_time(record.time),
            human::size(record.memory_bytes),
        ])
    };
    forget.iter().map(row).collect()
}

fn print_plan(
    output: &Output,
    plan: &ForgetPlan,
    rows: &[Vec<String>],
    freeable_bytes: u64,
    dry_run: bool,
) -> anyhow::Result<()> {
    let columns =
        [Column::id("SNAPSHOT"), Column::left("PROCESS"), Column::left("TIME"), Column::right("MEMORY")];
    let mut text = String::new();
    if !rows.is_empty() {
        text = table(output, &columns, rows);
        text.push('\n');
    }
    text.push_str(&format!(
        "{} {}, kept {}; gc {} {}\n",
        if dry_run { "would forget" } else { "forgot" },
        human::counted(plan.forget.len() as u64, "snapshot"),
        human::count(plan.keep.len() as u64),
        if dry_run { "would then free" } else { "can now free" },
        human::size(freeable_bytes),
    ));
    if let [.., newest] = plan.future[..] {
        text.push_str(&format!(
            "left out {} in the future, such as {}: kept and not counted; to forget one, name it\n",
            human::counted(plan.future.len() as u64, "snapshot"),
            human::short(newest),
        ));
    }
    output.text(&text)?;
    if !dry_run && freeable_bytes > 0 {
        output.hint("to free the space: stillframe gc");
    }
    Ok(())
}

/// Ids in full.
fn ids(ids: &[SnapshotId]) -> Vec<String> {
    ids.iter().map(SnapshotId::to_string).collect()
}
