//! `diff`: where the memory of two snapshots differs.

use clap::Args;
use stillframe::AddressRange;
use stillframe::address_space::AddressSpace;
use stillframe::diff::DiffOptions;

use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Column, table};
use crate::progress::progress;

const EXAMPLES: &str = "\
Examples:
  stillframe diff web-1~1 web-1@latest
  stillframe diff 3f9a0c1b 77d01e2a --json";

/// Compare the memory of two snapshots
///
/// The snapshots are compared by address, and can be of different processes. Memory that only one of them has counts as
/// different. Excluded memory counts as zeros.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Diff {
    /// First snapshot
    #[arg(value_name = "A")]
    a: String,
    /// Second snapshot
    #[arg(value_name = "B")]
    b: String,
}

/// Shows where two snapshots differ.
pub(super) fn diff(context: &Context, arguments: &Diff) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let (a, b) = (store.find(&arguments.a)?, store.find(&arguments.b)?);
    let diff = store.diff(a, b, &DiffOptions::new().progress(progress(context, "comparing")))?;
    if output.json {
        output.json(&diff)?;
        return Ok(Exit::Done);
    }
    if diff.ranges.is_empty() {
        output.note("the memory of both snapshots is the same");
        return Ok(Exit::Done);
    }
    let spaces = [a, b].map(|id| store.snapshot(id).and_then(|snapshot| snapshot.address_space()));
    let [in_a, in_b] = spaces;
    let (in_a, in_b) = (in_a?, in_b?);
    let columns =
        [Column::left("ADDRESSES"), Column::right("SIZE"), Column::left("IN"), Column::left("MAPPING")];
    let row = |range: &AddressRange| {
        let (found_a, found_b) = (mapping_name(&in_a, *range), mapping_name(&in_b, *range));
        let which = match (&found_a, &found_b) {
            (Some(_), None) => "A",
            (None, Some(_)) => "B",
            _ => "both",
        };
        let name = found_a.or(found_b).unwrap_or_default();
        vec![range.to_string(), human::size(range.length_bytes()), which.to_owned(), name]
    };
    let mut text = table(output, &columns, &diff.ranges.iter().map(row).collect::<Vec<_>>());
    text.push_str(&format!(
        "\n{} in {}{} of {} differ\n",
        human::size(diff.differing_bytes),
        if diff.more_ranges { "more than " } else { "" },
        human::counted(diff.ranges.len() as u64, "range"),
        human::counted(diff.differing_regions, "region"),
    ));
    output.text(&text)?;
    Ok(Exit::Done)
}

/// The name of the captured mapping in which a range begins.
fn mapping_name(space: &AddressSpace, range: AddressRange) -> Option<String> {
    let mappings = space.mappings();
    let at = mappings.partition_point(|mapping| mapping.range.end() <= range.start());
    let found = mappings.get(at).filter(|it| it.captured && it.range.intersection(range).is_some())?;
    Some(if found.name.is_empty() { found.kind.name().to_owned() } else { human::plain(&found.name) })
}
