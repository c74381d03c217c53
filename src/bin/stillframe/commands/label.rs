//! `label`: sets and removes labels.

use clap::Args;

use super::show::labels_text;
use super::snapshot_json::SnapshotJson;
use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::Style;
use crate::values::label_change;

const EXAMPLES: &str = "\
Examples:
  stillframe label latest stage=ready owner=ann
  stillframe label web-1~3 stage=";

/// Set or remove labels of a snapshot
///
/// The id of the snapshot stays the same.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Label {
    /// Snapshot to label
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// Label to set; KEY= removes the label
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = label_change)]
    changes: Vec<(String, Option<String>)>,
}

/// Sets and removes labels.
pub(super) fn label(context: &Context, arguments: &Label) -> anyhow::Result<Exit> {
    let output = &context.output;
    let store = context.open()?;
    let snapshot = store.change_labels(store.find(&arguments.snapshot)?, &arguments.changes)?;
    if output.json {
        output.json(&SnapshotJson::new(&snapshot))?;
    } else if !output.quiet {
        let labels = if snapshot.labels().is_empty() {
            "no labels".to_owned()
        } else {
            labels_text(snapshot.labels())
        };
        let id = output.styled(Style::Id, &human::short(snapshot.id()));
        output.text(&format!("{id}  {labels}\n"))?;
    }
    Ok(Exit::Done)
}
