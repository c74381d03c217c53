//! `diff`, `history`: a look into the past without restoring it.

use jiff::Timestamp;
use serde::Serialize;
use stillframe::{AddressRange, AddressSpace, DiffOptions, Moment, Store};

use crate::arguments;
use crate::context::Context;
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::json::RangeObject;
use crate::output::{Column, table};
use crate::progress::progress;

/// How many bytes a line of `history` shows to people. JSON has them all.
const SHOWN_BYTES: usize = 16;

/// Shows where two snapshots differ.
pub(crate) fn diff(context: &Context, arguments: &arguments::Diff) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct DiffObject {
        ranges: Vec<RangeObject>,
        more_ranges: bool,
        differing_bytes: u64,
        differing_regions: u64,
    }
    let output = &context.output;
    let store = context.open()?;
    let (a, b) = (store.find(&arguments.a)?, store.find(&arguments.b)?);
    let diff = store.diff(a, b, &DiffOptions { progress: progress(context, "comparing") })?;
    if output.json {
        output.json(&DiffObject {
            ranges: diff.ranges.iter().map(RangeObject::from).collect(),
            more_ranges: diff.more_ranges,
            differing_bytes: diff.differing_bytes,
            differing_regions: diff.differing_regions,
        })?;
        return Ok(Exit::Done);
    }
    if diff.ranges.is_empty() {
        output.note("the memory of both is the same");
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

/// What the captured mapping is called in which a range begins.
fn mapping_name(space: &AddressSpace, range: AddressRange) -> Option<String> {
    let mappings = space.mappings();
    let at = mappings.partition_point(|mapping| mapping.range.end() <= range.start());
    let found = mappings.get(at).filter(|it| it.captured && it.range.intersection(range).is_some())?;
    Some(match found.name.is_empty() {
        true => found.kind.name().to_owned(),
        false => human::plain(&found.name),
    })
}

/// Shows each snapshot at which bytes changed.
pub(crate) fn history(context: &Context, arguments: &arguments::History) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct MomentObject {
        id: String,
        time: String,
        bytes: Option<String>,
    }
    let output = &context.output;
    let store = context.open()?;
    let process = match &arguments.process {
        Some(process) => process.clone(),
        None => the_process(&store)?,
    };
    let moments: Vec<Moment> = store.history(&process, arguments.range)?.collect::<Result<_, _>>()?;
    if output.json {
        let object = |moment: &Moment| MomentObject {
            id: moment.id.to_string(),
            time: moment.time.to_string(),
            bytes: moment.bytes.as_deref().map(hex),
        };
        output.json(&moments.iter().map(object).collect::<Vec<_>>())?;
        return Ok(Exit::Done);
    }
    let columns = [
        Column::id("SNAPSHOT"),
        Column::left("TIME"),
        Column::right("AGE"),
        Column::left("BYTES"),
        Column::left("TEXT"),
    ];
    let now = Timestamp::now();
    let row = |moment: &Moment| {
        let (bytes, text) = match &moment.bytes {
            Some(bytes) => shown(bytes),
            None => ("not captured".to_owned(), String::new()),
        };
        vec![
            human::short(moment.id),
            human::local_time(moment.time),
            human::age(moment.time, now),
            bytes,
            text,
        ]
    };
    output.text(&table(output, &columns, &moments.iter().map(row).collect::<Vec<_>>()))?;
    Ok(Exit::Done)
}

/// The only process there is.
fn the_process(store: &Store) -> anyhow::Result<String> {
    let mut names: Vec<String> = store.processes().into_iter().map(|summary| summary.process).collect();
    match names.len() {
        1 => Ok(names.remove(0)),
        0 => Err(wrong_usage("the store has no snapshots yet; `stillframe capture --pid PID` takes one")),
        _ => {
            let names: Vec<String> = names.iter().map(|name| human::plain(name)).collect();
            let names = names.join(", ");
            Err(wrong_usage(format!("whose history? name one with --process; there are {names}")))
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The first bytes for a person: in hex, and as text.
fn shown(bytes: &[u8]) -> (String, String) {
    let first = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let digits: Vec<String> = first.iter().map(|byte| format!("{byte:02x}")).collect();
    let more = if bytes.len() > first.len() { " …" } else { "" };
    let letter = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' };
    (format!("{}{more}", digits.join(" ")), format!("|{}|", first.iter().map(letter).collect::<String>()))
}
