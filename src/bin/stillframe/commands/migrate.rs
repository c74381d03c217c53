//! `migrate`: upgrades an older store.

use clap::Args;
use stillframe::Store;
use stillframe::migrate::MigrateOptions;

use crate::context::Context;
use crate::errors::Exit;

const EXAMPLES: &str = "\
Examples:
  stillframe migrate --dry-run
  stillframe migrate";

/// Upgrade a store of an older format
///
/// The old store stays complete until the new one is, so the disk needs space for both. If the migration is
/// interrupted, run it again.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Migrate {
    /// Report the formats only, change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Brings an older store to this format.
pub(super) fn migrate(context: &Context, arguments: &Migrate) -> anyhow::Result<Exit> {
    let output = &context.output;
    let options =
        MigrateOptions::new().dry_run(arguments.dry_run).wait(context.wait).trust_owner(context.trust_owner);
    let migration = Store::migrate(context.store_path()?, &options)?;
    if output.json {
        output.json(&migration)?;
    } else if !output.quiet {
        let (from, to) = (migration.from, migration.to);
        output.text(&if from == to {
            format!("the store has format {to}, the newest one: nothing to do\n")
        } else if arguments.dry_run {
            format!("would migrate the store from format {from} to format {to}\n")
        } else {
            format!("migrated the store from format {from} to format {to}\n")
        })?;
    }
    Ok(Exit::Done)
}
