//! `forget` and `gc`.

use std::collections::HashSet;

use jiff::SignedDuration;
use jiff::tz::TimeZone;
use serde::Serialize;
use stillframe::{ForgetPlan, GcOptions, KeepPolicy, SnapshotId, Store};

use crate::arguments;
use crate::context::Context;
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::json::{ids, milliseconds};
use crate::output::{Column, Output, table};
use crate::progress::progress;

/// Removes snapshots.
pub(crate) fn forget(context: &Context, arguments: &arguments::Forget) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct ForgetObject {
        forgotten: Vec<String>,
        kept: Vec<String>,
        future: Vec<String>,
        freeable_bytes: u64,
    }
    let output = &context.output;
    let policy = keep_policy(arguments)?;
    match (arguments.snapshots.is_empty(), &policy) {
        (true, None) => {
            return Err(wrong_usage("name the snapshots to forget, or say with --keep-… which to keep"));
        }
        (false, Some(_)) => {
            return Err(wrong_usage("name the snapshots to forget or say which to keep, not both"));
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
            "this would keep none of {}; keep some, or add --allow-empty if that is what you want",
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
        output.json(&ForgetObject { forgotten, kept, future, freeable_bytes })?;
    } else if !output.quiet {
        print_plan(output, &plan, &rows, freeable_bytes, arguments.dry_run)?;
    }
    Ok(Exit::Done)
}

/// What the --keep options say, if there are any.
fn keep_policy(arguments: &arguments::Forget) -> anyhow::Result<Option<KeepPolicy>> {
    let within = arguments.keep_within.map(SignedDuration::try_from).transpose();
    let policy = KeepPolicy {
        last: arguments.keep_last,
        hourly: arguments.keep_hourly,
        daily: arguments.keep_daily,
        weekly: arguments.keep_weekly,
        monthly: arguments.keep_monthly,
        within: within.map_err(|_| wrong_usage("--keep-within is too long"))?,
        labels: arguments.keep_labels.clone(),
        time_zone: if arguments.utc { TimeZone::UTC } else { TimeZone::system() },
    };
    Ok((!policy.is_empty()).then_some(policy))
}

/// Forgets the snapshots that were named; all others are kept.
fn plan_for_names(store: &Store, arguments: &arguments::Forget) -> anyhow::Result<ForgetPlan> {
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
        if dry_run { "would then give back" } else { "can now give back" },
        human::size(freeable_bytes),
    ));
    if let [.., newest] = plan.future[..] {
        text.push_str(&format!(
            "left out {} in the future, such as {}: kept, and not counted; name what is to be forgotten of it\n",
            human::counted(plan.future.len() as u64, "snapshot"),
            human::short(newest),
        ));
    }
    output.text(&text)?;
    if !dry_run && freeable_bytes > 0 {
        output.hint("give the space back: stillframe gc");
    }
    Ok(())
}

/// Gives space back.
pub(crate) fn gc(context: &Context, arguments: &arguments::Gc) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct GcObject {
        live_regions: u64,
        dead_regions: u64,
        freed_bytes: u64,
        packs_removed: u64,
        packs_rewritten: u64,
        elapsed_ms: f64,
        erased_bytes: u64,
    }
    let output = &context.output;
    let store = context.open()?;
    let options = GcOptions {
        dry_run: arguments.dry_run,
        erase: arguments.erase,
        max_unused_percent: arguments.max_unused,
        progress: progress(context, "collecting"),
    };
    let stats = store.gc(&options)?;
    drop(options);
    if output.json {
        output.json(&GcObject {
            live_regions: stats.live_regions,
            dead_regions: stats.dead_regions,
            freed_bytes: stats.freed_bytes,
            packs_removed: stats.packs_removed,
            packs_rewritten: stats.packs_rewritten,
            elapsed_ms: milliseconds(stats.elapsed),
            erased_bytes: stats.erased_bytes,
        })?;
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
