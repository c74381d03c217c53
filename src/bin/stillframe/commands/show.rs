//! `show`: one snapshot and its mappings.

use clap::Args;
use jiff::Timestamp;
use stillframe::Snapshot;
use stillframe::address_space::Mapping;
use stillframe::record::{AttachmentRef, Origin};
use stillframe::source::LeftOut;
use stillframe::store::Labels;

use super::snapshot_json::SnapshotJson;
use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Column, Output, Style, table};

const EXAMPLES: &str = "\
Examples:
  stillframe show latest
  stillframe show web-1~3 --json";

/// Show a snapshot and its mappings
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Show {
    /// Snapshot to show
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
}

/// Shows one snapshot with its mappings.
pub(super) fn show(context: &Context, arguments: &Show) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let snapshot = store.snapshot(store.find(&arguments.snapshot)?)?;
    let space = snapshot.address_space()?;
    // Snapshots of older versions have no reasons. Damaged reasons are left out.
    let attachment = snapshot.attachment(LeftOut::ATTACHMENT).ok().flatten();
    let left_out = attachment.and_then(|bytes| LeftOut::from_attachment(&bytes).ok()).unwrap_or_default();
    if output.json {
        output.json(&SnapshotJson::new(&snapshot).with_mappings(&space, &left_out))?;
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
        ("parent", record.parent.map_or_else(|| "none (first snapshot)".to_owned(), human::short)),
        (
            "time",
            format!("{}, {}", human::local_time(record.time), human::age(record.time, Timestamp::now())),
        ),
        ("trigger", human::plain(&record.trigger.to_string())),
        ("source", human::plain(&source_text(&record.origin))),
        (
            "memory",
            format!(
                "{} in {} of {}, {} zeros",
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
        (
            "attachment",
            format!("{}, {}", human::plain(&attachment.name), human::size(attachment.length_bytes)),
        )
    }));
    lines
}

/// Where the memory comes from.
pub(super) fn source_text(origin: &Origin) -> String {
    match origin {
        Origin::File { path } => format!("the file {}", path.display()),
        Origin::LiveProcess { pid, path, command } => {
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
        _ => "memory of the capturing program".to_owned(),
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

/// Labels as text.
pub(super) fn labels_text(labels: &Labels) -> String {
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    human::plain(&labels.join(" "))
}
