//! `init`, `verify`, `repair`, `stats`, `migrate`.

use serde::Serialize;
use stillframe::{Problem, RegionSize, RepairOptions, Store, VerifyOptions, VerifyReport};

use crate::arguments;
use crate::context::{Context, display};
use crate::errors::Exit;
use crate::human;
use crate::json::ids;
use crate::output::{Output, Style};
use crate::progress::progress;

/// Creates a store.
pub(crate) fn init(context: &Context, arguments: &arguments::Init) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct InitObject {
        store: String,
        format: u32,
        region_size: usize,
        codec: String,
    }
    let output = &context.output;
    let options =
        context.options().region_size(RegionSize::new(arguments.region_size)?).codec(arguments.codec);
    let info = options.create(context.store_path()?)?.info();
    if output.json {
        output.json(&InitObject {
            store: info.path.to_string_lossy().into_owned(),
            format: info.format,
            region_size: info.region_size.bytes(),
            codec: info.codec.to_string(),
        })?;
    } else if !output.quiet {
        output.text(&output.lines(&[
            ("store", display(&info.path)),
            ("format", info.format.to_string()),
            ("regions", human::size(info.region_size.bytes() as u64)),
            ("codec", info.codec.to_string()),
        ]))?;
        output.hint("fill it: stillframe capture --pid PID");
    }
    Ok(Exit::Done)
}

/// Checks what is stored.
pub(crate) fn verify(context: &Context, arguments: &arguments::Verify) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct VerifyObject {
        checked_objects: u64,
        checked_bytes: u64,
        total_objects: u64,
        total_bytes: u64,
        checked_packs: u64,
        total_packs: u64,
        problems: Vec<ProblemObject>,
    }
    #[derive(Serialize)]
    struct ProblemObject {
        kind: String,
        object: String,
        snapshots: Vec<String>,
        detail: String,
    }
    let output = &context.output;
    let store = context.open()?;
    let snapshots = arguments.snapshots.iter().map(|name| store.find(name)).collect::<Result<_, _>>()?;
    let options = VerifyOptions {
        snapshots,
        sample_percent: arguments.sample,
        progress: progress(context, "verifying"),
    };
    let report = store.verify(&options)?;
    drop(options);
    let exit = if report.problems.is_empty() { Exit::Done } else { Exit::Damage };
    if output.json {
        let problems = report.problems.into_iter().map(|problem| ProblemObject {
            kind: problem.kind,
            object: problem.object,
            snapshots: ids(&problem.snapshots),
            detail: problem.detail,
        });
        output.json(&VerifyObject {
            checked_objects: report.checked_objects,
            checked_bytes: report.checked_bytes,
            total_objects: report.total_objects,
            total_bytes: report.total_bytes,
            checked_packs: report.checked_packs,
            total_packs: report.total_packs,
            problems: problems.collect(),
        })?;
        return Ok(exit);
    }
    let mut text: String = report.problems.iter().map(|problem| problem_text(output, problem)).collect();
    if !output.quiet {
        let checked = checked_text(&report);
        text.push_str(&match report.problems.len() as u64 {
            0 => format!("{checked}: all in order\n"),
            found => format!("{checked}: {}\n", human::counted(found, "problem")),
        });
    }
    output.text(&text)?;
    if exit == Exit::Damage {
        output.hint("set what is damaged aside: stillframe repair; capturing the same memory again heals it");
    }
    Ok(exit)
}

/// How much of the store was checked.
fn checked_text(report: &VerifyReport) -> String {
    let packs = match (report.checked_packs, report.total_packs) {
        (_, 0) => "without a pack".to_owned(),
        (1, 1) => "in 1 pack".to_owned(),
        (checked, total) if checked == total => format!("in all {}", human::counted(total, "pack")),
        (checked, total) => format!("in {} of {}", human::count(checked), human::counted(total, "pack")),
    };
    if report.checked_objects >= report.total_objects {
        let objects = human::counted(report.checked_objects, "object");
        return format!("checked {objects}, {}, {packs}", human::size(report.checked_bytes));
    }
    format!(
        "checked {} of {} ({:.1} %), {} of {}, {packs}",
        human::count(report.checked_objects),
        human::counted(report.total_objects, "object"),
        report.checked_objects as f64 * 100.0 / report.total_objects as f64,
        human::size(report.checked_bytes),
        human::size(report.total_bytes),
    )
}

fn problem_text(output: &Output, problem: &Problem) -> String {
    let needed_by = match problem.snapshots.as_slice() {
        [] => "no snapshot needs it".to_owned(),
        needed_by => {
            let shown: Vec<String> = needed_by.iter().take(8).map(|id| human::short(*id)).collect();
            let more = needed_by.len().saturating_sub(shown.len());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("needed by {}{more}", shown.join(" "))
        }
    };
    let kind = output.styled(Style::Bad, &human::plain(&problem.kind));
    format!("{kind} {}: {}; {needed_by}\n", human::plain(&problem.object), human::plain(&problem.detail))
}

/// Mends a store.
pub(crate) fn repair(context: &Context, arguments: &arguments::Repair) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct RepairObject {
        index_rebuilt: bool,
        objects: u64,
        damaged: Vec<String>,
        lost_snapshots: Vec<String>,
    }
    let output = &context.output;
    let options = RepairOptions {
        dry_run: arguments.dry_run,
        wait: context.wait,
        trust_owner: context.trust_owner,
        progress: progress(context, "repairing"),
    };
    let report = Store::repair(context.store_path()?, &options)?;
    drop(options);
    let whole = report.damaged.is_empty() && report.lost_snapshots.is_empty();
    if output.json {
        output.json(&RepairObject {
            index_rebuilt: report.index_rebuilt,
            objects: report.objects,
            damaged: report.damaged,
            lost_snapshots: ids(&report.lost_snapshots),
        })?;
    } else if !output.quiet || !whole {
        let damaged =
            report.damaged.iter().map(|line| ("damaged", output.styled(Style::Bad, &human::plain(line))));
        let lost = report.lost_snapshots.iter().map(|id| ("lost", output.styled(Style::Id, &id.to_string())));
        let index = match (report.index_rebuilt, arguments.dry_run) {
            (true, false) => "rebuilt from the packs",
            (true, true) => "would be rebuilt from the packs",
            (false, _) => "left as it is",
        };
        let mut lines: Vec<_> = damaged.chain(lost).collect();
        lines.push(("index", index.to_owned()));
        lines.push(("objects", format!("{} in order", human::count(report.objects))));
        if whole {
            lines.push(("lost", "nothing".to_owned()));
        }
        if let Some(path) = &report.report {
            lines.push(("report", display(path)));
        }
        output.text(&output.lines(&lines))?;
    }
    Ok(if whole { Exit::Done } else { Exit::Damage })
}

/// Shows what is stored.
pub(crate) fn stats(context: &Context) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct StatsObject {
        snapshots: u64,
        processes: u64,
        logical_bytes: u64,
        unique_bytes: u64,
        stored_bytes: u64,
        index_bytes: u64,
        disk_bytes: u64,
        regions: u64,
        deltas: u64,
        zero_bytes: u64,
        dedup_ratio: f64,
        compression_ratio: f64,
    }
    let output = &context.output;
    let store = context.open()?;
    let stats = store.stats()?;
    if output.json {
        output.json(&StatsObject {
            snapshots: stats.snapshots,
            processes: stats.processes,
            logical_bytes: stats.logical_bytes,
            unique_bytes: stats.unique_bytes,
            stored_bytes: stats.stored_bytes,
            index_bytes: stats.index_bytes,
            disk_bytes: stats.disk_bytes,
            regions: stats.regions,
            deltas: stats.deltas,
            zero_bytes: stats.zero_bytes,
            dedup_ratio: stats.dedup_ratio,
            compression_ratio: stats.compression_ratio,
        })?;
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
                "{} in all snapshots, {} of it zeros",
                human::size(stats.logical_bytes),
                human::size(stats.zero_bytes)
            ),
        ),
        (
            "distinct",
            format!(
                "{} in {}, {} of them as deltas",
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
            format!("{}, {} of it index", human::size(stats.disk_bytes), human::size(stats.index_bytes)),
        ),
        ("saved", saved),
    ]))?;
    Ok(Exit::Done)
}

/// Brings an older store to this format.
pub(crate) fn migrate(context: &Context, arguments: &arguments::Migrate) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct MigrateObject {
        from: u32,
        to: u32,
    }
    let output = &context.output;
    let migration = context.options().migrate(context.store_path()?, arguments.dry_run)?;
    let (from, to) = (migration.from, migration.to);
    if output.json {
        output.json(&MigrateObject { from, to })?;
    } else if !output.quiet {
        output.text(&match (from == to, arguments.dry_run) {
            (true, _) => format!("the store has format {to}, the newest there is: nothing to do\n"),
            (false, true) => format!("the store would be brought from format {from} to format {to}\n"),
            (false, false) => format!("the store was brought from format {from} to format {to}\n"),
        })?;
    }
    Ok(Exit::Done)
}
