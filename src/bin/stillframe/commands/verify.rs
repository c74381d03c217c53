//! `verify`: reads and checks what is stored.

use clap::Args;
use stillframe::verify::{Problem, VerifyOptions, VerifyReport};

use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Output, Style};
use crate::progress::progress;
use crate::values::percent;

const EXAMPLES: &str = "\
Examples:
  stillframe verify
  stillframe verify web-1@latest
  stillframe verify --sample 5";

/// Check the stored data
///
/// Reads each object, decodes it and compares it with its hash. The exit code is 5 if anything is damaged.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Verify {
    /// Check only the objects of these snapshots
    #[arg(value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
    /// Check only a random sample of the objects
    ///
    /// The sample is drawn from all packs.
    #[arg(long, value_name = "PERCENT", value_parser = percent(1))]
    sample: Option<u8>,
}

/// Checks what is stored.
pub(super) fn verify(context: &Context, arguments: &Verify) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let named = arguments.snapshots.iter().map(|name| store.find(name));
    let snapshots = named.collect::<Result<Vec<_>, _>>()?;
    let options = VerifyOptions::new()
        .snapshots(snapshots)
        .sample_percent(arguments.sample)
        .progress(progress(context, "verifying"));
    let report = store.verify(&options)?;
    drop(options);
    let exit = if report.problems.is_empty() { Exit::Done } else { Exit::Damage };
    if output.json {
        output.json(&report)?;
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
        output.hint(
            "to set damaged objects aside: stillframe repair; capturing the same memory again heals them",
        );
    }
    Ok(exit)
}

/// How much of the store was checked, as text.
fn checked_text(report: &VerifyReport) -> String {
    let packs = match (report.checked_packs, report.total_packs) {
        (_, 0) => "no packs".to_owned(),
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
        [] => "needed by no snapshot".to_owned(),
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
