//! `history`: every snapshot at which some bytes changed.

use clap::Args;
use jiff::Timestamp;
use stillframe::history::Moment;
use stillframe::{AddressRange, Store};

use crate::context::Context;
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::output::{Column, table};

/// How many bytes a line of the table shows. The JSON has all of them.
const SHOWN_BYTES: usize = 16;

const EXAMPLES: &str = "\
Examples:
  stillframe history --process web-1 --range 0x7f12a0..0x7f12a8";

/// Show every snapshot at which some bytes changed
///
/// The first line is the first snapshot that has these bytes. With --json the bytes are hex digits, or null for a
/// snapshot in which not all of them are captured memory. A range can have up to 1 MiB.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct History {
    /// Addresses: decimal, or hexadecimal after 0x
    #[arg(long, value_name = "START..END")]
    range: AddressRange,
    /// Process
    ///
    /// Required if the store has snapshots of several processes.
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
}

/// Shows each snapshot at which bytes changed.
pub(super) fn history(context: &Context, arguments: &History) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let process = match &arguments.process {
        Some(process) => process.clone(),
        None => the_process(&store)?,
    };
    let moments: Vec<Moment> = store.history(&process, arguments.range)?.collect::<Result<_, _>>()?;
    if output.json {
        output.json(&moments)?;
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

/// The only process of the store.
fn the_process(store: &Store) -> anyhow::Result<String> {
    let mut names: Vec<String> = store.processes().into_iter().map(|summary| summary.process).collect();
    match names.len() {
        1 => Ok(names.remove(0)),
        0 => Err(wrong_usage("the store has no snapshots; `stillframe capture --pid PID` takes one")),
        _ => {
            let names: Vec<String> = names.iter().map(|name| human::plain(name)).collect();
            let names = names.join(", ");
            Err(wrong_usage(format!("expected --process NAME, as there are several processes: {names}")))
        }
    }
}

/// The first bytes as hex digits and as text.
fn shown(bytes: &[u8]) -> (String, String) {
    let first = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let digits: Vec<String> = first.iter().map(|byte| format!("{byte:02x}")).collect();
    let more = if bytes.len() > first.len() { " …" } else { "" };
    let letter = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' };
    (format!("{}{more}", digits.join(" ")), format!("|{}|", first.iter().map(letter).collect::<String>()))
}
