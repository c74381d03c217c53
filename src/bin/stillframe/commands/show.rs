//! `list`, `show`, `processes`, `cat`, `label`.

use std::io::{self, BufWriter, Write};

use jiff::Timestamp;
use serde::Serialize;
use stillframe::{AddressRange, AttachmentRef, Labels, LeftOut, Mapping, Origin, Snapshot, Store};

use crate::arguments;
use crate::context::Context;
use crate::errors::{CommandError, Exit};
use crate::hexdump::HexDump;
use crate::human;
use crate::json::SnapshotObject;
use crate::output::{Column, Output, Style, output_error, print, table};

/// Lists snapshots, oldest first.
pub(crate) fn list(context: &Context, arguments: &arguments::List) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let mut snapshots = store.snapshots();
    snapshots.retain(|snapshot| {
        arguments.process.as_ref().is_none_or(|process| snapshot.process() == *process)
            && arguments.labels.iter().all(|(key, value)| snapshot.labels().get(key) == Some(value))
    });
    if output.json {
        let objects = snapshots.into_iter().map(|snapshot| SnapshotObject::from(&snapshot));
        output.json(&objects.collect::<Vec<_>>())?;
    } else if output.quiet {
        print(&snapshots.iter().map(|snapshot| format!("{}\n", snapshot.id())).collect::<String>())?;
    } else if snapshots.is_empty() {
        output.note(match arguments.process.is_some() || !arguments.labels.is_empty() {
            true => "no snapshot matches; `stillframe list` shows all there are",
            false => "the store has no snapshots yet; `stillframe capture --pid PID` takes one",
        });
    } else {
        let columns = [
            Column::id("SNAPSHOT"),
            Column::left("PROCESS"),
            Column::left("TIME"),
            Column::right("AGE"),
            Column::right("MEMORY"),
            Column::left("TRIGGER"),
            Column::left("LABELS"),
        ];
        let now = Timestamp::now();
        let row = |snapshot: Snapshot<'_>| {
            let record = snapshot.record();
            vec![
                human::short(snapshot.id()),
                human::plain(&record.process),
                human::local_time(record.time),
                human::age(record.time, now),
                human::size(record.memory_bytes),
                human::plain(&record.trigger.to_string()),
                labels_text(snapshot.labels()),
            ]
        };
        output.text(&table(output, &columns, &snapshots.into_iter().map(row).collect::<Vec<_>>()))?;
    }
    Ok(Exit::Done)
}

/// Shows one snapshot with its mappings.
pub(crate) fn show(context: &Context, arguments: &arguments::Show) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let snapshot = store.snapshot(store.find(&arguments.snapshot)?)?;
    let space = snapshot.address_space()?;
    // Snapshots of older programs have no reasons; damaged ones are shown without.
    let attachment = snapshot.attachment(LeftOut::ATTACHMENT).ok().flatten();
    let left_out = attachment.and_then(|bytes| LeftOut::from_attachment(&bytes).ok()).unwrap_or_default();
    if output.json {
        output.json(&SnapshotObject::from(&snapshot).with_mappings(&space, &left_out))?;
        return Ok(Exit::Done);
    }
    let mut text = output.lines(&snapshot_lines(output, &snapshot));
    for range in space.excluded() {
        text.push_str(&output.lines(&[("excluded", format!("{range}, restored as zeros"))]));
    }
    for range in space.unreadable() {
        let mut reasons: Vec<_> = left_out
            .iter()
            .filter(|left_out| left_out.range.intersection(*range).is_some())
            .map(|left_out| left_out.why)
            .collect();
        reasons.sort_unstable();
        reasons.dedup();
        let reasons: String = reasons.iter().map(|why| format!(", memory {why}")).collect();
        text.push_str(&output.lines(&[("unreadable", format!("{range}, restored as zeros{reasons}"))]));
    }
    let columns = [
        Column::left("ADDRESSES"),
        Column::right("SIZE"),
        Column::left("PROT"),
        Column::left("KIND"),
        Column::left("NAME"),
    ];
    let rows: Vec<_> = space.mappings().iter().map(mapping_row).collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(output, &columns, &rows));
    }
    output.text(&text)?;
    Ok(Exit::Done)
}

fn snapshot_lines(output: &Output, snapshot: &Snapshot<'_>) -> Vec<(&'static str, String)> {
    let record = snapshot.record();
    let mut lines = vec![
        ("snapshot", output.styled(Style::Id, &snapshot.id().to_string())),
        ("process", human::plain(&record.process)),
        ("parent", record.parent.map_or_else(|| "none, it is the first".to_owned(), human::short)),
        (
            "time",
            format!("{}, {}", human::local_time(record.time), human::age(record.time, Timestamp::now())),
        ),
        ("trigger", human::plain(&record.trigger.to_string())),
        ("source", human::plain(&source_text(&record.origin))),
        (
            "memory",
            format!(
                "{} in {} of {}, {} of it zeros",
                human::size(record.memory_bytes),
                human::counted(record.regions, "region"),
                human::size(record.region_size.bytes() as u64),
                human::size(record.zero_bytes)
            ),
        ),
    ];
    if !snapshot.labels().is_empty() {
        lines.push(("labels", labels_text(snapshot.labels())));
    }
    let shown =
        |attachment: &&AttachmentRef| attachment.name != LeftOut::ATTACHMENT && !attachment.is_moment();
    lines.extend(record.attachments.iter().filter(shown).map(|attachment| {
        ("beside it", format!("{}, {}", human::plain(&attachment.name), human::size(attachment.length_bytes)))
    }));
    lines
}

/// Where the memory came from.
pub(crate) fn source_text(origin: &Origin) -> String {
    match origin {
        Origin::File { path } => format!("the file {}", path.display()),
        Origin::Process { pid, path, command } => {
            let what = match (command.is_empty(), path) {
                (false, _) => format!(", {}", command.join(" ")),
                (true, Some(path)) => format!(", {}", path.display()),
                (true, None) => String::new(),
            };
            format!("process {pid}{what}")
        }
        Origin::Core { path, pid, command, .. } => {
            let of = pid.map(|pid| format!(" of process {pid}")).unwrap_or_default();
            let what = command.iter().map(|command| format!(", {command}")).collect::<String>();
            format!("the core {}{of}{what}", path.display())
        }
        _ => "bytes of the program that took it".to_owned(),
    }
}

fn mapping_row(mapping: &Mapping) -> Vec<String> {
    let name = match (mapping.captured, mapping.name.is_empty()) {
        (true, _) => mapping.name.clone(),
        (false, true) => "(not captured)".to_owned(),
        (false, false) => format!("{} (not captured)", mapping.name),
    };
    vec![
        mapping.range.to_string(),
        human::size(mapping.range.length_bytes()),
        mapping.protection.to_string(),
        mapping.kind.name().to_owned(),
        human::plain(&name),
    ]
}

fn labels_text(labels: &Labels) -> String {
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    human::plain(&labels.join(" "))
}

/// Lists the processes there are snapshots of.
pub(crate) fn processes(context: &Context) -> anyhow::Result<Exit> {
    #[derive(Serialize)]
    struct ProcessObject {
        process: String,
        snapshots: usize,
        latest: String,
        latest_time: String,
    }
    let output = &context.output;
    let processes = context.open()?.processes();
    if output.json {
        let objects = processes.into_iter().map(|summary| ProcessObject {
            process: summary.process,
            snapshots: summary.snapshots,
            latest: summary.latest.to_string(),
            latest_time: summary.latest_time.to_string(),
        });
        output.json(&objects.collect::<Vec<_>>())?;
    } else if processes.is_empty() {
        output.note("the store has no snapshots yet; `stillframe capture --pid PID` takes one");
    } else {
        let columns = [
            Column::left("PROCESS"),
            Column::right("SNAPSHOTS"),
            Column::id("LATEST"),
            Column::left("TIME"),
            Column::right("AGE"),
        ];
        let now = Timestamp::now();
        let rows = processes.iter().map(|summary| {
            vec![
                human::plain(&summary.process),
                human::count(summary.snapshots as u64),
                human::short(summary.latest),
                human::local_time(summary.latest_time),
                human::age(summary.latest_time, now),
            ]
        });
        output.text(&table(output, &columns, &rows.collect::<Vec<_>>()))?;
    }
    Ok(Exit::Done)
}

/// Prints the memory of a snapshot.
pub(crate) fn cat(context: &Context, arguments: &arguments::Cat) -> anyhow::Result<Exit> {
    let store = context.open()?;
    let snapshot = store.snapshot(store.find(&arguments.snapshot)?)?;
    let mut out = Pipe { out: BufWriter::with_capacity(256 * 1024, io::stdout()), failed: None };
    let result = write_memory(&snapshot, arguments, &mut out);
    match out.failed {
        // What the library makes of it would blame the snapshot.
        Some(error) => Err(output_error(error).into()),
        None => result.map(|()| Exit::Done),
    }
}

fn write_memory(snapshot: &Snapshot<'_>, arguments: &arguments::Cat, out: &mut Pipe) -> anyhow::Result<()> {
    match (arguments.hex, arguments.range) {
        (false, None) => drop(snapshot.read_image(out)?),
        (false, Some(range)) => drop(snapshot.read_range(range, out)?),
        (true, Some(range)) => write_hex(snapshot, range, out)?,
        (true, None) => {
            for (_, mapping) in snapshot.address_space()?.captured() {
                write_hex(snapshot, mapping.range, out)?;
            }
        }
    }
    Ok(out.flush().map_err(CommandError::Output)?)
}

fn write_hex(snapshot: &Snapshot<'_>, range: AddressRange, out: &mut Pipe) -> anyhow::Result<()> {
    let mut dump = HexDump::new(out, range.start());
    snapshot.read_range(range, &mut dump)?;
    Ok(dump.finish().map_err(CommandError::Output)?)
}

/// Standard output for many bytes. It remembers why it failed.
struct Pipe {
    out: BufWriter<io::Stdout>,
    failed: Option<io::Error>,
}

impl Pipe {
    fn remember<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            if kind != io::ErrorKind::Interrupted {
                self.failed = Some(error);
            }
            kind.into()
        })
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes);
        self.remember(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.out.flush();
        self.remember(flushed)
    }
}

/// Sets and removes labels.
pub(crate) fn label(context: &Context, arguments: &arguments::Label) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store: Store = context.open()?;
    let snapshot = store.label(store.find(&arguments.snapshot)?, &arguments.changes)?;
    if output.json {
        output.json(&SnapshotObject::from(&snapshot))?;
    } else if !output.quiet {
        let labels = match snapshot.labels().is_empty() {
            true => "no labels".to_owned(),
            false => labels_text(snapshot.labels()),
        };
        let id = output.styled(Style::Id, &human::short(snapshot.id()));
        output.text(&format!("{id}  {labels}\n"))?;
    }
    Ok(Exit::Done)
}
